"""HSA against the same run written out in fp64 with a dictionary of keys and values by token, and through the face."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_wan import token_positions
from tiny import make_model, randomise
from torch import Tensor

from dsa_rt import reference
from dsa_rt.cli import main
from dsa_rt.errors import MemoryLimitError, OptionError, PolicyError, ShapeError
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid
from dsa_rt.policy import HSA, StepPlan
from dsa_rt.runtime import Runtime
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.ode import Expert, solve, switch_step
from dsa_rt.sampler.rollout import DenoisedChunk
from dsa_rt.schedule import euler_sigmas
from dsa_rt.sync import PlacedKV

GRID, FRAMES = TokenGrid(1, 5), range(3)  # 15 tokens
PROMPT = "a red square bouncing"
Pair = tuple[Tensor, Tensor]


class Plain:
    """Wan in fp64 with keys and values of every token in a dictionary: no active set, no cache, no order of rows."""

    def __init__(self, model: WanModel, text: Tensor) -> None:
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads, self.dim, self.layers = model.config.heads, model.config.dim, model.config.layers
        self.positions = token_positions(list(FRAMES), GRID.height, GRID.width).double()
        self.kv: dict[tuple[int, int], Pair] = {}
        hidden = F.gelu(self.linear("text_embedding.0", text.double()), approximate="tanh")
        self.context = self.linear("text_embedding.2", hidden)[0]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]

    def rotate(self, x: Tensor, tokens: list[int]) -> Tensor:
        pairs = x.shape[-1] // 2
        sizes = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        turns = [
            self.positions[tokens, axis] / 10000.0 ** (pair / size)
            for axis, size in enumerate(sizes)
            for pair in range(size)
        ]
        rotation = torch.polar(torch.ones(len(tokens), pairs, dtype=torch.float64), torch.stack(turns, -1))
        turned = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).contiguous()) * rotation[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def velocity(self, rows: Tensor, tokens: list[int], timesteps: list[float]) -> Tensor:
        """Rows [A, P] of these tokens at these timesteps -> velocity [A, P]; their K/V replace those they had."""
        half = self.weights["time_embedding.0.weight"].shape[1] // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.tensor(timesteps, dtype=torch.float64)[:, None] * frequency
        time = self.linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], -1))
        time = self.linear("time_embedding.2", F.silu(time))
        modulation = self.linear("time_projection.1", F.silu(time)).unflatten(-1, (6, -1))
        split: Callable[[Tensor], Tensor] = lambda x: x.unflatten(-1, (self.heads, -1))  # noqa: E731
        norm: Callable[[Tensor], Tensor] = lambda x: F.layer_norm(x, (self.dim,), eps=1e-6)  # noqa: E731
        x = self.linear("patch_embedding", rows)
        for layer in range(self.layers):
            block = f"blocks.{layer}"
            m = (modulation + self.weights[f"{block}.modulation"]).unbind(1)
            name, h = f"{block}.self_attn", norm(x) * (1 + m[1]) + m[0]
            q = self.rotate(split(self.rms(f"{name}.norm_q", self.linear(f"{name}.q", h))), tokens)
            k = self.rotate(split(self.rms(f"{name}.norm_k", self.linear(f"{name}.k", h))), tokens)
            v = split(self.linear(f"{name}.v", h))
            self.kv |= {(layer, token): (k[row], v[row]) for row, token in enumerate(tokens)}
            known = [self.kv[layer, token] for token in range(len(self.positions))]
            keys, values = (torch.stack(part) for part in zip(*known, strict=True))
            x = x + m[2] * self.linear(f"{name}.o", self.attend(q, keys, values))
            name = f"{block}.cross_attn"
            h = norm(x) * self.weights[f"{block}.norm3.weight"] + self.weights[f"{block}.norm3.bias"]
            q = split(self.rms(f"{name}.norm_q", self.linear(f"{name}.q", h)))
            k = split(self.rms(f"{name}.norm_k", self.linear(f"{name}.k", self.context)))
            x = x + self.linear(f"{name}.o", self.attend(q, k, split(self.linear(f"{name}.v", self.context))))
            h = F.gelu(self.linear(f"{block}.ffn.0", norm(x) * (1 + m[4]) + m[3]), approximate="tanh")
            x = x + m[5] * self.linear(f"{block}.ffn.2", h)
        shift, scale = (time[:, None] + self.weights["head.modulation"]).unbind(1)
        return self.linear("head.head", norm(x) * (1 + scale) + shift)


@dataclass
class Written:
    """The run that was written out: its latents [N, P], and of each step the tokens and the K/V of each branch."""

    x: Tensor
    tokens: list[list[int]] = field(default_factory=list)
    kv: list[list[dict[tuple[int, int], Pair]]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


def write_out(
    policy: HSA, experts: Sequence[Sequence[Plain]], sigmas: Sequence[float], guidance: float, seed: int, noise: Tensor,
    *, boundary: float = 0.0, fixed: dict[int, Tensor] | None = None, extra: Tensor | None = None,
) -> Written:  # fmt: skip
    """HSA token by token. experts: for each (conditional, unconditional), the latter only under guidance; fixed: clean
    rows of conditions; extra [N, cells, channels]: further input channels of each patch element."""
    fixed = fixed or {}
    steps, count = len(sigmas) - 1, len(noise)
    margin = policy.margin(steps)
    switch = next((i for i in range(steps) if sigmas[i] < boundary), None) if len(experts) > 1 else None
    moving = [token for token in range(count) if token not in fixed]
    plan = policy.plan(steps, count, GRID.tokens, fixed=len(fixed), full=() if switch is None else (switch,))
    run = Written(noise.double().clone())
    for token, row in fixed.items():
        run.x[token] = row
    stride: dict[int, int] = {}
    last: dict[int, tuple[float, Tensor]] = {}
    before: dict[int, tuple[float, Tensor] | None] = {}
    changes: dict[int, list[float]] = {token: [] for token in moving}

    def choose() -> None:
        scores = np.array([np.mean(changes.get(token) or [0.0]) for token in range(count)])
        order = policy.order(plan, np.array(moving), seed, scores)
        run.order.extend([*fixed, *order.tolist()])
        start = 0
        for (_, budget), size in reversed(list(zip(policy.groups, plan.sizes, strict=True))):
            stride.update(dict.fromkeys(order[start : start + size].tolist(), steps // budget))
            start += size

    if policy.selection != "dynamic":
        choose()
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        everyone = step < margin or step >= steps - margin or step == switch
        active = [t for t in moving if everyone or step % stride[t] == 0]
        if len(active) == len(moving):
            active = [*fixed, *moving]
        expert = experts[0 if switch is None or step < switch else 1]
        if active:
            rows = run.x[active]
            if extra is not None:
                cells = rows.unflatten(-1, (extra.shape[1], -1))
                rows = torch.cat([cells, extra[active].double()], -1).flatten(1)
            times = [0.0 if token in fixed else 1000 * sigma for token in active]
            velocities = [plain.velocity(rows, active, times) for plain in expert]
            mixed = velocities[0]
            if len(expert) == 2:
                mixed = velocities[1] + guidance * (velocities[0] - velocities[1])
            for token, velocity in zip(active, mixed, strict=True):
                if token in changes and token in last and 1 <= step < margin:
                    change = (velocity - last[token][1]).abs().sum() / velocity.abs().sum()
                    changes[token].append(float(change))
                before[token] = None if step == switch else last.get(token)
                last[token] = (sigma, velocity)
        run.tokens.append(active)
        run.kv.append([dict(plain.kv) for plain in expert])
        for token in moving:
            at, velocity = last[token]
            older = before[token]
            if policy.update == "extrapolated" and at != sigma and older is not None:
                strength = policy.strength or (1.0 if stride[token] <= 2 else min(1.0, steps / (20 * stride[token])))
                velocity = velocity + strength * (velocity - older[1]) / (at - older[0]) * (sigma - at)
            run.x[token] += (following - sigma) * velocity
        if step == margin - 1 and policy.selection == "dynamic":
            choose()
    return run


@dataclass
class Recorded:
    """Of each layer that went through a cache, in turn: the cache, the layer, the active set, and the K, V attended."""

    updates: list[tuple[PlacedKV, int, ActiveSet, Tensor, Tensor]] = field(default_factory=list)
    calls: list[tuple[WanModel, list[int], Tensor, Tensor]] = field(default_factory=list)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Everything that solve hands to caches and models while the fixture is in use."""
    seen = Recorded()
    attended, forward = PlacedKV.attended, WanModel.forward

    def record(self: PlacedKV, layer: int, active: ActiveSet) -> Pair:
        k, v = attended(self, layer, active)
        seen.updates.append((self, layer, active, k.clone(), v.clone()))
        return k, v

    def call(self: WanModel, rows: Tensor, active: ActiveSet, timesteps: Tensor, *rest: Any) -> Any:
        out = forward(self, rows, active, timesteps, *rest)
        seen.calls.append((self, active.tokens.tolist(), rows.clone(), out.velocity.clone()))
        return out

    monkeypatch.setattr(PlacedKV, "attended", record)
    monkeypatch.setattr(WanModel, "forward", call)
    return seen


