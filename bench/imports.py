"""What ``import dsa_rt`` adds to ``import torch``: fresh processes, in turns, wall clock from start to exit.

    python -m bench.imports

Names of dsa_rt load at first use, so the bare import says little; the last row therefore also resolves
``dsa_rt.load``, which brings in all that a generation needs (native module included). The bound holds for
that row too.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bench import common

BOUND_SECONDS = 0.5
BASE = "import torch"
STATEMENTS = (BASE, "import torch; import dsa_rt", "import torch; import dsa_rt; dsa_rt.load")


def seconds(statement: str) -> float:
    """Wall clock of a fresh interpreter that runs a statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=common.ROOT)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``imports.json``; 1 where the bound is missed."""
    parse = common.parser(
        "imports", "What importing dsa_rt adds to importing torch.", bundle=None, threads=False
    )
    parse.add_argument("--runs", type=common.positive, default=9, help="fresh processes of each kind")
    options = parse.parse_args(arguments)
    result = common.fingerprint(
        "imports", options, warm_up="one process of each kind, thrown away: files are in the page cache",
        included=["wall clock of a whole process, interpreter start and exit included; 'adds' is the median "
                  "over rounds of the difference to the 'import torch' of the same round"],
    )  # fmt: skip
    taken: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    bar = tqdm(range(-1, options.runs), desc="imports", unit="round", disable=True if options.quiet else None)
    for turn in bar:
        for statement, times in taken.items():
            elapsed = seconds(statement)
            if turn >= 0:
                times.append(elapsed)
    rows: dict[str, Any] = {}
    for statement, times in taken.items():
        adds = statistics.median(a - b for a, b in zip(times, taken[BASE], strict=True))
        rows[statement] = {
            "seconds": common.spread(times),
            "adds": adds,
            "within_bound": adds <= BOUND_SECONDS,
        }
    print(common.table(
        ["statement", "seconds", "p20", "p80", "adds s"],
        [[name, *(common.figure(row["seconds"][key], 3) for key in ("median", "p20", "p80")),
          f"{row['adds']:+.3f}"]
         for name, row in rows.items()],
    ))  # fmt: skip
    print(f"bound: {BOUND_SECONDS} s; median of {options.runs} fresh processes each")
    if busy := common.warn_if_busy(result):
        print(busy)
    result |= {"rows": rows, "bound_seconds": BOUND_SECONDS}
    print("written:", common.show_path(common.write_json(options.out, "imports.json", result)))
    return 0 if all(row["within_bound"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(common.run(main))
