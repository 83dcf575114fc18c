from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsa_rt.errors import PolicyError
from dsa_rt.policy import DSA, NAMES, Fixed, Policy, parse_policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("dense", Fixed()),
        ("fixed-2", Fixed(2)),
        ("fixed-4-then-1", Fixed(1, first=4)),
        ("fixed-2-then-all", Fixed(first=2)),
        ("dsa", DSA()),
        ("dsa-paper", DSA("paper")),
        ("dsa-paper", DSA("paper", retest=False)),
        ("dsa-paper-retest", DSA("paper", retest=True)),
        ("dsa-calibrated", DSA("calibrated")),
        ("dsa-calibrated", DSA("calibrated", retest=True)),
        ("dsa-calibrated-retest", DSA("calibrated", retest=True)),
        ("dsa-calibrated:retest=no", DSA("calibrated", retest=False)),
        ("dsa-calibrated:passes=2.5", DSA("calibrated", passes_per_chunk=2.5)),
        ("dsa-calibrated:calls=24", DSA("calibrated", model_calls=24)),
        ("dsa:fps=16", DSA(fps=16)),
        ("dsa:fps=16,first=free", DSA(fps=16, refine_first=False)),
        ("dsa:first=all", DSA()),
        ("dsa:retest,calls=20", DSA(retest=True, model_calls=20)),
        (" DSA-Calibrated : Passes = 2.5 , ReTest=Yes ", DSA("calibrated", passes_per_chunk=2.5)),
    ],
)
def test_meaning(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(text.upper()) == policy
    assert parse_policy(policy) is policy


def test_names_round_trip(generator: np.random.Generator) -> None:
    names = set()
    for _ in range(2000):
        policy: Policy
        if generator.random() < 0.3:
            counts = [None, 1, 2, 17]
            policy = Fixed(counts[generator.integers(4)], counts[generator.integers(4)])
        else:
            rule = ("auto", "paper", "calibrated")[generator.integers(3)]
            options: dict[str, Any] = {"retest": (None, False, True)[generator.integers(3)]}
            if rule != "paper":
                target = (None, "passes_per_chunk", "model_calls", "fps")[generator.integers(4)]
                value = float(
                    generator.integers(1, 50) if generator.random() < 0.5 else generator.random() * 9 + 0.1
                )
                options |= {target: value} if target else {}
                options["refine_first"] = bool(generator.integers(2))
            policy = DSA(rule, **options)
        assert parse_policy(policy.name) == policy, policy.name
        names.add(policy.name)
    assert len(names) > 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dsa-calibratd", ["did you mean 'dsa-calibrated'", *NAMES]),
        ("dens", ["did you mean 'dense'"]),
        ("hsa_x", ["unknown policy 'hsa_x'", *NAMES]),
        ("", ["unknown policy ''"]),
        ("fixed-", ["unknown policy", "fixed-N"]),
        ("fixed-two", ["unknown policy"]),
        ("fixed-1-then-", ["unknown policy"]),
        ("fixed-0", ["passes is 0", "1 or more"]),
        ("fixed-2:retest", ["takes no options"]),
        ("dense:", ["takes no options"]),
        ("dsa:", ["option '' is not known", "calls="]),
        ("dsa:call=24", ["option 'call=24' is not known", "did you mean 'calls='"]),
        ("dsa:calls", ["option 'calls' is not known"]),
        ("dsa:calls=many", ["calls is 'many'", "number"]),
        ("dsa:calls=", ["calls is ''"]),
        ("dsa:calls=nan", ["model_calls is nan", "above 0"]),
        ("dsa:fps=inf", ["fps is inf"]),
        ("dsa:passes=-1", ["passes_per_chunk is -1"]),
        ("dsa:passes=0", ["passes_per_chunk is 0"]),
        ("dsa:passes=2,passes=3", ["passes is stated twice"]),
        ("dsa:passes=2,calls=20", ["one target"]),
        ("dsa:retest=maybe", ["'retest=maybe' is not known"]),
        ("dsa:retest=", ["'retest=' is not known"]),
        ("dsa-paper-retest:retest=no", ["retest is stated twice"]),
        ("dsa-paper:fps=16", ["fps is for the calibrated rule"]),
        ("dsa-paper:first=free", ["refine_first=False is for the calibrated rule"]),
    ],
)
def test_errors_say_what_to_do(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("junk", [None, 3, b"dense", ["dense"]])
def test_not_a_name(junk: object) -> None:
    with pytest.raises(PolicyError, match="expected a name"):
        parse_policy(junk)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "printed"},
        {"retest": "yes"},
        {"refine_first": 0},
        {"fps": True},
        {"fps": "16"},
        {"model_calls": float("nan")},
        {"fps": 16, "model_calls": 24},
        {"rule": "paper", "fps": 16},
    ],
)
def test_bad_construction(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"^DSA: "):
        DSA(**options)
