"""What changed between two results beyond noise.

The rule, for each case and metric: the runs of both files are samples of the same clip, so they differ by time alone.
A change is reported where the two-sided Mann-Whitney test, exact for these sample sizes, ties included, gives p < 0.01
*and* the medians differ by 3% or more. With five runs against five that takes samples that do not overlap. The test
knows what varied while each file was made, and nothing of what differed between the two occasions: another clock,
temperature or load is a change to it. So measure both right after each other, or twice each.

Counts that do not vary (model calls, active tokens, planned memory) are changes where they differ at all, better and
worse as for times.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsa_rt.suite.records import figure, table

ALPHA, LEAST_CHANGE = 0.01, 0.03
RULE = (
    f"changed: exact two-sided Mann-Whitney p < {ALPHA:g} over the runs, and medians that differ by {LEAST_CHANGE:.0%} "
    "or more; counts: any difference"
)
HIGHER_IS_BETTER = {  # metrics of runs
    "fps_denoise": True, "fps_with_decode": True, "fps_end_to_end": True, "first_frame_ms": False, "decode_ms": False,
    "energy_j": False,
}  # fmt: skip
COUNTS = ("nfe", "active_token_share")
SAME_CASE = ("device", "dtype", "height", "width", "frames")  # of what was made, beside the definition


@dataclass(frozen=True)
class Change:
    """One metric of one case. before, after: medians; p: None for a count. better: None within noise."""

    case: str
    metric: str
    before: float
    after: float
    p: float | None
    better: bool | None

    @property
    def relative(self) -> float:
        """After over before, less one; infinite where there was nothing before."""
        return self.after / self.before - 1 if self.before else math.copysign(math.inf, self.after)


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared; cases that are in one file alone or are not the same; what differs around them."""

    changes: tuple[Change, ...]
    not_compared: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.better is False]

    @property
    def better(self) -> list[Change]:
        return [change for change in self.changes if change.better]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [
            {"case": c.case, "metric": c.metric, "before": c.before, "after": c.after, "p": c.p,
             "relative": c.relative if math.isfinite(c.relative) else None,
             "verdict": {None: "within noise", True: "better", False: "worse"}[c.better]}
            for c in self.changes
        ]  # fmt: skip
        return {"rule": RULE, "changes": rows, "not_compared": dict(self.not_compared), "warnings": list(self.warnings)}

    def report(self) -> str:
        """For people: what changed, then what was found unchanged, in words."""
        lines = [f"warning: {line}" for line in self.warnings]
        lines += [f"not compared: {name}: {reason}" for name, reason in self.not_compared.items()]
        changed = [change for change in self.changes if change.better is not None]
        if changed:
            rows = [
                [f"{c.case}: {c.metric}", figure(c.before, 2), figure(c.after, 2), figure(c.relative, 1, scale=100),
                 figure(c.p, 4), "better" if c.better else "WORSE"]
                for c in changed
            ]  # fmt: skip
            lines.append(table(["case: metric", "before", "after", "change %", "p", ""], rows))
        lines.append(
            f"{len(self.better)} better, {len(self.worse)} worse, {len(self.changes) - len(changed)} within noise"
        )
        return "\n".join([*lines, RULE])


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Two results of the same schema, as :func:`dsa_rt.suite.schema.read` gives them."""
    rows = [{case["name"]: case for case in result["cases"]} for result in (before, after)]
    first, second = rows
    changes: list[Change] = []
    not_compared: dict[str, str] = {}
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second:
            result, missing = (before, "first") if name not in first else (after, "second")
            reason = result["not_run"].get(name)
            not_compared[name] = f"the {missing} file lacks it" + (f" ({reason})" if reason else "")
            continue
        difference = _other_case(first[name], second[name])
        if difference is None:
            changes += _changes(name, first[name], second[name])
        else:
            not_compared[name] = difference
    return Comparison(tuple(changes), not_compared, tuple(_around(before, after)))


def _other_case(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Why two cases of one name are not the same measurement; None where they are."""
    pairs = [(key, a["case"].get(key), b["case"].get(key)) for key in sorted(a["case"].keys() | b["case"].keys())]
    pairs += [(key, a["made"][key], b["made"][key]) for key in SAME_CASE]
    for key, x, y in pairs:
        if x != y and key != "about":
            return f"{key} was {x!r} and is {y!r}"
    return None


def _changes(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    changes = []
    for metric, higher in HIGHER_IS_BETTER.items():
        x, y = ([run[metric] for run in case["runs"]] for case in (a, b))
        if None not in x and None not in y:
            changes.append(_change(name, metric, x, y, higher))
    x, y = ([statistics.fmean(run["gaps_ms"]) for run in case["runs"] if run["gaps_ms"]] for case in (a, b))
    if x and y:
        changes.append(_change(name, "mean_gap_ms", x, y, False))
    counted = {
        metric: [statistics.median(run[metric] or 0.0 for run in case["runs"]) for case in (a, b)] for metric in COUNTS
    } | {"planned_bytes": [case["memory"]["planned_bytes"] for case in (a, b)]}
    for metric, (before, after) in counted.items():
        changes.append(Change(name, metric, before, after, None, None if before == after else after < before))
    return changes


def _change(name: str, metric: str, x: Sequence[float], y: Sequence[float], higher_is_better: bool) -> Change:
    before, after, p = statistics.median(x), statistics.median(y), mann_whitney(x, y)
    beyond = p < ALPHA and abs(after - before) >= LEAST_CHANGE * max(abs(before), 1e-12)
    return Change(name, metric, before, after, p, (after > before) == higher_is_better if beyond else None)


def mann_whitney(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided p of the rank-sum test: the share of all ways to split the joined samples into two of these sizes whose
    rank sum is at least as far from its mean. Exact; equal values share their mean rank."""
    joined = sorted([*x, *y])
    doubled = [joined.index(value) + len(joined) - joined[::-1].index(value) + 1 for value in joined]  # twice the rank
    place = dict(zip(joined, doubled, strict=True))
    total, mean = sum(place[value] for value in x), len(x) * (len(joined) + 1)
    ways = _rank_sums(tuple(doubled), len(x))
    far = sum(count for rank_sum, count in ways.items() if abs(rank_sum - mean) >= abs(total - mean))
    return far / math.comb(len(joined), len(x))


@functools.lru_cache(maxsize=256)
def _rank_sums(doubled: tuple[int, ...], size: int) -> dict[int, int]:
    """How many subsets of ``size`` items have each sum."""
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(size))]
    for rank in doubled:
        for taken in range(size, 0, -1):
            for rank_sum, count in ways[taken - 1].items():
                ways[taken][rank_sum + rank] = ways[taken].get(rank_sum + rank, 0) + count
    return ways[size]


def _around(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs in machine, versions and settings, and load."""
    lines = []
    for part in ("machine", "versions", "settings", "gpu"):
        a, b = before[part] or {}, after[part] or {}
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key) and key not in ("clock_mhz", "cases"):
                lines.append(f"{part} {key} was {a.get(key)!r} and is {b.get(key)!r}")
    for name, result in (("first", before), ("second", after)):
        cores, load = result["machine"].get("cores") or 1, result["load_before"]
        if load is not None and load > 0.35 * cores:
            lines.append(f"the machine was busy before the {name} file was made (load {load} on {cores} cores)")
    return lines
