"""Budgets of the calibrated rule hold for any lengths, targets, calibrations and confidences."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

from dsa_rt.errors import PolicyError
from dsa_rt.policy import (
    DSA,
    Calibration,
    Cost,
    Records,
    clip_budget,
    fit_calibration,
    parse_policy,
    passes_for_fps,
)
from dsa_rt.policy.allocation import HORIZON

from .drive import drive
from .synthetic import synthetic_records


@pytest.fixture(scope="module")
def calibrations() -> dict[int, Calibration]:
    """By passes."""
    return {
        t: fit_calibration(synthetic_records(60, 5, t, seed=t, strength=0.9, spread=1.2)) for t in range(2, 7)
    }


def confidences(generator: np.random.Generator, chunks: int, passes: int) -> list[list[float]]:
    """Of one of several kinds: all low, all high, a level per clip, uniform, or near the calibration's."""
    values = generator.random((chunks, passes))
    kind = generator.integers(5)
    if kind < 2:
        values[:] = float(kind)
    elif kind == 2:
        values[:] = generator.random()
    elif kind == 4:
        values = 0.35 + 0.3 * values
    result: list[list[float]] = values.tolist()
    return result


@pytest.mark.parametrize("retest", [True, False])
@pytest.mark.parametrize("refine_first", [True, False])
def test_a_clips_budget_is_kept_and_spent(
    retest: bool, refine_first: bool, generator: np.random.Generator, calibrations: dict[int, Calibration]
) -> None:
    for _ in range(400):
        passes, chunks = int(generator.integers(2, 7)), int(generator.integers(1, 3 * HORIZON))
        least = chunks + (passes - 1) * refine_first
        budget = int(generator.integers(least, chunks * passes + 1))
        if generator.random() < 0.5:
            policy = DSA("calibrated", retest, model_calls=budget + chunks + 0.99, refine_first=refine_first)
            if budget == chunks * passes:
                policy = DSA("calibrated", retest, model_calls=budget + chunks, refine_first=refine_first)
        else:
            policy = DSA("calibrated", retest, passes_per_chunk=budget / chunks, refine_first=refine_first)
        script = confidences(generator, chunks, passes)
        taken = drive(policy.begin(passes, chunks, calibrations[passes], has_head=True), script)
        where = (policy, passes, chunks, budget, taken)
        assert min(taken) >= 1 and max(taken) <= passes, where
        assert taken[0] == passes or not refine_first, where
        if retest:
            assert sum(taken) == budget, where
        else:
            assert set(taken) <= {1, passes}, where
            assert budget - (passes - 1) < sum(taken) <= budget, where


def test_dense_budget_refines_everything(calibrations: dict[int, Calibration]) -> None:
    for retest in (True, False):
        policy = DSA("calibrated", retest, model_calls=35, refine_first=False)
        assert drive(policy.begin(4, 7, calibrations[4], has_head=True), [[1.0] * 4] * 7) == [4] * 7


@pytest.mark.parametrize("retest", [True, False])
def test_running_mean_of_an_endless_session(
    retest: bool, generator: np.random.Generator, calibrations: dict[int, Calibration]
) -> None:
    for _ in range(12):
        passes, chunks = int(generator.integers(2, 7)), 600
        target = float(generator.uniform(1, passes))
        decider = DSA("calibrated", retest, passes_per_chunk=target).begin(
            passes, None, calibrations[passes], has_head=True
        )
        taken = drive(decider, confidences(generator, chunks, passes))
        total, count = np.cumsum(taken), np.arange(1, chunks + 1)
        # Owed: at most the share of HORIZON chunks and the first. Saved: at most what HORIZON chunks take.
        assert (total <= target * count + (target - 1) * HORIZON + passes).all(), (target, passes)
        assert (total >= target * count - (passes - target) * HORIZON - passes).all(), (target, passes)


@pytest.mark.parametrize("chunks", [48, None])
@pytest.mark.parametrize("retest", [True, False])
def test_busy_spans_get_what_calm_ones_leave(chunks: int | None, retest: bool) -> None:
    records = synthetic_records(64, strength=1.0, clip_share=0.0, spread=1.2)
    policy = DSA("calibrated", retest, passes_per_chunk=2.2)
    decider = policy.begin(4, chunks, fit_calibration(records), has_head=True)
    taken = drive(decider, ([[0.8] * 4] * 6 + [[0.2] * 4] * 6) * 4)
    spans = np.array(taken).reshape(-1, 6)
    calm, busy = spans[2::2].mean(), spans[1::2].mean()
    assert busy > calm + 0.5


@pytest.mark.parametrize("retest", [True, False])
def test_a_long_clip_is_planned_as_a_whole(retest: bool, generator: np.random.Generator) -> None:
    """Halves of equal confidences get about equal passes, though only HORIZON chunks are looked ahead."""
    records = synthetic_records(64, strength=0.9, spread=1.2, seed=1)
    calibration = fit_calibration(records)
    half = 3 * HORIZON
    for _ in range(5):
        levels = np.quantile(records.confidence[:, 1:], (np.arange(half) + 0.5) / half, axis=(0, 1))
        script = np.concatenate([generator.permutation(levels) for _ in range(2)]).tolist()
        decider = DSA("calibrated", retest, passes_per_chunk=2.2).begin(
            4, 2 * half, calibration, has_head=True
        )
        taken = drive(decider, script)
        assert abs(np.mean(taken[1:half]) - np.mean(taken[half:])) < 1.0


