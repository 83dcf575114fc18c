"""What the programs of this folder share: their first arguments, their exit codes, and what they take from
:mod:`dsa_rt.suite.records`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_rt.errors import DsaRtError
from dsa_rt.suite import records
from dsa_rt.suite.records import ROOT, figure, median, show_path, spread, table, warn_if_busy, write_json

__all__ = [
    "ROOT", "figure", "fingerprint", "median", "names", "parser", "positive", "run", "show_path", "spread", "table",
    "warn_if_busy", "write_json",
]  # fmt: skip


def parser(
    program: str, about: str, *, bundle: str | None = "demo", threads: bool = True
) -> argparse.ArgumentParser:
    """The arguments that programs have in common. bundle, threads: leave out what a program has no use
    for.
    """
    made = argparse.ArgumentParser(prog=f"python -m bench.{program}", description=about, allow_abbrev=False)
    if bundle is not None:
        made.add_argument(
            "--bundle", default=bundle, help="a bundle's folder, or a name that comes with the package"
        )
        made.add_argument("--dtype", default="auto", help="fp32, bf16, fp16 or auto (default)")
    if threads:
        made.add_argument(
            "--threads", type=positive, default=os.cpu_count() or 1, help="torch threads (all cores)"
        )
    made.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", help="folder for JSON and pictures"
    )
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def run(main: Callable[[], int]) -> int:
    """The exit code of a program: 0 done, 1 a requirement is missed, 2 bad input, 130 Ctrl-C."""
    try:
        return main()
    except DsaRtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def names(text: str) -> tuple[str, ...]:
    """Policy names from one argument, for argparse: spaces between them, as commas stand between a policy's
    options.
    """
    return tuple(text.split())


def fingerprint(
    program: str, settings: argparse.Namespace | Mapping[str, Any], *, warm_up: str, included: Sequence[str]
) -> dict[str, Any]:
    """:func:`dsa_rt.suite.records.fingerprint` of ``python -m bench.<program>``."""
    return records.fingerprint(f"bench.{program}", settings, warm_up=warm_up, included=included)
