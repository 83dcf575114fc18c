"""HSA's numbers against loops over steps and tokens, its choice of tokens, its names, and what it refuses."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from dsa_rt.bundle import describe_plan
from dsa_rt.errors import PolicyError
from dsa_rt.policy import HSA, Fixed, StepPlan, parse_policy
from dsa_rt.policy.hsa import OURS, PRESETS, SELECTIONS, default_strength


def random_policy(generator: np.random.Generator, **options: Any) -> tuple[HSA, int]:
    """Two to four groups on a random schedule, and its T."""
    steps = int(generator.choice([8, 12, 20, 30, 40, 48]))
    divisors = [n for n in range(1, steps) if steps % n == 0]
    count = int(generator.integers(1, min(4, len(divisors))))
    budgets = [steps, *generator.choice(divisors, count, replace=False).tolist()]
    cuts = sorted(generator.choice(np.arange(1, 100), count, replace=False).tolist())
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
    window = float(generator.integers(1, 101)) / 100
    groups = tuple((share / 100, budget) for share, budget in zip(shares, budgets, strict=True))
    return HSA(groups, **({"window": window, "selection": "random"} | options)), steps


def loops(policy: HSA, plan: StepPlan, full: tuple[int, ...] = ()) -> list[list[bool]]:
    """[step][group]: whether the group is computed, from the definition, in decimals."""
    steps = plan.steps
    margin = int((1 - Decimal(str(policy.window))) * steps / 2)
    return [
        [i < margin or i >= steps - margin or i in full or i % (steps // budget) == 0 for _, budget in policy.groups]
        for i in range(steps)
    ]


@pytest.mark.parametrize(
    ("window", "steps", "margin"), [(0.8, 40, 4), (0.8, 20, 2), (0.5, 40, 10), (1.0, 40, 0), (0.9, 40, 2), (0.7, 20, 3)]
)
def test_margins_are_exact(window: float, steps: int, margin: int) -> None:
    assert HSA(((1, steps),), window=window).margin(steps) == margin


def test_margins_against_decimals(generator: np.random.Generator) -> None:
    for _ in range(500):
        digits, steps = int(generator.integers(1, 5)), int(generator.integers(1, 200))
        window = Decimal(int(generator.integers(1, 10**digits + 1))) / 10**digits
        assert HSA(((1.0, 1),), window=float(window)).margin(steps) == int((1 - window) * steps / 2)


@pytest.mark.parametrize(
    ("name", "steps", "share", "of_forty"),
    [("hsa-75a", 40, 0.75, 0.75), ("hsa-75b", 40, 0.74875, 0.74875), ("hsa-50", 40, 0.496, 0.496),
     ("hsa-25", 20, 0.496, 0.248)],
)  # fmt: skip
def test_presets_have_the_published_cost(name: str, steps: int, share: float, of_forty: float) -> None:
    policy = parse_policy(name)
    assert isinstance(policy, HSA) and policy.steps == steps and policy.name == name
    plan = policy.plan(steps, 100_000, 1000)
    assert plan.token_step_share == pytest.approx(share, abs=1e-9)
    assert plan.token_step_share * steps / 40 == pytest.approx(of_forty, abs=1e-9)
    assert plan.counts[0] == plan.counts[-1] == 100_000 and plan.passes == steps
    assert policy == HSA(policy.groups, policy.window, policy.selection)  # steps follow from the baseline


@pytest.mark.parametrize("trial", range(30))
def test_counts_against_loops(generator: np.random.Generator, trial: int) -> None:
    policy, steps = random_policy(generator)
    tokens, fixed = int(generator.integers(20, 400)), int(generator.integers(0, 9))
    full = tuple(generator.choice(steps, int(generator.integers(0, 3))).tolist())
    plan = policy.plan(steps, tokens, 7, fixed=fixed, full=full)
    assert sum(plan.sizes) + fixed == tokens
    for size, (share, _) in zip(plan.sizes, policy.groups, strict=True):
        assert abs(size - share * (tokens - fixed)) < 1
    computed = loops(policy, plan, full)
    sizes = dict(enumerate(plan.sizes))
    for step, groups in enumerate(computed):
        moving = sum(size for group, size in sizes.items() if groups[group])
        everyone = moving == tokens - fixed
        assert plan.counts[step] == moving + (fixed if everyone else 0)
        assert plan.is_full(step) == everyone and plan.is_partial(step) == (0 < moving < tokens - fixed)
        later = [i for i in range(step + 1, steps) if plan.counts[i]]
        assert plan.keeps(step) == (bool(later) and plan.is_partial(later[0]))
    assert plan.token_step_share == pytest.approx(sum(plan.counts) / (tokens * steps))
    # K/V survive for whom some partial step reads without making them: conditions, and groups that it skips.
    partial = [step for step in range(steps) if plan.is_partial(step)]
    read = [size for group, size in sizes.items() if any(not computed[step][group] for step in partial)]
    assert plan.kept_rows == sum(read) + (fixed if partial else 0)
    if partial and plan.sizes[0]:
        assert plan.kept_rows <= tokens - plan.sizes[0]
    rows = [list(part) for _, part in plan.layout]
    assert [row for part in rows for row in part] == list(range(tokens))


def test_sizes_by_largest_remainder() -> None:
    assert HSA(((0.34, 4), (0.33, 2), (0.33, 1)), selection="random").plan(4, 10, 2).sizes == (4, 3, 3)
    assert HSA(((0.16, 4), (0.84, 1)), selection="random").plan(4, 3, 2).sizes == (0, 3)
    thirds = HSA(((1 / 3, 4), (1 / 3, 2), (1 / 3, 1)), selection="random")
    assert sorted(thirds.plan(4, 1001, 2).sizes) == [333, 334, 334]


def test_groups_come_in_any_order_and_once() -> None:
    assert HSA(((0.84, 10), (0.16, 40))) == HSA([[0.16, 40], [0.84, 10]]) == HSA()  # type: ignore[arg-type]
    assert HSA().name == "hsa-50" and hash(HSA()) == hash(parse_policy("hsa"))


def test_every_budget_full_is_dense() -> None:
    for groups in (((1, 40),), ((0.5, 40), (0.5, 40)), ((0.1, 40), (0.2, 40), (0.7, 40))):
        plan = HSA(groups).plan(40, 77, 7)
        assert plan.counts == StepPlan.dense(40, 77).counts == (77,) * 40
        assert not plan.stale and not plan.scoring and plan.kept_rows == 0 and plan.token_step_share == 1


def test_window_only() -> None:
    """The ablation: one group with a quarter of the steps. Steps without tokens have no pass, and nothing is kept."""
    policy = parse_policy("hsa:groups=1@10")
    assert isinstance(policy, HSA) and policy.steps is None
    plan = policy.plan(40, 99, 9)
    assert list(plan.counts[4:36]) == [99, 0, 0, 0] * 8 and set(plan.counts[:4]) == {99}
    assert plan.passes == 16 and plan.token_step_share == 0.4 and plan.kept_rows == 0
    assert not any(plan.keeps(step) for step in range(40))


def test_presets_of_our_own() -> None:
    """Named by their share; whole steps, so no K/V is kept."""
    for name, policy in OURS.items():
        plan = policy.plan(40, 336, 16)
        assert policy.name == name and f"window-{100 * plan.token_step_share:.0f}" == name
        assert plan.kept_rows == 0 and set(plan.counts) == {0, 336}
        assert describe_plan(policy, plan, {})["selection"] is None  # no token is chosen


@pytest.mark.parametrize("name", PRESETS)
def test_dynamic_plans(name: str) -> None:
    """Scores of the margin's steps but the first; whole K/V are kept only where the next step is partial at once."""
    policy = PRESETS[name]
    assert policy.steps is not None
    plan = policy.plan(policy.steps, 1000, 50)
    margin = policy.margin(policy.steps)
    assert plan.scoring == (range(1, margin) if policy.selection == "dynamic" else range(0))
    assert plan.captures == name.startswith("hsa-75")  # at T/s = 4: step 10 is partial, step 4 is full
    assert plan.kept_rows == (1000 if plan.captures else 1000 - plan.sizes[0])