def run_solve(model: WanModel, policy: HSA | None, sigmas: Sequence[float], seed: int, text: Tensor,
              nothing: Tensor | None = None, guidance: float = 1.0, grid: TokenGrid = GRID, **options: Any
              ) -> DenoisedChunk:  # fmt: skip
    tokens, steps = len(FRAMES) * grid.tokens, len(sigmas) - 1
    conditions = options.get("conditions") or Conditions()
    full = () if "boundary" not in options else (switch_step(sigmas, options["boundary"]),)
    plan = None if policy is None else policy.plan(steps, tokens, grid.tokens, fixed=conditions.count, full=full)
    empty = None if nothing is None else model.embed_text(nothing)
    return solve(model, grid, FRAMES, model.embed_text(text), empty, sigmas, guidance, seed, lambda *_: None,
                 lambda: None, plan=plan, **options)  # fmt: skip


def noise_of(seed: int, width: int) -> Tensor:
    return reference.philox_normal(torch.tensor([seed]), torch.arange(15), width, 0)[0]


def close(result: Tensor, exact: Tensor) -> None:
    assert exact.std() > 0.1 and (result - exact).abs().max() < 3e-5 * exact.abs().max()


def random_policy(draw: random.Random, steps: int, selection: str) -> HSA:
    budgets = draw.sample([n for n in range(1, steps) if steps % n == 0], draw.randint(1, 3))
    shares = [draw.randint(10, 30) for _ in budgets]
    groups = ((100 - sum(shares)) / 100, steps), *((s / 100, b) for s, b in zip(shares, budgets, strict=True))
    window = draw.choice([0.34, 0.5] if selection == "dynamic" else [0.4, 0.75, 1.0])
    update = draw.choice(["held", "extrapolated"])
    return HSA(groups, window, selection, update, draw.choice([None, 0.6]) if update == "extrapolated" else None)


