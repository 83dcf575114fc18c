from __future__ import annotations

import pytest

from dsa_rt.errors import PolicyError
from dsa_rt.policy import Fixed

from .drive import drive


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Fixed(), [4, 4, 4]),
        (Fixed(1), [1, 1, 1]),
        (Fixed(3), [3, 3, 3]),
        (Fixed(4), [4, 4, 4]),
        (Fixed(1, first=4), [4, 1, 1]),
        (Fixed(2, first=4), [4, 2, 2]),
        (Fixed(3, first=2), [2, 3, 3]),
        (Fixed(first=1), [1, 4, 4]),
    ],
)
@pytest.mark.parametrize("chunks", [3, None])
def test_counts(policy: Fixed, expected: list[int], chunks: int | None) -> None:
    decider = policy.begin(4, chunks)  # needs no head
    assert drive(decider, [[0.0] * 4] * 3) == expected
    assert drive(policy.begin(4, chunks), [[1.0] * 4] * 3, always=True) == expected
    assert not any(decider.wants_confidence(chunk, p) for chunk in (0, 1) for p in (1, 2, 3, 4))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "2"])
@pytest.mark.parametrize("field", ["passes", "first"])
def test_bad_counts(field: str, bad: object) -> None:
    with pytest.raises(PolicyError, match=f"{field} is"):
        Fixed(**{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [Fixed(5), Fixed(2, first=5)])
def test_more_than_scheduled(policy: Fixed) -> None:
    with pytest.raises(PolicyError, match=r"asks for 5 passes, but 4 are scheduled: ask for 1 to 4"):
        policy.begin(4, 7)


def test_one_policy_one_spelling() -> None:
    assert Fixed(2, first=2) == Fixed(2) and Fixed(2, first=2).name == "fixed-2"