# Who is in which group


def groups_of(policy: HSA, plan: StepPlan, moving: np.ndarray, seed: int, scores: Any = None) -> list[np.ndarray]:
    """The groups, baseline first."""
    order = policy.order(plan, moving, seed, scores)
    assert sorted(order.tolist()) == moving.tolist()
    parts = np.split(order, np.cumsum(plan.sizes[::-1])[:-1])
    for part in parts:
        assert (np.diff(part) > 0).all()
    return parts[::-1]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("trial", range(6))
def test_groups(generator: np.random.Generator, selection: str, trial: int) -> None:
    policy = HSA(((0.25, 40), (0.25, 20), (0.5, 10)), window=0.5, selection=selection)
    tokens, fixed = int(generator.integers(90, 300)), int(generator.integers(0, 5))
    plan = policy.plan(40, tokens, 20, fixed=fixed)
    moving = np.arange(fixed, tokens)
    scores = generator.random(tokens).astype(np.float32)
    parts = groups_of(policy, plan, moving, 3, scores)
    assert tuple(len(part) for part in parts) == plan.sizes
    if selection == "dynamic":
        assert scores[parts[2]].max() <= scores[parts[1]].min() <= scores[parts[1]].max() <= scores[parts[0]].min()
    if selection == "uniform":
        gaps = np.diff(parts[0])
        assert gaps.max() - gaps.min() <= 1 and parts[0][0] - fixed <= gaps.max()
    if selection == "random-first-frame":
        assert set(range(fixed, 20)) <= set(parts[0].tolist())
    if selection.startswith("random"):
        again, other = groups_of(policy, plan, moving, 3), groups_of(policy, plan, moving, -4)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        assert not np.array_equal(parts[0], other[0])