@pytest.mark.parametrize("selection", ["dynamic", "uniform", "random", "random-first-frame"])
@pytest.mark.parametrize("trial", range(3))
def test_against_the_run_written_out(trial: int, selection: str, recorded: Recorded) -> None:
    """Latents, the tokens of every pass, and K and V of all tokens in every pass that reads or keeps them."""
    draw = random.Random(100 * trial + len(selection))
    steps, guidance, seed = draw.choice([8, 12]), draw.choice([1.0, 3.0]), draw.randint(-99, 99)
    policy = random_policy(draw, steps, selection)
    model, sigmas = make_model(trial, form="bidirectional"), euler_sigmas(steps, 3.0)
    text, nothing = torch.randn(2, 1, 7, 20).unbind(0)
    done = run_solve(model, policy, sigmas, seed, text, None if guidance == 1 else nothing, guidance)
    branches = [Plain(model, text), Plain(model, nothing)][: 1 if guidance == 1 else 2]
    run = write_out(policy, [branches], sigmas, guidance, seed, noise_of(seed, 12))
    close(done.x0[0], run.x)

    passes = [sorted(tokens) for tokens in run.tokens if tokens]
    assert [sorted(tokens) for _, tokens, _, _ in recorded.calls] == [t for t in passes for _ in branches]
    plan = policy.plan(steps, 15, GRID.tokens)
    assert [len(tokens) for tokens in run.tokens] == list(plan.counts) and done.passes == plan.passes
    updates = iter(recorded.updates)
    caches: list[set[int]] = [set(), set()]
    for step in range(steps):
        if not plan.counts[step] or not (plan.is_partial(step) or plan.keeps(step)):
            continue
        for number in range(len(branches)):
            for layer in range(2):
                cache, at, active, k, v = next(updates)
                caches[number].add(id(cache))
                assert at == layer and sorted(active.tokens.tolist()) == sorted(run.tokens[step])
                rows = run.order if active.parts else range(15)  # as they come, before tokens have groups
                for got, index in ((k, 0), (v, 1)):
                    exact = torch.stack([run.kv[step][number][layer, token][index] for token in rows])
                    close(got[0], exact)
    assert next(updates, None) is None
    if recorded.updates:
        assert [len(ids) for ids in caches] == [1, len(branches) - 1] and not caches[0] & caches[1]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_every_budget_full_has_the_bits_of_dense(guidance: float, recorded: Recorded) -> None:
    model, sigmas, text = make_model(3, form="bidirectional"), euler_sigmas(6, 5.0), torch.randn(1, 7, 20)
    nothing = None if guidance == 1 else torch.randn(1, 7, 20)
    dense = run_solve(model, None, sigmas, 4, text, nothing, guidance).x0
    for groups in (((1, 6),), ((0.3, 6), (0.7, 6))):
        for update in ("held", "extrapolated"):
            policy = HSA(groups, window=1, update=update)
            assert torch.equal(run_solve(model, policy, sigmas, 4, text, nothing, guidance).x0, dense)
    assert not recorded.updates