def test_a_free_first_chunk_has_its_own_curves() -> None:
    """Its confidences are judged among first chunks', and its passes priced by what they remove there."""
    records = synthetic_records(64, strength=0.9, clip_share=0.0, persistence=0.0, spread=1.2)
    confidence = records.confidence.copy()
    confidence[:, 0] *= 0.2  # all below the later chunks'
    taken = []
    for factor in (0.2, 1.0, 5.0):
        error = records.error.copy()
        error[:, 0] *= factor
        calibration = fit_calibration(Records(confidence, error))
        policy = DSA("calibrated", model_calls=24, refine_first=False)
        deciders = [policy.begin(4, 7, calibration, has_head=True) for _ in confidence]
        taken.append(np.array([drive(*pair) for pair in zip(deciders, confidence.tolist(), strict=True)]))
    assert taken[0][:, 0].mean() < taken[0][:, 1:].mean() - 0.3
    assert taken[2][:, 0].mean() > taken[2][:, 1:].mean() + 0.3
    ranked = taken[1][np.argsort(confidence[:, 0, 0]), 0]
    assert ranked[:20].mean() > ranked[-20:].mean() + 0.3


@pytest.mark.parametrize("retest", [True, False])
def test_less_confidence_never_means_fewer_passes(
    retest: bool, generator: np.random.Generator, calibrations: dict[int, Calibration]
) -> None:
    open_decisions = 0
    for _ in range(150):
        passes, chunks = int(generator.integers(2, 7)), int(generator.integers(2, 24))
        budget = int(generator.integers(chunks + passes - 1, chunks * passes + 1))
        policy = DSA("calibrated", retest, model_calls=budget + chunks)
        decider = policy.begin(passes, chunks, calibrations[passes], has_head=True)
        for chunk in range(chunks):
            done, more = 0, True
            while more:
                done += 1
                low, high = np.sort(generator.uniform(0.2, 0.8, 2)).tolist()
                other = copy.copy(decider)  # its state is numbers
                more = decider.another_pass(chunk, done, high)
                less_sure = other.another_pass(chunk, done, low)
                assert less_sure >= more
                open_decisions += less_sure != more
                if decider.threshold is not None:
                    assert more == (high < decider.threshold)
    assert open_decisions > 20


def test_decisions_repeat_and_do_not_see_each_other(
    generator: np.random.Generator, calibrations: dict[int, Calibration]
) -> None:
    script = generator.uniform(0.3, 0.7, (11, 4)).tolist()
    policy = parse_policy("dsa-calibrated:passes=2.2")
    alone = drive(policy.begin(4, 11, calibrations[4], has_head=True), script)
    same = Calibration.from_dict(calibrations[4].to_dict())
    assert drive(policy.begin(4, 11, same, has_head=True), script) == alone
    pair = [policy.begin(4, 11, calibrations[4], has_head=True) for _ in range(2)]
    other = generator.random((11, 4)).tolist()
    together: list[int] = []
    for chunk in range(11):
        for decider, confidence in zip(pair, (script, other), strict=True):
            done, more = 0, True
            while more:
                done += 1
                more = decider.another_pass(chunk, done, confidence[chunk][done - 1])
            together += [done] if decider is pair[0] else []
    assert together == alone


def test_default_target_is_seventy_percent_of_dense_calls(generator: np.random.Generator) -> None:
    assert clip_budget(4, 7) + 7 == 24  # of 24.5
    for _ in range(200):
        passes, chunks = int(generator.integers(1, 9)), int(generator.integers(1, 60))
        dense, budget = chunks * (passes + 1), clip_budget(passes, chunks)
        least, most = chunks + passes - 1, chunks * passes
        assert budget == min(max(int(0.7 * dense + 1e-6) - chunks, least), most)
    assert clip_budget(4, None) == pytest.approx(2.5)


def seconds(cost: Cost, passes: float, chunks: int) -> float:
    """Of a whole clip, spelled out."""
    total = cost.clip_seconds
    for _ in range(chunks):
        total += cost.context_seconds + cost.chunk_seconds
    return total + passes * cost.pass_seconds


def test_fps_becomes_the_largest_budget_that_is_fast_enough(generator: np.random.Generator) -> None:
    refused = 0
    for _ in range(500):
        passes, chunks = int(generator.integers(1, 7)), int(generator.integers(1, 30))
        cost = Cost(
            *generator.uniform(0.01, 0.1, 3).tolist(),
            frames=float(generator.uniform(3, 12)),
            clip_seconds=0.05,
        )
        least = chunks + passes - 1
        frames = cost.frames * chunks
        fastest = frames / seconds(cost, least, chunks)
        fps = fastest * float(generator.uniform(0.3, 1.2))
        if fps > fastest:
            with pytest.raises(
                PolicyError, match=rf"fps={fps:g} cannot be met.*{fastest:.4g} frames per second"
            ):
                clip_budget(passes, chunks, fps=fps, cost=cost)
            refused += 1
            continue
        budget = clip_budget(passes, chunks, fps=fps, cost=cost)
        assert least <= budget <= chunks * passes
        assert frames / seconds(cost, budget, chunks) >= fps * (1 - 1e-6)
        if budget < chunks * passes:
            assert frames / seconds(cost, budget + 1, chunks) < fps
        assert budget <= passes_for_fps(fps, cost, passes, chunks) * chunks + 1e-6
    assert refused


