"""The paper's rule against a transcription of Algorithm 1, line by line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dsa_rt.errors import PolicyError
from dsa_rt.policy import DSA, Decider, fit_calibration

from .drive import drive
from .synthetic import synthetic_records


def algorithm_1(sigmoid_logit: Sequence[Sequence[float]], timesteps: int) -> list[int]:
    """dsa.md, Algorithm 1; sigmoid_logit[chunk][k] is what pass k + 1 would say."""
    counts = []
    prev = 1.0
    for chunk in sigmoid_logit:
        confidence, count = chunk[0], 1  # first pass
        if confidence < prev:
            for t in range(1, timesteps):  # refine
                confidence = chunk[t]
                count += 1
        prev = confidence  # of the last pass that ran
        counts.append(count)
    return counts


def algorithm_1_with_retest(sigmoid_logit: Sequence[Sequence[float]], timesteps: int) -> list[int]:
    counts = []
    prev = 1.0
    for chunk in sigmoid_logit:
        count = 0
        for confidence in chunk[:timesteps]:
            count += 1
            if not confidence < prev:
                break
        prev = confidence
        counts.append(count)
    return counts


def scripts(generator: np.random.Generator, count: int) -> list[tuple[int, list[list[float]]]]:
    """Confidences with many ties and many exact zeros and ones, or none of them."""
    result = []
    for _ in range(count):
        passes, chunks = int(generator.integers(1, 7)), int(generator.integers(1, 15))
        shape = (chunks, passes)
        coarse = generator.integers(0, int(generator.integers(2, 6)), shape)
        values = generator.random(shape) if generator.random() < 0.5 else coarse / max(coarse.max(), 1)
        result.append((passes, values.tolist()))
    return result


@pytest.mark.parametrize("retest", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_equals_the_transcription(retest: bool, always: bool, generator: np.random.Generator) -> None:
    transcription = algorithm_1_with_retest if retest else algorithm_1
    seen = set()
    for passes, confidence in scripts(generator, 3000):
        decider = DSA("paper", retest=retest).begin(passes, len(confidence), has_head=True)
        expected = transcription(confidence, passes)
        assert drive(decider, confidence, always=always) == expected, (passes, confidence)
        seen |= {(passes, count) for count in expected}
    if retest:  # the scripts reach every outcome
        assert {(4, 1), (4, 2), (4, 3), (4, 4)} <= seen
    else:
        assert {(4, 1), (4, 4)} <= seen and not {(4, 2), (4, 3)} & seen


def test_first_chunk_and_ties() -> None:
    def passes(confidence: list[list[float]]) -> list[int]:
        return drive(DSA("paper").begin(2, None, has_head=True), confidence)

    assert passes([[0.999, 0.3]]) == [2]  # refined whatever it says
    assert passes([[1.0, 0.3]]) == [1]  # but 1.0 < 1.0 does not hold
    assert passes([[0.5, 0.3], [0.3, 0.0]]) == [2, 1]  # equal is confident enough
    assert passes([[0.5, 0.0], [0.0, 0.0]]) == [2, 1]  # nothing is below 0


def test_head_is_read_only_where_its_value_is_used() -> None:
    decider = DSA("paper").begin(4, 2, has_head=True)
    assert [decider.wants_confidence(0, p) for p in (1, 2, 3, 4)] == [True, False, False, True]
    decider = DSA("paper", retest=True).begin(4, 2, has_head=True)
    assert all(decider.wants_confidence(1, p) for p in (1, 2, 3, 4))


def test_threshold_is_the_previous_chunks_confidence() -> None:
    decider = DSA("paper").begin(2, 3, has_head=True)
    assert decider.another_pass(0, 1, 0.6) and decider.threshold == 1.0
    assert not decider.another_pass(0, 2, 0.4) and decider.threshold is None
    assert not decider.another_pass(1, 1, 0.7) and decider.threshold == 0.4
    assert not decider.another_pass(2, 1, 0.7) and decider.threshold == 0.7


def test_auto_is_paper_without_a_calibration_and_calibrated_with_one() -> None:
    calibration = fit_calibration(synthetic_records(clips=8))
    with_one = DSA().begin(4, 7, calibration, has_head=True)
    assert type(with_one) is type(DSA("calibrated").begin(4, 7, calibration, has_head=True))
    for auto in (DSA().begin(4, 7, has_head=True), DSA("paper").begin(4, 7, calibration, has_head=True)):
        assert type(auto) is type(DSA("paper").begin(4, 7, has_head=True))


def test_refusals() -> None:
    with pytest.raises(PolicyError, match=r"no.*: use dense or fixed-N"):
        DSA("paper").begin(4, 7)
    with pytest.raises(PolicyError, match="0 passes"):
        DSA("paper").begin(0, 7, has_head=True)
    with pytest.raises(PolicyError, match="0 chunks"):
        DSA("paper").begin(4, 0, has_head=True)


@pytest.mark.parametrize("confidence", [float("nan"), -0.01, 1.01, float("inf")])
def test_damaged_confidence(confidence: float) -> None:
    with pytest.raises(PolicyError, match="expected 0 to 1"):
        DSA("paper").begin(4, 7, has_head=True).another_pass(0, 1, confidence)


def started() -> Decider:
    decider = DSA("paper").begin(3, 7, has_head=True)
    assert decider.another_pass(0, 1, 0.5)
    return decider


def test_faults_of_a_sampler_are_noticed() -> None:
    for chunk, passes in ((0, 1), (0, 3), (1, 1)):
        with pytest.raises(RuntimeError, match="expected pass 2 of chunk 0"):
            started().another_pass(chunk, passes, 0.5)
    decider = started()
    decider.another_pass(0, 2, None)
    with pytest.raises(PolicyError, match="needs a confidence after pass 3 of chunk 0"):
        decider.another_pass(0, 3, None)
