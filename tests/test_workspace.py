"""Many-step clips on what compile made: recorded passes against the model called anew, for whatever groups a clip has;
what generate allocates, and who it shares its buffers with."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import graph_double
import pytest
import torch
from allocations import Allocations, replayed
from tiny import make_model
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.cache import TextKV
from dsa_rt.errors import Cancelled, MemoryLimitError
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import HSA
from dsa_rt.recording import Recorded, record
from dsa_rt.runtime import Runtime
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.ode import Expert, Solver, solve
from dsa_rt.schedule import euler_sigmas
from dsa_rt.workspace import Workspace

GRID, FRAMES, TOKENS = TokenGrid(3, 5), range(3), 45
PROMPTS = ("a red square bouncing", "a blue circle at rest on a striped ground")
POLICIES = {
    "dense": HSA(((1.0, 12),), 1.0, steps=12),
    "dynamic, kept in token order": HSA(((0.2, 12), (0.3, 6), (0.5, 3)), 0.5),
    "random, extrapolated": HSA(((0.4, 12), (0.6, 3)), 0.75, "random", "extrapolated"),
    "whole steps": HSA(((1.0, 4),), 0.75, update="extrapolated", steps=12),
}
LARGE = 6000  # bytes; one row of latents for each token takes 8.6 kB in a run, a pass 17 kB and more


def double(device: torch.device, function: Callable[[], None], *, pool: object = None) -> Recorded:
    return graph_double.record(device, function)


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize("storage", ["model", "fp8"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["guided", "channels", "first frame", "two experts"])
def test_recorded_runs_have_the_bits_of_the_model_called(kind: str, policy: str, storage: str) -> None:
    """Clip after clip, with other groups, noise, text and conditions, as programs and as a graph's double, which keeps
    every number of the recorded call; and nothing is recorded any more. In fp16 where there are more channels or
    experts."""
    dtype = torch.float16 if kind in ("channels", "two experts") else torch.float32
    sigmas, boundary = euler_sigmas(12, 3.0), 0.5 if kind == "two experts" else 0.0
    channels = 5 if kind == "channels" else 3
    sizes = {"form": "bidirectional", "dim": 96, "heads": 4, "in_channels": channels}
    models = [make_model(seed, **sizes).to(dtype).prepare() for seed in (1, 2)]
    full = () if not boundary else (next(i for i, sigma in enumerate(sigmas) if sigma < boundary),)
    fixed = 15 if kind == "first frame" else 0
    plan = POLICIES[policy].plan(12, TOKENS, 15, fixed=fixed, full=full)

    def room(model: WanModel) -> TextKV:
        return TextKV.room(2, (1, 7, 4, 24), model.dtype, "cpu")

    def made(arena: Arena, recorder: Any) -> tuple[Solver, list[Expert]]:
        experts = [Expert(model, room(model), room(model), 2.0 + n) for n, model in enumerate(models)]
        low = experts[1] if boundary else None
        return Solver(experts[0], GRID, FRAMES, sigmas, plan, low=low, boundary=boundary, storage=storage, arena=arena,
                      recorder=recorder), experts  # fmt: skip

    arenas = [Arena(), Arena()]
    runs = [made(arena, how) for arena, how in zip(arenas, (record, double), strict=True)]
    for (solver, _), arena in zip(runs, arenas, strict=True):
        solver.warm_up()
        arena.allocations = 0
    known = [set(solver.passes) for solver, _ in runs]
    calls = [0]
    for clip in range(3):
        torch.manual_seed(clip)
        texts = [torch.randn(1, 7, 20) for _ in range(2)]
        given = Conditions()
        if kind == "channels":
            given = Conditions(torch.randn(1, TOKENS, 8))
        if fixed:
            given = Conditions(None, torch.randn(1, fixed, 12), torch.arange(fixed))
        (high, empty), (second, other) = ([model.embed_text(text) for text in texts] for model in models)
        expected = solve(models[0], GRID, FRAMES, high, empty, sigmas, 2.0, clip, quiet, lambda: None, plan=plan,
                         conditions=given, low=Expert(models[1], second, other, 3.0) if boundary else None,
                         boundary=boundary, storage=storage).x0  # fmt: skip
        hooks = [model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for model in models]
        for solver, experts in runs:
            for expert in experts:
                expert.model.embed_text(texts[0], out=expert.text)
                assert expert.empty is not None
                expert.model.embed_text(texts[1], out=expert.empty)
            done = solver.run(clip, quiet, lambda: None, given)
            assert torch.equal(done.x0, expected) and done.passes == plan.passes
        for hook in hooks:
            hook.remove()
    assert [set(solver.passes) for solver, _ in runs] == known and [arena.allocations for arena in arenas] == [0, 0]
    assert {recorded.kind for recorded, _ in runs[1][0].passes.values()} == {"graph"}
    if replayed(dtype):
        assert {recorded.kind for recorded, _ in runs[0][0].passes.values()} == {"program"}
        assert calls == [0]


@pytest.mark.parametrize("policy", ["dense", "hsa-50", "hsa-25", "window-75"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generate_allocates_records_and_calls_nothing(many_step: Runtime, policy: str, guidance: float) -> None:
    """Over prompts and seeds: no pass and no buffer but those of compile; beside the text encoder and the decoder no
    tensor as large as a row for each token."""
    generate = many_step.compile(policy=policy, guidance_scale=guidance)
    with generate.workspace() as workspace:
        (solver,) = workspace.solvers.values()
    passes, held, calls = set(solver.passes), workspace.arena.nbytes, [0]
    hook = many_step.model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for seed, prompt in enumerate(PROMPTS * 2):
        generate(prompt, seed)
    with Allocations() as counted:
        solver.run(5, quiet, lambda: None)
    hook.remove()
    assert set(solver.passes) == passes and workspace.arena.nbytes == held and workspace.arena.allocations == 0
    assert counted.largest[1] < LARGE, counted.largest
    assert calls == [0] or not replayed(torch.float32)


def test_a_clip_has_its_bits_beside_and_after_others(many_step: Runtime) -> None:
    """Alone, after one that was cancelled in the middle, and in threads, of which one has the buffers of compile and
    the others their own, which go with them."""
    generate = many_step.compile(policy="hsa-50")
    expected = [generate(prompt, seed).frames for seed, prompt in enumerate(PROMPTS)]  # type: ignore[union-attr]
    stop = threading.Event()
    with pytest.raises(Cancelled):
        generate(PROMPTS[0], 8, on_event=lambda event: stop.set() if event.passes == 3 else None, cancel=stop)
    assert torch.equal(generate(PROMPTS[0], 0).frames, expected[0])  # type: ignore[union-attr]

    others: list[weakref.ref[Workspace]] = []
    together, made, init = threading.Barrier(3), [Tensor()] * 3, Workspace.__init__

    def note(self: Workspace, *rest: Any) -> None:
        others.append(weakref.ref(self))
        init(self, *rest)

    def run(number: int) -> None:
        meet = iter([together.wait])
        seed = number % 2
        video = generate(PROMPTS[seed], seed, on_event=lambda e: next(meet, int)() if e.kind == "pass" else None)
        made[number] = video.frames  # type: ignore[union-attr]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "__init__", note)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(frames, expected[number % 2]) for number, frames in enumerate(made))
    gc.collect()
    assert len(others) == 2 and not any(other() for other in others)


def test_memory_that_runs_out_in_compile_is_a_typed_error(many_step: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Solver, "warm_up", no_memory)
    with pytest.raises(MemoryLimitError, match="(?s)memory ran out in compile.*K/V cache"):
        many_step.compile(policy="hsa-50")