def test_random_groups_are_drawn_evenly() -> None:
    """Every token is in the baseline about as often; and the draw is the same on every machine and version."""
    policy = HSA(((0.25, 4), (0.75, 1)), selection="random")
    plan, moving = policy.plan(4, 40, 4), np.arange(40)
    counts = np.zeros(40)
    for seed in range(2000):
        counts[groups_of(policy, plan, moving, seed)[0]] += 1
    assert abs(counts - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert groups_of(policy, plan, moving, 7)[0].tolist() == [0, 5, 9, 10, 13, 15, 27, 32, 35, 39]


def test_equal_scores_go_by_token() -> None:
    policy = HSA(((0.5, 8), (0.5, 2)), window=0.5)
    parts = groups_of(policy, policy.plan(8, 6, 2), np.arange(6), 0, np.ones(6, np.float32))
    assert [part.tolist() for part in parts] == [[3, 4, 5], [0, 1, 2]]


# Names


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("hsa", HSA()),
        ("hsa-50", HSA(((0.16, 40), (0.84, 10)), 0.8, "dynamic")),
        (" HSA-75A : selection = Uniform ", HSA(((0.25, 40), (0.25, 20), (0.5, 10)), 0.5, "uniform")),
        ("hsa:groups=0.16@20+0.84@5,selection=random", HSA(((0.16, 20), (0.84, 5)), selection="random")),
        (
            "hsa:groups=0.16@40+0.84@10,window=0.8,selection=random,update=extrapolated",
            HSA(selection="random", update="extrapolated"),
        ),
        ("hsa-25:update=extrapolated,strength=0.5",
         HSA(((0.16, 20), (0.84, 5)), selection="random", update="extrapolated", strength=0.5)),
        ("hsa:groups=1@10,steps=40", HSA(((1, 10),), steps=40)),
        ("window-55", HSA(((1, 20),), 0.9, update="extrapolated", steps=40)),
        ("window-75:update=held", HSA(((1, 20),), 0.5, steps=40)),
        ("window-75:groups=1@10,steps=40", HSA(((1, 10),), 0.5, update="extrapolated", steps=40)),
        ("hsa-25:groups=0.5@8+0.5@2", HSA(((0.5, 8), (0.5, 2)), selection="random")),
    ],
)  # fmt: skip
def test_meaning(text: str, policy: HSA) -> None:
    assert parse_policy(text) == policy and parse_policy(policy.name) == policy and parse_policy(policy) is policy


