"""``python -m dsa_rt.train`` (or ``dsa-rt train``): rerun the demo's training, hours on a CPU, minutes on a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsa_rt.errors import DsaRtError

STAGES = ("codec", "decoder", "flow", "regression", "distillation", "head")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsa-rt train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for states, logs and the two bundles")
    parser.add_argument("--scale", default="cpu", help="quick (minutes, to see it run), cpu (hours) or gpu")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--upto", choices=STAGES, help="stop after this stage")
    parser.add_argument("--start", help="a many-step bundle to go on from, such as demo-many-step")
    for stage in STAGES:
        parser.add_argument(f"--{stage}-minutes", type=float, help=f"budget of the {stage} stage")
    parser.add_argument("--clips", type=int, help="clips to render and encode")
    options = vars(parser.parse_args(arguments))
    from dsa_rt.train.recipe import run

    try:
        run(**options)
    except DsaRtError as error:
        print(f"dsa-rt train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsa-rt train: stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
