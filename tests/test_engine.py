"""Plan, then run: what compile made is all that generate uses; recorded passes against the same passes run anew."""

from __future__ import annotations

import random
from collections.abc import Callable

import graph_double
import pytest
import torch
from allocations import Allocations, replayed
from tiny import make_model

from dsa_rt.arena import Arena, Room
from dsa_rt.cache import Ring
from dsa_rt.engine import CONTEXT, Engine, Piece, Sizes
from dsa_rt.errors import MemoryLimitError, OptionError
from dsa_rt.generate import Generate
from dsa_rt.plan import TokenGrid
from dsa_rt.recording import Recorded, Recorder
from dsa_rt.runtime import Runtime

PROMPTS = ("a red square bouncing", "a blue circle at rest on a striped ground")
LARGE = 2048  # bytes; a pass of the tiny model works on rows of 3.4 to 27 kB


def eager(device: torch.device, function: Callable[[], None], *, pool: object = None) -> Recorded:
    function()
    return Recorded("eager", function, function)


def double(device: torch.device, function: Callable[[], None], *, pool: object = None) -> Recorded:
    return graph_double.record(device, function)


# The ring and the arena


@pytest.mark.parametrize("trial", range(60))
def test_ring_with_room_for_a_chunk_more(trial: int) -> None:
    """What a chunk sees are the frames of its window, in one or two ranges; a new chunk takes none of the places that
    the one before it sees."""
    draw = random.Random(trial)
    chunk, sink = draw.randint(1, 4), draw.randint(0, 4)
    window = sink + chunk + draw.randint(0, 6)
    ring = Ring(window, sink, window + chunk)
    before: set[int] = set()
    for index in range(12):
        frames = range(index * chunk, (index + 1) * chunk)
        kept = [f for f in range(frames.stop) if f < sink or f >= frames.stop - (window - sink)]
        if frames.stop <= window:
            kept = list(range(frames.stop))
        places = {ring.place(frame) for frame in kept}
        assert len(places) == len(kept) and max(places) < window + chunk
        ranges = ring.seen(frames.stop)
        assert 1 <= len(ranges) <= 2 and {p for a, b in ranges for p in range(a, b)} == places
        assert sum(b - a for a, b in ranges) == len(places)
        if frames.start >= sink:
            assert not before & set(ring.written(frames))
        before = places


def test_ring_refuses_less_room_than_its_window() -> None:
    with pytest.raises(OptionError, match="cache of 4 .* window of 5"):
        Ring(5, 1, 4)


def test_arena_gives_one_memory_for_a_name() -> None:
    arena = Arena()
    big = arena.get("x", (3, 4), torch.float32)
    small = arena.get("x", (2, 2), torch.float32)
    assert small.data_ptr() == big.data_ptr() and small.is_contiguous() and small.shape == (2, 2)
    others = [arena.get("y", (3, 4), torch.float32), arena.get("x", (3, 4), torch.bfloat16)]
    assert len({t.data_ptr() for t in (big, *others)}) == 3 and arena.allocations == 3
    assert arena.nbytes == 2 * 48 + 24
    larger = arena.get("x", (4, 4), torch.float32)
    assert larger.data_ptr() != big.data_ptr() and arena.allocations == 4
    assert Room(None, (1, 2), torch.float32)("x", 4) is None
    room = Room(arena, (1, 3), torch.float32)("x", 2, 2)
    assert room is not None and room.shape == (1, 3, 2, 2) and room.data_ptr() == larger.data_ptr()


# Recorded passes


