"""``dsa-rt bench``, its results in bench/results beside those of the other programs.

    python -m bench.suite
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.common import ROOT
from dsa_rt import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of ``dsa-rt bench``, whose options all are to be had, ``--out`` too."""
    given = sys.argv[1:] if arguments is None else arguments
    return cli.main(["bench", "--out", str(ROOT / "bench" / "results"), *given])


if __name__ == "__main__":
    sys.exit(main())
