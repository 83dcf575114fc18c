"""What counts as a change: the test against enumeration, made-up results against the rule, and exit codes."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsa_rt.cli import main
from dsa_rt.suite.compare import ALPHA, LEAST_CHANGE, compare, mann_whitney


def by_enumeration(x: list[float], y: list[float]) -> float:
    """Every split of the joined samples; U counted pair by pair."""

    def u(a: list[float], b: list[float]) -> float:
        return sum((p > q) + 0.5 * (p == q) for p in a for q in b)

    joined, far, ways = x + y, 0, 0
    middle, seen = len(x) * len(y) / 2, abs(u(x, y) - len(x) * len(y) / 2)
    for chosen in itertools.combinations(range(len(joined)), len(x)):
        a = [joined[i] for i in chosen]
        b = [joined[i] for i in range(len(joined)) if i not in chosen]
        far += abs(u(a, b) - middle) >= seen - 1e-9
        ways += 1
    return far / ways


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "m", "ties"), [(5, 5, False), (3, 6, True), (5, 4, True), (1, 4, False)])
def test_exact_p(seed: int, n: int, m: int, ties: bool) -> None:
    source = np.random.default_rng(seed)
    x, y = source.normal(0, 1, n), source.normal(0.8, 1, m)
    if ties:
        x, y = x.round(), y.round()
    assert mann_whitney(x.tolist(), y.tolist()) == pytest.approx(by_enumeration(x.tolist(), y.tolist()))


def test_known_p() -> None:
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert mann_whitney([1, 2, 3], [1, 2, 3]) == 1 and mann_whitney([2, 2], [2, 2, 2]) == 1
    assert mann_whitney(list(range(40)), list(range(100, 140))) < 1e-20  # no enumeration could


def test_noise_is_seldom_called_a_change() -> None:
    source = np.random.default_rng(1)
    found = sum(mann_whitney(source.normal(size=7), source.normal(size=7)) < ALPHA for _ in range(1000))
    assert found <= 20  # ten are to be expected


def scaled(result: dict[str, Any], case: str, metric: str, factor: float) -> dict[str, Any]:
    """The same with one metric of one case changed in every run."""
    changed = copy.deepcopy(result)
    for run in next(c for c in changed["cases"] if c["name"] == case)["runs"]:
        run[metric] *= factor
    return changed


def steady(result: dict[str, Any]) -> dict[str, Any]:
    """Runs that differ by half a percent."""
    for case in result["cases"]:
        for number, run in enumerate(case["runs"]):
            for metric in ("fps_denoise", "fps_with_decode", "fps_end_to_end", "first_frame_ms", "decode_ms"):
                run[metric] = case["runs"][0][metric] * (1 + 0.001 * number)
            run["gaps_ms"] = [10 + 0.01 * number for _ in run["gaps_ms"]]
    return result


@pytest.mark.parametrize(
    ("metric", "factor", "better"),
    [("fps_end_to_end", 0.95, False), ("fps_end_to_end", 1.05, True), ("first_frame_ms", 1.05, False),
     ("first_frame_ms", 0.95, True), ("decode_ms", 1.02, None), ("fps_denoise", 0.98, None)],
)  # fmt: skip
def test_changes_beyond_noise(result: dict[str, Any], metric: str, factor: float, better: bool | None) -> None:
    before = steady(result)
    found = compare(before, scaled(before, "refined", metric, factor))
    decided = [(c.case, c.metric, c.better) for c in found.changes if c.better is not None]
    assert decided == ([] if better is None else [("refined", metric, better)])
    (change,) = (c for c in found.changes if (c.case, c.metric) == ("refined", metric))
    assert change.relative == pytest.approx(factor - 1) and change.p == pytest.approx(2 / 252)
    assert (abs(factor - 1) >= LEAST_CHANGE) == (better is not None)
    words = found.report()
    if better is False:
        assert f"| refined: {metric}" in words and "WORSE" in words and "0 better, 1 worse" in words


def test_samples_that_overlap_are_noise(result: dict[str, Any]) -> None:
    before = steady(result)
    after = scaled(before, "dense", "fps_end_to_end", 0.9)
    next(c for c in after["cases"] if c["name"] == "dense")["runs"][0]["fps_end_to_end"] *= 1.2
    assert not compare(before, after).worse


def test_gaps_and_counts(result: dict[str, Any]) -> None:
    before = steady(result)
    after = copy.deepcopy(before)
    for case in after["cases"]:
        for run in case["runs"]:
            run["gaps_ms"] = [gap * 5 for gap in run["gaps_ms"]]
            run["nfe"] += 1
        case["memory"]["planned_bytes"] -= 1
    found = compare(before, after)
    assert {(c.case, c.metric) for c in found.worse if c.metric != "nfe"} == {
        ("dense", "mean_gap_ms"), ("refined", "mean_gap_ms")
    }  # fmt: skip
    assert sum(c.metric == "nfe" for c in found.worse) == 4
    assert {c.metric for c in found.better} == {"planned_bytes"} and len(found.better) == 4


def test_what_is_not_compared(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    after["cases"][0]["case"]["frames"] = 45
    after["cases"][0]["made"]["frames"] = 45
    after["cases"][1]["made"]["dtype"] = "bfloat16"
    after["cases"][1]["case"]["about"] = "said in other words"
    del after["cases"][2]
    after["not_run"]["many"] = "no memory"
    found = compare(result, after)
    assert found.not_compared == {
        "dense": "frames was 33 and is 45", "refined": "dtype was 'float32' and is 'bfloat16'",
        "many": "the second file lacks it (no memory)",
    }  # fmt: skip
    assert {c.case for c in found.changes} == {"batch"}


def test_warnings(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    after["machine"]["cpu"], after["versions"]["torch"] = "another", "9.9"
    result["load_before"], after["load_before"] = 0.0, 50.0
    after["machine"]["clock_mhz"] = [1.0]
    said = compare(result, after).warnings
    assert said[0] == f"machine cpu was {result['machine']['cpu']!r} and is 'another'"
    assert said[1] == f"versions torch was {result['versions']['torch']!r} and is '9.9'"
    assert said[2].startswith("the machine was busy before the second file was made (load 50.0") and len(said) == 3


def test_exit_codes(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steady(result)
    results = {"a": before, "worse": scaled(before, "dense", "first_frame_ms", 1.5),
               "better": scaled(before, "dense", "first_frame_ms", 0.5), "old": before | {"schema": "dsa_rt.suite/0"}}
    for name, made in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(made))

    def code(second: str, *options: str) -> int:
        return main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / f"{second}.json"), *options])

    assert code("a") == 0 and code("better") == 0
    capsys.readouterr()
    assert code("worse") == 1
    assert "dense: first_frame_ms" in capsys.readouterr().out
    assert code("worse", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["exit_code"] == 1 and "Mann-Whitney" in record["rule"]
    assert next(row for row in record["changes"] if row["verdict"] == "worse")["relative"] == pytest.approx(0.5)
    assert code("old") == 2
    assert "schema is 'dsa_rt.suite/0'" in capsys.readouterr().err
    assert code("absent") == 2