def filled(engine: Engine, seed: int) -> None:
    """Random K/V, rows and prompts."""
    torch.manual_seed(seed)
    for buffer in (*engine.cache.k, *engine.cache.v, engine.rows):
        buffer.copy_(torch.randn(buffer.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_has_the_bits_of_the_pass(dtype: torch.dtype) -> None:
    """Every kind of pass, replayed over new rows, K/V, prompts, chunks and levels, against an engine that calls the
    model each time, and one whose recordings behave like graphs of a device; the recorded ones call the model for new
    kinds alone, and in a replay on the CPU no op of torch runs."""
    model = make_model(3, dim=96, heads=4, layers=3).to(dtype).prepare()
    sizes = Sizes(TokenGrid(2, 3), 2, 5, 1, 7, (1.0, 0.8, 0.4))
    engines = [Engine(model, None, sizes, torch.device("cpu"), *how) for how in ((), (eager,), (double,))]
    engines[2].bakes = True
    lanes = [engine.lanes()[0] for engine in engines]
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    draw = random.Random(0)
    for trial in range(30):
        results = []
        chunk, kind, level = draw.randint(0, 9), draw.choice(("own", "context", "both")), draw.randint(0, 2)
        for engine, lane in zip(engines, lanes, strict=True):
            filled(engine, trial)
            torch.manual_seed(trial)
            engine.read_prompt(lane, torch.randn(1, 7, 20))
            for index in (chunk, chunk + 1):
                lane.place(index % 2, range(2 * index, 2 * index + 2))
            own = Piece(lane, (chunk + 1) % 2, level)
            context = Piece(lane, chunk % 2, CONTEXT)
            pieces = {"own": [own], "context": [context], "both": [context, own]}[kind]
            before = calls[0]
            out = engine.run(pieces)
            results.append([o.velocity.clone() for o in out] + [t.clone() for t in (*engine.cache.k, *engine.cache.v)])
            if engine is engines[0] and trial > 20 and replayed(dtype):
                assert calls[0] == before
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))
    assert {recorded.kind for recorded, _ in engines[2].passes.values()} == {"graph"}
    assert 10 < len(engines[2].passes) < 30  # one for each way to see the ring, and replayed when it comes again
    kinds = {recorded.kind for recorded, _ in engines[0].passes.values()}
    assert len(engines[0].passes) == 3  # each side and both, at any level
    if replayed(dtype):
        assert kinds == {"program"}
        with Allocations() as counted:
            engines[0].run([Piece(lanes[0], 0, 1)])
        assert {op for op, _ in counted.made} <= {"aten.fill_.Tensor"}


@pytest.mark.parametrize(
    ("policy", "options"), [("dsa-paper", {}), ("dense", {"window": 6}), ("fixed-1", {"sink": 1, "window": 5})]
)
def test_generate_allocates_records_and_calls_nothing(causal: Runtime, policy: str, options: dict[str, int]) -> None:
    """Over prompts, seeds and a stream far past the window: the passes and buffers of compile, and no others."""
    generate = causal.compile(policy=policy, **options)
    engine = generate.session(PROMPTS[0]).rollout.lane.engine
    recorded, held = set(engine.passes), engine.arena.nbytes
    calls = [0]
    hook = causal.model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for seed, prompt in enumerate(PROMPTS * 2):
        generate(prompt, seed)
    session = generate.session(PROMPTS[1], 9, endless=True)
    for _ in range(12):
        session.next_chunk()
    session.close()
    hook.remove()
    assert set(engine.passes) == recorded and engine.arena.nbytes == held and engine.arena.allocations == 0
    assert calls == [0] or not replayed(torch.float32)


@pytest.mark.parametrize("policy", ["dsa-paper", "dense"])
def test_no_large_tensor_is_made_between_frames(causal: Runtime, policy: str) -> None:
    """Beside what is handed out (frames, latents) and the decoder's own work."""
    from dsa_rt.sampler.rollout import advance

    session = causal.compile(height=96, width=64, policy=policy).session(PROMPTS[0])
    session.next_chunk()
    with Allocations() as counted:
        for _ in range(4):
            if advance([session.rollout])[0] is not None:
                break
    assert counted.made and counted.largest[1] < LARGE, counted.largest


def test_memory_that_runs_out_in_compile_is_a_typed_error(causal: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plan, and the runtime as before."""
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "warm_up", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            if isinstance(error, MemoryError) or "memory" in str(error):
                with pytest.raises(MemoryLimitError, match="(?s)memory ran out in compile.*K/V cache"):
                    causal.compile(policy="dense")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "warm_up", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a fault")))
        with pytest.raises(RuntimeError, match="a fault"):
            causal.compile(policy="dense")
    assert isinstance(causal.compile(policy="fixed-1"), Generate)


def test_recorders_are_alike() -> None:
    """The face that the engine needs of one."""
    recorder: Recorder = eager
    assert recorder(torch.device("cpu"), lambda: None).kind == "eager"
