"""The table of measured choices, ``dsa_rt/ops/choices.json``, from what ``bench.gpu.ops`` wrote.

    python -m bench.choices RESULT.json ... [--out FILE]

For each op, dtype and measured size the fastest of the backends whose order is left to measurements, by medians from
cold caches. Sizes between two measured ones go with the nearer one (by ratio), those beyond the outermost ones up to a
factor of two. Where the spreads of the two fastest (p20 to p80) meet, there is no row: the order of the code stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import common
from bench.gpu.ops import label
from dsa_rt.errors import OptionError
from dsa_rt.ops import choices
from dsa_rt.ops.backend import MOVABLE
from dsa_rt.ops.choices import Bounds, Row
from dsa_rt.output import whole_file

Group = tuple[str, str, str, Bounds | None]
"""op, device, dtype, dim: measurements of one replace all rows of it."""


@dataclass(frozen=True)
class Case:
    """A measured size. row: as if it covered this size alone; None where the two fastest cannot be told apart."""

    group: Group
    active: int | None
    cached: int | None
    row: Row | None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m bench.choices", description="The table of measured choices.")
    made.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="what bench.gpu.ops wrote")
    made.add_argument("--out", type=Path, default=choices.PATH, help="the table (default: the package's own)")
    return made.parse_args(arguments)


def load(path: Path) -> dict[str, Any]:
    """A result of bench.gpu.ops, all of it right; OptionError else."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("program") != "bench.gpu.ops" or not result.get("commit"):
        raise OptionError(f"{path} is no result of bench.gpu.ops that names its commit")
    for row in result["rows"]:
        if "backends" not in row:
            raise OptionError(f"{path} does not say which backends were checked; measure with this version")
        wrong = row["differs"] or "; ".join(f"{name} failed: {why}" for name, why in row["failed"].items())
        if wrong:
            raise OptionError(f"{path} has a wrong row, {label(row)}: {wrong}; nothing is taken from it")
    return result


def cases(result: dict[str, Any], source: str) -> tuple[list[Case], list[str]]:
    """What was measured of ops whose order may change, and what was left out, in words."""
    on_card = result["settings"]["device"].startswith("cuda")
    device = result["card"]["compute_cap"] if on_card else "cpu"
    machine = result["card"]["name"] if on_card else result["machine"]["cpu"]
    made, left_out = [], []
    for row in result["rows"]:
        order = MOVABLE.get((row["op"], "cuda" if on_card else "cpu"), ())
        times = {name: row["ways"][name]["cold"] for name in order if name in row["backends"]}
        if len(times) < 2:
            why = f"only {', '.join(times) or 'none'} measured of {', '.join(order)}" if order else "its order is fixed"
            left_out.append(f"{label(row)} on {device}: {why}")
            continue
        first, second, *_ = sorted(times, key=lambda name: times[name]["median"])
        active, cached, dim = (row[name] if name in choices.SIZES[row["op"]] else None for name in
                               ("active", "cached", "dim"))  # fmt: skip
        bounds = None if dim is None else (dim, dim)
        winner = None
        if times[first]["p80"] < times[second]["p20"]:
            ratio = round(times[second]["median"] / times[first]["median"], 3)
            winner = Row(row["op"], device, row["dtype"], None, None, bounds, first, second, ratio,
                         result["date"][:10], machine, result["commit"], source)  # fmt: skip
        else:
            left_out.append(f"{label(row)} on {device}: {first} and {second} cannot be told apart")
        made.append(Case((row["op"], device, row["dtype"], bounds), active, cached, winner))
    return made, left_out


def ranges(sizes: Iterable[int]) -> dict[int, Bounds]:
    """Each of the sizes with the bounds of what goes with it: half of the way, by ratio, to the next ones."""
    rising = sorted(sizes)
    ends = [(rising[0] - 1) // 2, *(math.isqrt(a * b) for a, b in itertools.pairwise(rising)), 2 * rising[-1]]
    return {size: (low + 1, high) for size, low, high in zip(rising, ends[:-1], ends[1:], strict=True)}


def merged(found: Sequence[Case]) -> list[Row]:
    """The rows of a group, as few as say the same."""
    by_cached: dict[int | None, dict[int | None, Case]] = {}
    for case in found:
        if by_cached.setdefault(case.cached, {}).setdefault(case.active, case) is not case:
            raise OptionError(f"{case.group[0]}, A {case.active}, N {case.cached} was measured twice; give one result")
    cached_bounds = _bounds(by_cached)
    rows: list[Row] = []
    for cached in sorted(by_cached, key=lambda size: size or 0):
        of_one = by_cached[cached]
        active_bounds = _bounds(of_one)
        line: list[Row] = []
        previous = None
        for active in sorted(of_one, key=lambda size: size or 0):
            row = of_one[active].row
            if row is not None:
                row = replace(row, active=active_bounds[active], cached=cached_bounds[cached])
                if previous is not None and _alike(line[-1], row):
                    line[-1] = _joined(line[-1], row, "active")
                else:
                    line.append(row)
            previous = row
        for row in line:
            below = [old for old in rows if old.active == row.active and _alike(old, row) and _touch(old, row)]
            if below:
                rows[rows.index(below[0])] = _joined(below[0], row, "cached")
            else:
                rows.append(row)
    return rows


def _bounds(sizes: Iterable[int | None]) -> dict[int | None, Bounds | None]:
    known = [size for size in sizes if size is not None]
    return {None: None, **(ranges(known) if known else {})}


def _alike(a: Row, b: Row) -> bool:
    return (a.backend, a.source) == (b.backend, b.source)


def _touch(a: Row, b: Row) -> bool:
    return a.cached is not None and b.cached is not None and a.cached[1] + 1 == b.cached[0]


def _joined(a: Row, b: Row, over: str) -> Row:
    """Two rows that follow each other in one size; the smaller of their ratios counts."""
    ends = {over: (getattr(a, over)[0], getattr(b, over)[1])}
    return replace(min(a, b, key=lambda row: row.ratio), **ends)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, print what changes, write the table."""
    options = parse(arguments)
    present = choices.read(choices.PATH, MOVABLE)
    groups: dict[Group, list[Case]] = {}
    for path in options.results:
        found, left_out = cases(load(path), path.name)
        for case in found:
            groups.setdefault(case.group, []).append(case)
        for line in left_out:
            print(f"left out: {line}")
    rows = [row for row in present if (row.op, row.device, row.dtype, row.dim) not in groups]
    rows += [row for found in groups.values() for row in merged(found)]
    none = (0, 0)
    rows.sort(key=lambda r: (r.op, r.device, r.dtype, r.dim or none, r.cached or none, r.active or none))
    text = choices.written(rows)
    if choices.parse(text, str(options.out), MOVABLE) != rows:
        raise OptionError(f"{options.out} would not be read as it is written")
    for sign, here, there in (("-", present, rows), ("+", rows, present)):
        for row in here:
            if row not in there:
                call = f"{row.op} on {row.device}, {row.dtype}, {row.where() or 'always'}"
                print(f"{sign} {call}: {row.backend}, {row.why()}")
    if rows == present:
        print("nothing changes")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {common.show_path(options.out.resolve())}, {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
