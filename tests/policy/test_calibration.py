from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from dsa_rt.errors import BundleError, PolicyError
from dsa_rt.policy import Calibration, Records, fit_calibration
from dsa_rt.policy.calibration import monotone

from .synthetic import synthetic_records


def falling(values: list[float], weights: list[float]) -> list[float]:
    """Isotonic regression by its min-max formula."""

    def mean(i: int, j: int) -> float:
        return float(np.average(values[i : j + 1], weights=weights[i : j + 1]))

    count = len(values)
    return [min(max(mean(i, j) for j in range(k, count)) for i in range(k + 1)) for k in range(count)]


def test_monotone_is_isotonic_regression(generator: np.random.Generator) -> None:
    for _ in range(200):
        count = int(generator.integers(1, 12))
        values, weights = generator.normal(size=count), generator.uniform(0.1, 3, count)
        expected = falling(values.tolist(), weights.tolist())
        np.testing.assert_allclose(monotone(values, weights), expected, atol=1e-12)


def test_monotone_passes_over_what_has_no_weight() -> None:
    values, weights = np.array([9.0, 3.0, 7.0, 2.0, 5.0]), np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(monotone(values, weights), [3.0, 3.0, 3.0, 2.0, 2.0])
    np.testing.assert_array_equal(monotone(values, np.zeros(5)), np.zeros(5))


