from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from dsa_rt.errors import PolicyError
from dsa_rt.policy import Records, fit_calibration, oracle, random_allocation, simulate

from .synthetic import synthetic_records


def captured(records: Records, passes: list[list[int]]) -> float:
    removed = removable = 0.0
    for i in range(records.clips):
        for j in range(records.chunks):
            error = records.error[i, j]
            removed += error[0] - error[passes[i][j] - 1]
            removable += error[0] - error[-1]
    return removed / removable


@pytest.mark.parametrize("all_or_nothing", [False, True])
@pytest.mark.parametrize("refine_first", [False, True])
def test_oracle_is_the_best_of_all_allocations(
    all_or_nothing: bool, refine_first: bool, generator: np.random.Generator
) -> None:
    shape = (3, 4, 3)
    records = Records(generator.random(shape), generator.random(shape))  # errors may rise from pass to pass
    options = (1, 3) if all_or_nothing else (1, 2, 3)
    for calls in range(8 + 2 * refine_first, 17):
        allowed = [
            p
            for p in itertools.product(options, repeat=4)
            if sum(p) + 4 <= calls and (p[0] == 3 or not refine_first)
        ]
        found = oracle(records, calls + 0.5, all_or_nothing=all_or_nothing, refine_first=refine_first)
        best = sum(
            max(sum(records.gain()[i, j, p[j] - 1] for j in range(4)) for p in allowed) for i in range(3)
        )
        assert found["captured"] == pytest.approx(best / records.gain()[..., -1].sum())
        assert all(tuple(row) in allowed for row in found["passes"])
        assert found["captured"] == pytest.approx(captured(records, found["passes"]))
    with pytest.raises(PolicyError, match="take at least"):
        oracle(records, 7 + 2 * refine_first, refine_first=refine_first)


def test_simulation_of_fixed_policies(generator: np.random.Generator) -> None:
    records = synthetic_records(5, 6, 4, seed=int(generator.integers(1 << 30)))
    result = simulate("fixed-4-then-2", records)
    assert result["passes"] == [[4, 2, 2, 2, 2, 2]] * 5
    assert result["captured"] == pytest.approx(captured(records, result["passes"]))
    assert result["model_calls"] == result["model_calls_max"] == 20
    assert result["passes_per_chunk"] == pytest.approx(14 / 6)
    assert result["histogram"] == [0, 25, 0, 5] and result["refined"] == 1.0
    assert simulate("dense", records)["captured"] == pytest.approx(1.0)
    assert simulate("fixed-1", records)["captured"] == 0.0
    json.dumps(result, allow_nan=False)


def test_paper_simulation_is_algorithm_1(generator: np.random.Generator) -> None:
    records = synthetic_records(20, seed=int(generator.integers(1 << 30)))
    expected = []
    for clip in records.confidence.tolist():
        previous, row = 1.0, []
        for levels in clip:
            row.append(4 if levels[0] < previous else 1)
            previous = levels[row[-1] - 1]
        expected.append(row)
    assert simulate("dsa-paper", records)["passes"] == expected


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_random_allocation_has_the_cost_asked_for(all_or_nothing: bool) -> None:
    records = synthetic_records(6)
    for calls in (17, 20, 24, 35):
        result = random_allocation(records, calls, all_or_nothing=all_or_nothing, repeats=4)
        passes = np.array(result["passes"])
        extra = (calls - 17) // 3 * 3 if all_or_nothing else calls - 17
        assert (passes.sum(1) + 7 == 17 + extra).all()
        assert (passes[:, 0] == 4).all() and passes.max() == 4 and passes.min() >= 1
        assert result["captured"] <= oracle(records, calls, refine_first=True)["captured"] + 1e-9
    assert random_allocation(records, 35)["captured"] == pytest.approx(1.0)


# The world of the following tests is like the demo's: clips differ somewhat, chunks inside one differ more.
WORLD = {"clip_share": 0.15, "persistence": 0.3, "spread": 1.0}


def test_a_good_head_beats_every_static_row_at_equal_calls() -> None:
    calibration = fit_calibration(synthetic_records(64, strength=0.95, seed=1, **WORLD))
    test = synthetic_records(300, strength=0.95, seed=2, **WORLD)
    rows = {name: simulate(name, test) for name in ("fixed-2", "fixed-3", "fixed-4-then-1", "fixed-4-then-2")}
    paper = simulate("dsa-paper", test)
    for name, row in rows.items():
        calls = row["model_calls"]
        free = simulate(f"dsa-calibrated:calls={calls},first=free", test, calibration)
        assert free["model_calls"] == calls
        assert free["captured"] > row["captured"] + 0.002, name
        assert free["captured"] < oracle(test, calls)["captured"]
    default = simulate("dsa-calibrated:calls=23", test, calibration)
    assert default["captured"] > rows["fixed-4-then-2"]["captured"] + 0.01
    assert default["captured"] > random_allocation(test, 23, repeats=4)["captured"] + 0.05
    equal = simulate(f"dsa-calibrated:calls={paper['model_calls']}", test, calibration)
    assert equal["captured"] > paper["captured"] + 0.04 and equal["model_calls"] <= paper["model_calls"]
    once = simulate("dsa-calibrated:calls=23,retest=no", test, calibration)
    assert once["captured"] > random_allocation(test, 23, all_or_nothing=True, repeats=4)["captured"] + 0.05
    assert once["captured"] < oracle(test, 23, all_or_nothing=True)["captured"]


def test_a_useless_head_costs_nothing() -> None:
    """Without information the rule falls back to an even allocation, the best that there is then."""
    calibration = fit_calibration(synthetic_records(64, strength=0.0, seed=5, **WORLD))
    test = synthetic_records(300, strength=0.0, seed=6, **WORLD)
    even = simulate("fixed-4-then-2", test)["captured"]
    assert simulate("dsa-calibrated:calls=23", test, calibration)["captured"] > even - 0.01


def test_clips_that_differ_do_not_mislead() -> None:
    """Where difficulty is mostly a clip's own, no clip may spend its budget on its first chunks."""
    world = {"clip_share": 0.85, "persistence": 0.0, "spread": 1.2}
    calibration = fit_calibration(synthetic_records(64, strength=0.9, seed=7, **world))
    test = synthetic_records(300, strength=0.9, seed=8, **world)
    even = simulate("fixed-4-then-2", test)["captured"]
    result = simulate("dsa-calibrated:calls=23", test, calibration)
    assert result["captured"] > even - 0.01
    hard = np.argsort(test.gain()[..., -1].sum(1))[-60:]
    by_chunk = np.array(result["passes"])[hard].mean(0)
    assert by_chunk[1:4].mean() < by_chunk[4:].mean() + 0.3


def test_better_heads_capture_more() -> None:
    shares = []
    for strength in (0.0, 0.5, 0.8, 1.0):
        calibration = fit_calibration(synthetic_records(64, strength=strength, seed=3, **WORLD))
        test = synthetic_records(300, strength=strength, seed=4, **WORLD)
        shares.append(simulate("dsa-calibrated:calls=24,first=free", test, calibration)["captured"])
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.04