def test_a_skipped_token_takes_one_long_step(recorded: Recorded) -> None:
    """Euler telescopes: between evaluations at steps a and b, x_b = x_a + (sigma_b - sigma_a) v_a."""
    model, sigmas = make_model(5, form="bidirectional"), euler_sigmas(12, 5.0)
    policy = HSA(((0.2, 12), (0.3, 6), (0.5, 3)), window=0.7, selection="random")
    done = run_solve(model, policy, sigmas, 9, torch.randn(1, 7, 20))
    history: dict[int, list[tuple[int, Tensor, Tensor]]] = {token: [] for token in range(15)}
    for step, (_, tokens, rows, velocity) in enumerate(recorded.calls):
        for row, token in enumerate(tokens):
            history[token].append((step, rows[0, row], velocity[0, row]))
    lengths = set()
    for token, visits in history.items():
        for (a, x_a, v_a), (b, x_b, _) in pairwise([*visits, (12, done.x0[0, token], done.x0)]):
            assert (x_b - (x_a + (sigmas[b] - sigmas[a]) * v_a)).abs().max() < 1e-5 * (1 + x_a.abs().max())
            lengths.add(b - a)
    assert lengths >= {1, 2, 4}


def test_window_only_skips_whole_passes(recorded: Recorded) -> None:
    model, sigmas, text = make_model(6, form="bidirectional"), euler_sigmas(12, 3.0), torch.randn(1, 7, 20)
    reported: list[int] = []
    for update in ("held", "extrapolated"):
        policy = HSA(((1, 4),), window=0.7, update=update)
        done = solve(model, GRID, FRAMES, model.embed_text(text), None, sigmas, 1.0, 2,
                     lambda number, _: reported.append(number), lambda: None, plan=policy.plan(12, 15, 5))  # fmt: skip
        close(done.x0[0], write_out(policy, [[Plain(model, text)]], sigmas, 1.0, 2, noise_of(2, 12)).x)
        assert done.passes == 5 and done.confidences == (None,) * 5
    assert reported == [1, 2, 3, 4, 5] * 2 and len(recorded.calls) == 10 and not recorded.updates


