"""The command line of the HSA benchmarks; see :mod:`bench.hsa`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import common
from bench.hsa import quality, speed, storage, strength
from dsa_rt.runtime import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 1 where a requirement is missed."""
    parse = common.parser(
        "hsa", "HSA against its rivals at equal run time; --strength, --speed, --storage: other measurements.",
        bundle="demo-many-step",
    )  # fmt: skip
    parse.set_defaults(dtype=None)
    which = parse.add_mutually_exclusive_group()
    which.add_argument("--strength", action="store_true", help="PSNR by strength of the extrapolation and gap")
    which.add_argument("--speed", action="store_true", help="time against token-steps, and against diffusers")
    which.add_argument("--storage", action="store_true", help="FP8 and host K/V: PSNR, and memory against the plan")
    parse.add_argument("--quick", action="store_true", help="a few rows, prompts, small sizes: does it run?")
    parse.add_argument("--prompts", type=common.positive, help="held-out prompts: 24; 6 of --strength, 3 of --storage")
    parse.add_argument("--workers", type=int, default=2, help="processes of one thread; 0: this one (not --speed)")
    parse.add_argument("--rows", type=common.names, help="names, spaces between; bench/hsa/rows.py has them all")
    parse.add_argument("--timing-clips", type=int, default=3, help="timed clips of each row, 0 for none (quality)")
    sizes = parse.add_argument_group("--speed")
    sizes.add_argument("--dim", type=common.positive, default=512, help="width, heads of 64")
    sizes.add_argument("--layers", type=common.positive, default=8)
    sizes.add_argument("--grid", type=_grid, default=(9, 15, 16), help="latent frames x rows x columns of tokens")
    sizes.add_argument("--dtypes", type=_dtypes, default=("bf16",), help="of fp32 and bf16, spaces between")
    sizes.add_argument("--rounds", type=common.positive, default=3, help="whole runs of each policy")
    sizes.add_argument("--samples", type=common.positive, default=15, help="forward passes of each model")
    options = parse.parse_args(arguments)
    options.prompts = options.prompts or (6 if options.strength else 3 if options.storage else 24)
    options.dtype = options.dtype or ("bf16" if options.storage else "fp32")
    chosen = speed if options.speed else strength if options.strength else storage if options.storage else quality
    return chosen.main(options)


def _grid(text: str) -> tuple[int, int, int]:
    frames, rows, columns = (common.positive(part) for part in text.split("x"))
    return frames, rows, columns


def _dtypes(text: str) -> tuple[str, ...]:
    known = tuple(name for name in common.names(text) if name in DTYPES)
    if not known or len(known) < len(common.names(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(DTYPES)}")
    return known


if __name__ == "__main__":
    sys.exit(common.run(main))