def test_names_round_trip(generator: np.random.Generator) -> None:
    names = set()
    for _ in range(500):
        options: dict[str, Any] = {"selection": SELECTIONS[generator.integers(4)]}
        if generator.random() < 0.5:
            options["update"] = "extrapolated"
            options["strength"] = None if generator.random() < 0.5 else float(generator.random() + 0.01)
        if generator.random() < 0.3:
            preset = list(PRESETS.values())[generator.integers(4)]
            policy = HSA(preset.groups, preset.window, **options)
        elif generator.random() < 0.3:
            steps = None if generator.random() < 0.5 else 40 * 9 * 7
            policy = HSA(((1, int(generator.integers(1, 9))),), steps=steps, **options)
        else:
            policy, _ = random_policy(generator, **options)
        assert parse_policy(policy.name) == policy, policy.name
        names.add(policy.name)
    assert len(names) > 100


def test_default_strength() -> None:
    assert default_strength(2, 40) == default_strength(2, 20) == default_strength(3, 80) == 1
    assert default_strength(4, 40) == 0.5 and default_strength(4, 20) == 0.25 and default_strength(10, 40) == 0.2
    assert HSA().strengths(40) == (0, 0)
    assert HSA(update="extrapolated").strengths(40) == (1, 0.5)
    assert parse_policy("hsa-25:update=extrapolated").strengths(20) == (1, 0.25)  # type: ignore[attr-defined]
    assert HSA(update="extrapolated", strength=0.25).strengths(40) == (0.25, 0.25)


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": ()}, ["groups are ()", "pairs"]),
        ({"groups": "0.5@40"}, ["expected pairs"]),
        ({"groups": ((0.5, 40, 1), (0.5, 20))}, ["expected pairs"]),
        ({"groups": ((0.5, 40), (0.4, 20))}, ["sum to 0.9", "expected 1"]),
        ({"groups": ((0.5, 40), (0.5, 40), (0.5, 20))}, ["sum to 1.5"]),
        ({"groups": ((0, 40), (1, 20))}, ["share of 0"]),
        ({"groups": ((-0.5, 40), (1.5, 20))}, ["share of -0.5"]),
        ({"groups": ((True, 40),)}, ["share of True"]),
        ({"groups": ((float("nan"), 40),)}, ["share of nan"]),
        ({"groups": ((0.5, 40), (0.5, 0))}, ["budget of 0", "1 or more"]),
        ({"groups": ((0.5, 40), (0.5, 10.0))}, ["budget of 10.0"]),
        ({"groups": ((0.5, 40), (0.5, 15))}, ["15 steps does not divide T = 40", "1, 2, 4, 5, 8, 10, 20, 40"]),
        ({"steps": 20}, ["does not divide T = 20", "1, 2, 4, 5, 10, 20"]),
        ({"steps": 80}, ["baseline group has a budget of 40 steps, but T is 80", "groups=0.16@80+0.84@20"]),
        ({"steps": 0}, ["steps is 0"]),
        ({"groups": ((1, 12),), "steps": 40}, ["12 steps does not divide T = 40"]),
        ({"window": 0}, ["window is 0", "up to 1"]),
        ({"window": 1.1}, ["window is 1.1"]),
        ({"window": True}, ["window is True"]),
        ({"window": "0.8"}, ["window is '0.8'"]),
        ({"selection": "best"}, ["selection is 'best'", *SELECTIONS]),
        ({"update": "linear"}, ["update is 'linear'", "held, extrapolated"]),
        ({"strength": 0.5}, ["strength=0.5 is for update='extrapolated'"]),
        ({"update": "extrapolated", "strength": 0}, ["strength is 0"]),
        ({"update": "extrapolated", "strength": float("inf")}, ["strength is inf"]),
    ],
)
def test_bad_construction(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PolicyError, match=r"^HSA: ") as caught:
        HSA(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hsa-51", ["unknown policy", "did you mean 'hsa-5"]),
        ("hsa:", ["option '' is not known", "groups="]),
        ("hsa-50:budget=3", ["option 'budget=3' is not known"]),
        ("hsa-50:window", ["option 'window' is not known", "did you mean 'window='"]),
        ("hsa-50:window=wide", ["window is 'wide'", "number"]),
        ("hsa-50:window=0.8,window=0.5", ["window is stated twice"]),
        ("hsa:groups=0.5@40+0.5", ["'0.5' is not a group", "share@steps"]),
        ("hsa:groups=0.5@40+0.5@ten", ["budget is 'ten'", "whole number"]),
        ("hsa:groups=half@40+0.5@10", ["share is 'half'"]),
        ("hsa:groups=0.5@40+0.5@12", ["12 steps does not divide T = 40"]),
        ("hsa-50:steps=2.5", ["steps is '2.5'"]),
        ("hsa-50:steps=20", ["does not divide T = 20", "hsa-25:selection=dynamic is the same in 20 steps"]),
        ("hsa-75a:steps=20", ["hsa:groups=0.25@20+0.25@10+0.5@5,window=0.5 is the same in 20 steps"]),
        ("hsa-50:selection=best", ["selection is 'best'"]),
    ],
)
def test_names_that_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("window", "steps", "enough"), [(0.8, 8, 20), (0.9, 20, 40), (0.5, 4, 8), (0.95, 40, 80)])
def test_too_few_steps_to_score(window: float, steps: int, enough: int) -> None:
    """The message names the least T that would do, and the policy on it; that works, and nothing less."""
    policy = HSA(((0.2, steps), (0.8, steps // 4)), window=window)
    with pytest.raises(PolicyError, match=f"T = {steps} .*T = {enough} would do") as caught:
        policy.plan(steps, 100, 10)
    assert "or selection=random" in str(caught.value)
    advised = parse_policy(str(caught.value).partition("would do (")[2].partition(")")[0])
    assert isinstance(advised, HSA) and len(advised.plan(enough, 100, 10).scoring) >= 1
    for fewer in range(4, enough, 4):
        with pytest.raises(PolicyError, match="dynamic selection"):
            HSA(((0.2, fewer), (0.8, fewer // 4)), window=window).plan(fewer, 100, 10)
    HSA(((0.2, steps), (0.8, steps // 4)), window=window, selection="random").plan(steps, 100, 10)


def test_no_full_steps_to_score() -> None:
    with pytest.raises(PolicyError, match="there are none; use a window below 1, or selection=random"):
        HSA(window=1).plan(40, 100, 10)


def test_a_first_frame_larger_than_the_baseline() -> None:
    policy = HSA(selection="random-first-frame")
    with pytest.raises(PolicyError, match=r"has 20 tokens, but the baseline group has 16: raise its share to 0\.2 "):
        policy.plan(40, 100, 20)
    HSA(((0.2, 40), (0.8, 10)), selection="random-first-frame").plan(40, 100, 20)
    assert policy.plan(40, 100, 20, fixed=20).sizes == (13, 67)  # conditions need no place


def test_plans_and_deciders_that_cannot_be() -> None:
    with pytest.raises(PolicyError, match="100 of 100 tokens are conditions"):
        HSA().plan(40, 100, 10, fixed=100)
    with pytest.raises(PolicyError, match=r"policy hsa-50 allocates .* use dsa, dense or fixed-N .*demo-many-step"):
        HSA().begin(4, 7)
    assert HSA() != Fixed()