@pytest.mark.parametrize("selection", ["dynamic", "random"])
def test_conditions_stay_and_are_read(selection: str, recorded: Recorded) -> None:
    """First-frame tokens at timestep 0 and further channels: in no partial pass, never moved, their K/V made anew
    whenever all tokens are computed."""
    model = make_model(7, form="bidirectional", in_channels=5)
    sigmas, text, nothing = euler_sigmas(12, 3.0), *torch.randn(2, 1, 7, 20).unbind(0)
    rows, extra = torch.randn(1, 3, 12), torch.randn(1, 15, 8)
    conditions = Conditions(extra, rows, torch.tensor([0, 1, 3]))
    policy = HSA(((0.25, 12), (0.75, 3)), window=0.5, selection=selection)
    done = run_solve(model, policy, sigmas, 8, text, nothing, 2.0, conditions=conditions)
    run = write_out(
        policy, [[Plain(model, text), Plain(model, nothing)]], sigmas, 2.0, 8, noise_of(8, 12),
        fixed=dict(zip((0, 1, 3), rows[0].double(), strict=True)), extra=extra[0].unflatten(-1, (4, 2)),
    )  # fmt: skip
    close(done.x0[0], run.x)
    assert torch.equal(done.x0[:, [0, 1, 3]], rows)
    for _, tokens, given, _ in recorded.calls:
        assert len(tokens) == 15 or not set(tokens) & {0, 1, 3}
        assert given.shape[-1] == 20
    assert {len(tokens) for _, tokens, _, _ in recorded.calls} == {15, 3}


@pytest.mark.parametrize("update", ["held", "extrapolated"])
def test_two_experts(update: str, recorded: Recorded) -> None:
    """Other weights below the boundary: all tokens at the switch, where no step of a group falls, and no line through
    the velocities of both."""
    high, low = make_model(1, form="bidirectional"), make_model(2, form="bidirectional")
    sigmas, text, nothing = euler_sigmas(12, 3.0), *torch.randn(2, 1, 7, 20).unbind(0)
    boundary = sigmas[5] - 1e-6
    assert switch_step(sigmas, boundary) == 6 and switch_step(sigmas, sigmas[5]) == 6 and switch_step(sigmas, 0) == 12
    policy = HSA(((0.2, 12), (0.8, 3)), window=0.75, selection="random", update=update)
    second = Expert(low, low.embed_text(text), low.embed_text(nothing), 3.0)
    done = run_solve(high, policy, sigmas, 5, text, nothing, 3.0, low=second, boundary=boundary)
    plains = [[Plain(model, text), Plain(model, nothing)] for model in (high, low)]
    close(done.x0[0], write_out(policy, plains, sigmas, 3.0, 5, noise_of(5, 12), boundary=boundary).x)
    used = [(model is low, len(tokens)) for model, tokens, _, _ in recorded.calls[::2]]
    assert [expert for expert, _ in used] == [False] * 6 + [True] * 6
    assert used[6] == (True, 15) and used[5][1] < 15 and used[7][1] < 15
    with pytest.raises(OptionError, match=r"switch at step 6, where the plan skips tokens; give it full=\(6,\)"):
        solve(high, GRID, FRAMES, high.embed_text(text), None, sigmas, 1.0, 5, lambda *_: None, lambda: None,
              plan=policy.plan(12, 15, 5), low=second, boundary=boundary)  # fmt: skip


def test_fp8_storage_is_near() -> None:
    model, sigmas, text = make_model(8, form="bidirectional"), euler_sigmas(12, 3.0), torch.randn(1, 7, 20)
    policy = HSA(((0.2, 12), (0.8, 3)), window=0.75, selection="random")
    wide, narrow = (run_solve(model, policy, sigmas, 1, text, storage=s).x0 for s in ("model", "fp8"))
    assert 0 < (wide - narrow).abs().max() < 0.05 * wide.abs().max()