def test_curves_equal_a_plain_reading_of_the_records(generator: np.random.Generator) -> None:
    records = synthetic_records(20, 6, 4, seed=int(generator.integers(1 << 30)), strength=0.6)
    bins = 4
    fitted = fit_calibration(records, bins)
    confidence, error = records.confidence, records.error
    unit = [float(np.mean([error[i, j, 0] - error[i, j, 3] for j in range(1, 6)])) for i in range(20)]
    weight = [u / (u + 0.25 * float(np.mean(unit))) for u in unit]
    for curves, chunks in ((fitted.later, range(1, 6)), (fitted.first, range(1))):
        for p in range(3):
            ranked = sorted((confidence[i, j, p], i, j) for i in range(20) for j in chunks)
            groups = [ranked[len(ranked) * k // bins : len(ranked) * (k + 1) // bins] for k in range(bins)]
            for k, edge in enumerate(curves.edges[p]):
                assert groups[k][-1][0] < edge <= groups[k + 1][0][0]
            for row, end in ((curves.gain[p], p + 1), (curves.whole[p], 3)):
                means, weights = [], []
                for group in groups:
                    weights.append(sum(weight[i] for _, i, _ in group))
                    removed = [weight[i] * (error[i, j, p] - error[i, j, end]) / unit[i] for _, i, j in group]
                    means.append(sum(removed) / weights[-1])
                expected = [max(value, 0.0) for value in falling(means, weights)]
                np.testing.assert_allclose(row, expected, rtol=1e-7)

    def bin_of(i: int, j: int, p: int) -> int:
        return sum(confidence[i, j, p] >= edge for edge in fitted.later.edges[p])

    for p in range(2):
        table = np.zeros((bins, bins), int)
        for i in range(20):
            for j in range(1, 6):
                table[bin_of(i, j, p), bin_of(i, j, p + 1)] += 1
        assert [list(row) for row in fitted.level_counts[p]] == table.tolist()
    assert list(fitted.counts) == table_of_firsts(bin_of, bins)


def table_of_firsts(bin_of: Any, bins: int) -> list[int]:
    found = [bin_of(i, j, 0) for i in range(20) for j in range(1, 6)]
    return [found.count(k) for k in range(bins)]


def test_scale_of_the_error_does_not_matter() -> None:
    records = synthetic_records(24, seed=3)
    scaled = fit_calibration(Records(records.confidence, records.error * 1e-4))
    np.testing.assert_allclose(scaled.later.gain, fit_calibration(records).later.gain, rtol=1e-6)


def test_constant_confidences_still_fit() -> None:
    records = synthetic_records(12)
    for value in (0.0, 0.5, 1.0):
        calibration = fit_calibration(Records(np.full_like(records.confidence, value), records.error))
        assert Calibration.from_dict(calibration.to_dict()).by_pass == calibration.by_pass


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_json_round_trip(passes: int) -> None:
    for clips in (3, 64):
        calibration = fit_calibration(synthetic_records(clips, 7, passes))
        text = json.dumps(calibration.to_dict(), allow_nan=False)
        assert len(text) < 40_000
        back = Calibration.from_dict(json.loads(text))
        assert back == calibration
        assert back.by_pass == calibration.by_pass and back.by_chunk == calibration.by_chunk


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all members, containers and values."""
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(leaf for key, member in members for leaf in leaves(member, (*path, key)))]


JUNK = [None, True, -1, -0.5, 2.5, 10**400, float("nan"), float("inf"), "x", [], {}, [1], {"1": 2}]


def test_no_damage_gets_through(generator: np.random.Generator) -> None:
    """Any member replaced by anything: refused with BundleError, or a calibration that still solves."""
    original = fit_calibration(synthetic_records(8, 4, 3), 3).to_dict()
    paths = leaves(original)
    refused = 0
    for path in paths:
        for junk in [JUNK[i] for i in generator.permutation(len(JUNK))[:5]]:
            damaged: Any = copy.deepcopy(original)
            if not path:
                damaged = junk
            else:
                parent = damaged
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = junk
            try:
                _ = Calibration.from_dict(damaged).by_pass
            except BundleError as error:
                refused += 1
                assert "calibrat" in str(error)
    assert refused > 3 * len(paths)


@pytest.mark.parametrize(
    "key", ["format", "passes", "levels", "first_levels", "level_counts", "counts", "clips"]
)
def test_missing_members(key: str) -> None:
    data = fit_calibration(synthetic_records(8, 4, 3), 3).to_dict()
    del data[key]
    with pytest.raises(BundleError, match=f"'{key}' is missing"):
        Calibration.from_dict(data)


def test_lists_must_be_in_order() -> None:
    original = fit_calibration(synthetic_records(30), 5).to_dict()
    for name in ("confidence", "gain", "gain_of_all"):
        data = copy.deepcopy(original)
        data["levels"]["2"][name].reverse()
        with pytest.raises(BundleError, match=r"is not (rising|falling).*calibrate again"):
            Calibration.from_dict(data)
    data = copy.deepcopy(original)
    data["format"] = 2
    with pytest.raises(BundleError, match="format 2; this dsa_rt reads 1"):
        Calibration.from_dict(data)
    data = copy.deepcopy(original)
    data["passes"] = 10**12  # nothing of that size is made
    with pytest.raises(BundleError):
        Calibration.from_dict(data)


def test_nothing_to_decide() -> None:
    records = synthetic_records(8)
    with pytest.raises(PolicyError, match="refining removes nothing"):
        fit_calibration(Records(records.confidence, records.error[..., ::-1]))
    with pytest.raises(PolicyError, match="65 bins"):
        fit_calibration(records, 65)


@pytest.mark.parametrize(
    ("confidence", "error", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), "expected .clips, chunks, passes."),
        (np.zeros((2, 1, 4)), np.zeros((2, 1, 4)), "2 or more chunks"),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), "differ in shape"),
        (np.full((2, 3, 4), 1.5), np.zeros((2, 3, 4)), "confidence has values from 1.5"),
        (np.full((2, 3, 4), np.nan), np.zeros((2, 3, 4)), "confidence has values from nan"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), -1.0), "error has values from -1.0"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), np.inf), "error has values from inf"),
    ],
)
def test_bad_records(confidence: np.ndarray, error: np.ndarray, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Records(confidence, error)


def test_records_round_trip() -> None:
    records = synthetic_records(5)
    back = Records.from_dict(json.loads(json.dumps(records.to_dict())))
    np.testing.assert_allclose(back.confidence, records.confidence, rtol=1e-5)
    np.testing.assert_allclose(back.error, records.error, rtol=1e-5)
    np.testing.assert_array_equal(records.select(slice(1, 3)).error, records.error[1:3])
    for junk in (
        None,
        [],
        {},
        {"confidence": [1], "error": [1]},
        {"confidence": [[[1], [1, 2]]], "error": 3},
    ):
        with pytest.raises(BundleError):
            Records.from_dict(junk)