def test_fps_of_an_endless_session() -> None:
    cost = Cost(pass_seconds=0.1, context_seconds=0.1, chunk_seconds=0.2, frames=12, clip_seconds=100)
    assert passes_for_fps(20, cost, 4, None) == pytest.approx((12 / 20 - 0.3) / 0.1)
    assert passes_for_fps(1, cost, 4, None) == 4  # faster than asked is fine
    with pytest.raises(PolicyError, match=r"fps=40 cannot be met: a session without end takes 17.14 to 30 "):
        passes_for_fps(40, cost, 4, None)


@pytest.mark.parametrize("chunks", [7, 3, None])
@pytest.mark.parametrize("refine_first", [True, False])
def test_an_unreachable_target_names_the_reachable_range(chunks: int | None, refine_first: bool) -> None:
    for target in ("passes_per_chunk", "model_calls"):
        if target == "model_calls" and chunks is None:
            with pytest.raises(PolicyError, match="needs passes= or fps="):
                clip_budget(4, chunks, model_calls=20)
            continue
        for bad in (0.5, 1000.0):
            with pytest.raises(PolicyError, match="cannot be met") as caught:
                clip_budget(4, chunks, refine_first=refine_first, **{target: bad})  # type: ignore[arg-type]
            found = re.search(r"takes ([\d.]+) to ([\d.]+) ", str(caught.value))
            assert found is not None
            least, most = map(float, found.groups())
            for good in (least, most):
                clip_budget(4, chunks, refine_first=refine_first, **{target: good})  # type: ignore[arg-type]
            for outside in (least - 0.02, most + 0.02):
                with pytest.raises(PolicyError, match="cannot be met"):
                    clip_budget(4, chunks, refine_first=refine_first, **{target: outside})  # type: ignore[arg-type]


def test_refusals(calibrations: dict[int, Calibration]) -> None:
    with pytest.raises(PolicyError, match="needs a calibration and this bundle has none: calibrate the head"):
        DSA("calibrated").begin(4, 7, has_head=True)
    for policy in (DSA(fps=16), DSA(refine_first=False)):  # what the paper's rule cannot do is not dropped
        with pytest.raises(PolicyError, match="needs a calibration"):
            policy.begin(4, 7, has_head=True)
    with pytest.raises(PolicyError, match="needs a confidence head"):
        DSA("calibrated").begin(4, 7, calibrations[4])
    with pytest.raises(PolicyError, match="calibration is for 3 passes, but 4 are scheduled"):
        DSA("calibrated").begin(4, 7, calibrations[3], has_head=True)
    with pytest.raises(PolicyError, match="fps=16 needs measured times"):
        DSA(fps=16).begin(4, 7, calibrations[4], has_head=True)
    assert DSA(fps=16).needs_cost and not DSA(model_calls=20).needs_cost


@pytest.mark.parametrize(
    "field", ["pass_seconds", "context_seconds", "chunk_seconds", "frames", "clip_seconds"]
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_cost(field: str, value: float) -> None:
    good = {
        "pass_seconds": 1.0,
        "context_seconds": 1.0,
        "chunk_seconds": 0.0,
        "frames": 12.0,
        "clip_seconds": 0.0,
    }
    Cost(**good)
    with pytest.raises(PolicyError, match=f"{field} is {value}"):
        Cost(**good | {field: value})


def test_head_is_not_read_where_the_answer_is_known(calibrations: dict[int, Calibration]) -> None:
    decider = DSA("calibrated", model_calls=17).begin(4, 7, calibrations[4], has_head=True)
    assert drive(decider, [[0.0] * 4] * 7) == [4, 1, 1, 1, 1, 1, 1]
    decider = DSA("calibrated", model_calls=24).begin(4, 7, calibrations[4], has_head=True)
    asked = [decider.wants_confidence(0, p) for p in (1, 2, 3, 4)]
    assert asked == [True, False, False, False]  # the first pass for the statistics alone
    for p, answer in ((1, True), (2, True), (3, True), (4, False)):
        assert decider.another_pass(0, p, 0.5 if p == 1 else None) is answer
        assert decider.threshold is None
    assert decider.another_pass(1, 1, 0.0) and decider.wants_confidence(1, 2)
    assert not decider.another_pass(1, 2, 1.0) and decider.threshold is not None
    decider = DSA("calibrated", model_calls=35).begin(4, 7, calibrations[4], has_head=True)
    script = [[0.5, -1.0, -1.0, -1.0]] * 7  # would be refused if read
    assert drive(decider, script) == [4] * 7