def test_conditions_that_do_not_fit() -> None:
    model, sigmas, text = make_model(0, form="bidirectional"), euler_sigmas(4, 3.0), torch.randn(1, 7, 20)
    two = torch.tensor([0, 1])
    for make, message in (
        (lambda: Conditions(fixed=two), "belong together"),
        (lambda: Conditions(None, torch.randn(1, 2, 12), torch.tensor([1, 0])), "do not rise"),
        (lambda: Conditions(None, torch.randn(1, 3, 12), two), r"shape \[1, 3, 12\]; expected \[1, 2, P\]"),
        (lambda: Conditions(None, torch.randn(1, 2, 12), two.float()), "expected int64"),
        (lambda: Conditions(torch.randn(15, 4)), r"expected \[1, N, E\]"),
        (lambda: Conditions(torch.randn(1, 15, 4)), "12 values and 4 extra ones; the generator reads rows of 12"),
        (lambda: Conditions(torch.randn(1, 14, 4)), "14 rows; expected 15"),
        (lambda: Conditions(None, torch.randn(1, 2, 11), two), "11 wide; expected 12"),
        (lambda: Conditions(None, torch.randn(1, 2, 12), two + 14), r"expected indices in \[0, 15\)"),
        (lambda: Conditions(None, torch.randn(1, 15, 12), torch.arange(15)), "at least one token that moves"),
    ):
        with pytest.raises(ShapeError, match=message):
            run_solve(model, None, sigmas, 0, text, conditions=make())


def test_a_plan_of_another_run() -> None:
    model, text = make_model(0, form="bidirectional"), torch.randn(1, 7, 20)
    for plan in (StepPlan.dense(5, 15), StepPlan.dense(4, 14), StepPlan.dense(4, 15, 2)):
        with pytest.raises(ShapeError, match="this run has 4, 15 and 0"):
            solve(model, GRID, FRAMES, model.embed_text(text), None, euler_sigmas(4, 3.0), 1.0, 0, lambda *_: None,
                  lambda: None, plan=plan)  # fmt: skip


# Through load, compile and generate


def test_generate(many_step: Runtime) -> None:
    """One seed, one result, called, streamed and compiled again; statistics that are those of the plan."""
    generate = many_step.compile(policy="hsa-50")
    plan = generate.settings.token_plan
    assert plan is not None and (plan.steps, plan.tokens) == (40, 54) and len(generate.settings.sigmas) == 41
    once, again = generate(PROMPT, 3), many_step.compile(policy="hsa-50")(PROMPT, 3)
    assert torch.equal(once.latents, again.latents) and torch.equal(once.frames, again.frames)
    (chunk,) = generate.stream(PROMPT, 3)
    assert torch.equal(chunk.latents, once.latents)
    stats = once.stats
    assert stats.chunks[0].active_tokens == plan.counts and stats.passes == 40 and stats.model_calls == 80
    assert stats.active_token_share == pytest.approx(plan.token_step_share) and stats.policy == "hsa-50"
    assert "50% of the denoise tokens" in stats.table()
    dense = many_step.compile(policy="dense", steps=40)(PROMPT, 3)
    assert not torch.equal(dense.latents, once.latents)
    assert torch.equal(many_step.compile(policy="hsa:groups=0.5@40+0.5@40")(PROMPT, 3).latents, dense.latents)


def test_steps_of_a_run(many_step: Runtime) -> None:
    """As the user asks, else as the policy's baseline has them, else the bundle's."""
    assert many_step.compile(policy="hsa-25").settings.passes == 20
    assert many_step.compile(policy="hsa:groups=1@1").settings.passes == 3
    video = many_step.compile(policy="hsa:groups=1@2,window=0.5", steps=8)(PROMPT)
    assert video.stats.passes == 5 and video.stats.passes_scheduled == 8  # 0, 1, 4, 6 and 7
    assert video.stats.chunks[0].active_tokens == (54,) * 5 and video.stats.active_token_share == 5 / 8
    with pytest.raises(PolicyError, match="does not divide T = 30; budgets can be 1, 2, 3, 5, 6, 10, 15, 30"):
        many_step.compile(policy="hsa-50", steps=30)


