"""The rules of warming up and of taking turns, under a clock of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from dsa_rt.suite.turns import in_turns, warm_up


def scripted(seconds: Sequence[float]) -> tuple[Callable[[], None], Callable[[], float], list[float]]:
    """A run that takes these times one after the other, its clock, and what was taken."""
    now, taken = [0.0], []

    def run() -> None:
        taken.append(seconds[len(taken)])
        now[0] += taken[-1]

    return run, lambda: now[0], taken


@pytest.mark.parametrize(
    ("seconds", "budget", "runs", "ended_by"),
    [
        ([5.0, 1.00, 1.04], 60, 3, "settled"),
        ([1.04, 1.0, 9.0], 60, 2, "settled"),
        ([5.0, 3.0, 2.0, 2.0], 60, 3, "runs"),
        ([61.0, 1.0], 60, 1, "seconds"),
        ([40.0, 30.0, 1.0], 60, 2, "seconds"),
        ([1.0, 1.06, 1.2], 60, 3, "runs"),
    ],
)
def test_warm_up_ends_by_rule(seconds: list[float], budget: float, runs: int, ended_by: str) -> None:
    run, clock, taken = scripted(seconds)
    warmed = warm_up(run, seconds=budget, clock=clock)
    assert (warmed.runs, warmed.ended_by, len(taken)) == (runs, ended_by, runs)
    assert warmed.seconds == pytest.approx(sum(seconds[:runs]))
    if runs == 1:
        assert warmed.difference is None
    else:
        last, before = seconds[runs - 1], seconds[runs - 2]
        assert warmed.difference == pytest.approx(abs(last - before) / min(last, before))


def test_turns_rotate() -> None:
    calls: list[tuple[str, int]] = []
    ways = {name: (lambda number, name=name: calls.append((name, number))) for name in "abc"}
    results = list(in_turns(ways, 4))
    assert [name for name, _ in calls] == list("abcbcacababc")
    assert [number for _, number in calls] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [(name, number) for name, number, _ in results] == calls
