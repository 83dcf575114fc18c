"""What policies capture of the error that refining can remove, beside the best and a random use of the same
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from dsa_rt.errors import PolicyError
from dsa_rt.policy import DSA, Calibration, Records, oracle, parse_policy, random_allocation, simulate

Point = tuple[float, float]
Curve = list[Point]


def captured(policy: str | DSA, records: Records, calibration: Calibration | None) -> Point:
    """(mean model calls, captured share in [0, 1]) of a policy replayed on the records."""
    result = simulate(policy, records, calibration)
    return result["model_calls"], result["captured"]


def curves(
    records: Records, calibration: Calibration | None, static: Mapping[str, Point]
) -> dict[str, Curve]:
    """Captured share against mean model calls, rising, at every budget that there is.

    oracle: the best allocation within every clip, pass by pass. random: the first chunk in full, the rest by
    chance, in passes or in whole chunks, whichever captures more. static: of the fixed policies, which are
    given. These three are upper hulls: between two budgets some clips take the one and some the other.
    calibrated: the calibrated rule, decided after every pass; without a calibration left out.
    """
    budgets = range(2 * records.chunks, records.chunks * (records.passes + 1) + 1)
    chance = [
        random_allocation(records, budget, all_or_nothing=whole, repeats=16)
        for whole in (False, True)
        for budget in budgets
        if budget >= 2 * records.chunks + records.passes - 1
    ]
    fixed = {name: point for name, point in static.items() if family(name) == "static"}
    result = {
        "oracle": hull((r["model_calls"], r["captured"]) for r in (oracle(records, b) for b in budgets)),
        "random": hull((r["model_calls"], r["captured"]) for r in chance),
        "static": hull(fixed.values()),
    }
    if calibration is not None:
        result["calibrated"] = _reachable(
            lambda calls: captured(DSA("calibrated", model_calls=calls), records, calibration), budgets
        )
    return result


def _reachable(run: Callable[[int], Point], budgets: range) -> Curve:
    """Points at those budgets that a policy accepts."""
    points = {}
    for budget in budgets:
        try:
            x, y = run(budget)
        except PolicyError:  # fewer calls than the first chunk in full takes
            continue
        points[x] = y
    return sorted(points.items())


def at(curve: Curve, model_calls: float) -> float | None:
    """A curve's value, between points on the straight line; None outside of it."""
    if not curve or not curve[0][0] - 1e-9 <= model_calls <= curve[-1][0] + 1e-9:
        return None
    calls, values = zip(*curve, strict=True)
    return float(np.interp(model_calls, calls, values))


def hull(points: Iterable[Point]) -> Curve:
    """Upper concave hull, from left to right."""
    result: Curve = []
    for point in sorted(points):
        if result and result[-1][0] == point[0]:
            result.pop()  # sorted, so the point that comes is not lower
        while len(result) > 1 and _below(result[-2], result[-1], point):
            result.pop()
        result.append(point)
    return result


def _below(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def family(name: str) -> str:
    """Whose rule a policy follows: "static", "paper" or "calibrated"."""
    policy = parse_policy(name)
    return "static" if not isinstance(policy, DSA) else "paper" if policy.rule == "paper" else "calibrated"