def test_two_experts_through_the_face(many_step: Runtime) -> None:
    """A runtime with a second generator: its plan computes all tokens at the switch, and so does its run."""
    tensors = many_step.bundle.tensors | {"generator_2": many_step.bundle.tensors["generator"]}
    bundle = replace(many_step.bundle, manifest=replace(many_step.manifest, boundary=0.6), tensors=tensors)
    low = WanModel(many_step.model.config).requires_grad_(False).eval()
    randomise(low, 9)
    generate = replace(many_step, bundle=bundle, model_2=low).compile(policy="hsa-50", guidance_scale_2=1.5)
    plan, settings = generate.settings.token_plan, generate.settings
    assert plan is not None
    switch = switch_step(settings.sigmas, 0.6)
    alone = many_step.compile(policy="hsa-50").settings.token_plan
    assert alone is not None and switch % 4 and [i for i in range(40) if plan.counts[i] != alone.counts[i]] == [switch]
    rows, nothing = (many_step.text_encoder.encode([prompt]) for prompt in (PROMPT, ""))
    high = many_step.model
    done = solve(
        high, settings.grid, range(9), high.embed_text(rows), high.embed_text(nothing), settings.sigmas, 2.5, 6,
        lambda *_: None, lambda: None, plan=plan, low=Expert(low, low.embed_text(rows), low.embed_text(nothing), 1.5),
        boundary=0.6,
    )  # fmt: skip
    assert torch.equal(generate(PROMPT, 6).latents, settings.grid.unpatchify(done.x0)[0])


def test_the_plan_counts_the_cache(many_step: Runtime, recorded: Recorded) -> None:
    for guidance, branches in ((1.0, 1), (2.5, 2)):
        recorded.updates.clear()
        generate = many_step.compile(policy="hsa-75b", guidance_scale=guidance, kv_storage="model")
        caches = {id(cache): cache for cache, *_ in recorded.updates}.values()
        taken = sum(t.nbytes for cache in caches for t in (cache.k, cache.v))
        dense = many_step.compile(policy="dense", guidance_scale=guidance).plan
        assert len(caches) == branches and generate.plan.kv_cache - dense.kv_cache == taken > 0
    less = many_step.compile(policy="hsa-75b", memory_limit=generate.plan.total - 1, kv_storage="model").plan
    assert not less.held and less.kv_cache == generate.plan.kv_cache
    with pytest.raises(MemoryLimitError, match=f"this needs {less.total / 1e6:.1f} MB"):
        many_step.compile(policy="hsa-75b", memory_limit=less.total - 1, kv_storage="model")


def test_policies_for_other_bundles(causal: Runtime) -> None:
    with pytest.raises(PolicyError, match=r"policy hsa-50 allocates .* use dsa, dense or fixed-N"):
        causal.compile(policy="hsa-50")


def test_inspect_before_anything_runs(many_step: Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(many_step.bundle.path)
    assert main(["inspect", path, "--policy", "hsa-50", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)["plan"]
    plan = many_step.compile(policy="hsa-50")
    assert plan.settings.token_plan is not None
    assert record["active_tokens"] == list(plan.settings.token_plan.counts)
    assert record["groups"] == [{"share": 0.16, "steps": 40, "tokens": 9}, {"share": 0.84, "steps": 10, "tokens": 45}]
    cache = plan.plan.kv_cache - many_step.compile(policy="dense").plan.kv_cache
    assert record["cache_bytes"]["fp32"] == cache == 2 * record["cache_bytes"]["bf16"]
    assert main(["inspect", path, "--policy", "hsa-25", "--frames", "13", "--height", "64"]) == 0
    shown = capfd.readouterr().out
    counts = "2 × 32, 4 × (2 × 5, 32, 5), 2 × 32"
    for words in ("budget 5 of 20 steps, 0.84 of 32 tokens: 27", counts, "of 20 full steps", "KiB in bf16"):
        assert words in shown, shown
    for arguments, words in (
        (["--steps", "20"], "name its policy too"),
        (["--policy", "hsa-50", "--steps", "20"], "does not divide T = 20"),
        (["--policy", "dsa"], "decides passes per chunk"),
        (["--policy", "hsa-50", "--frames", "14"], "14 frames"),
    ):
        assert main(["inspect", path, *arguments]) == 2
        assert words in capfd.readouterr().err
