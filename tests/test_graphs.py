"""CUDA graphs of a pass: their double on the CPU, how a capture is asked for, and on a GPU the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import graph_double
import pytest
import torch
import torch.nn.functional as F
from ops.conftest import same_bits
from recorded_pass import ACTIVE, clones, contents, fill, run
from torch import Tensor

from dsa_rt import recording
from dsa_rt.ops import attention
from dsa_rt.recording import record


def dense(b: dict[str, Tensor]) -> Tensor:
    """Ops of torch beside those of dsa_rt, with temporaries, views, in-place ops and several results."""
    run(b)
    low, high = torch.cat((b["x"], b["sum"]), 1).split(ACTIVE, dim=1)
    values, order = F.gelu(low.float() @ high.float().transpose(1, 2)).sort(-1)
    picked = torch.empty_like(values).copy_(values).mul_(2)[:, :, 1:]
    b["placed"][:, :, 0] += order.sum(-1)
    return picked.flatten(1).to(torch.float64).cumsum(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_double_has_the_bits_of_new_calls(mode: Any) -> None:
    """In the buffers, and in what the recorded call returned."""
    buffers, results = contents(), []
    with mode():
        found = graph_double.record("cpu", lambda: results.append(dense(buffers)))
    assert found.kind == "graph"
    for _ in range(3):
        expected = contents()
        expected["segments"] = buffers["segments"].clone()
        fill(buffers, expected)
        result = dense(expected)
        found.replay()
        assert all(same_bits(buffers[name], expected[name]) for name in expected)
        assert len(results) == 1 and same_bits(results[0], result)


def test_the_double_shows_what_depends_on_more_than_its_memory() -> None:
    """Python does not run; another tensor of the same name is not seen; segments are those of the capture."""
    x, out, calls = [torch.ones(3)], torch.zeros(3), []

    def function() -> None:
        calls.append(1)
        torch.add(x[0], len(calls), out=out)

    found = graph_double.record("cpu", function)
    x[0] = torch.full((3,), 10.0)
    found.replay()
    assert out.tolist() == [2, 2, 2] and len(calls) == 1

    attended, (q, k, v) = torch.zeros(1, 2, 1, 4), torch.randn(3, 1, 2, 1, 4).unbind()
    segments = torch.tensor([[2, 0, 1, 0, 0]])
    attend: Callable[[], None] = lambda: torch.ops.dsa_rt.active_attention(attended, None, q, k, v, segments)  # noqa: E731
    found, before = graph_double.record("cpu", attend), attended.clone()
    segments[0, 2] = 2
    found.replay()
    assert torch.equal(attended, before)
    attention.active_attention(attended, q, k, v, segments=segments, backend="native")
    assert not torch.equal(attended, before)


def test_graphs_of_one_pool_overwrite_each_other() -> None:
    x, made, pool = torch.ones(3), [], []
    first, second = (graph_double.record("cpu", lambda: made.append(x + 1), pool=pool) for _ in range(2))
    first.replay()
    assert (made[0] == 2).all() and made[1].isnan().all()
    second.replay()
    assert made[0].isnan().all() and (made[1] == 2).all()
    alone = graph_double.record("cpu", lambda: made.append(x + 1))
    second.replay()
    assert (made[2] == 2).all()
    alone.replay()
    assert (made[1] == 2).all()

    unset = []
    found = graph_double.record("cpu", lambda: unset.append(torch.zeros(3)[:2].add_(torch.empty(2).mul_(0).add_(1))))
    found.replay()
    assert unset[0].isnan().all()  # it took what happened to be in fresh memory


HOST = [
    lambda x: x.sum().item(),
    lambda x: bool((x > 0).all()),
    lambda x: torch.equal(x, x),
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x.add_(torch.tensor([1.0])),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reads", HOST)
def test_what_a_capture_would_refuse(mode: Any, reads: Callable[[Tensor], object]) -> None:
    with mode(), pytest.raises(RuntimeError, match="cannot be captured in a graph"):
        graph_double.record("cpu", lambda: reads(torch.ones(3)))


# The real ones


def test_how_a_capture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and capture on one side stream, into the pool; what fails is eager, out of memory is raised."""
    log: list[Any] = []
    fails: list[Exception] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def block(*what: Any, **options: Any) -> Iterator[None]:
        if options:
            log.append(f"capture into {options['pool']} on {options['stream'].name}")
        yield
        if options and fails:
            raise fails[0]

    for name, double in {
        "Stream": lambda _: Stream("side"), "current_stream": lambda: Stream("main"), "CUDAGraph": CUDAGraph,
        "device": block, "stream": block, "graph": block,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, double)
    recording._capture_stream.cache_clear()
    found = record("cuda", lambda: log.append("run"), pool="pool")
    capture = ["side waits for main", *["run"] * 3, "main waits for side", "capture into pool on side", "run"]
    assert log == capture and (found.kind, found.reason) == ("graph", "")
    found.replay()
    assert log == [*capture, "replay"]
    fails.append(RuntimeError("operation not permitted when stream is capturing"))
    found = record("cuda", lambda: log.append("run"), pool="pool")
    assert found.kind == "eager" and found.reason == f"the capture failed: {fails[0]}"
    log.clear()
    found.replay()
    assert log == ["run"]
    fails[0] = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        record("cuda", lambda: None)
    recording._capture_stream.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_has_the_bits_of_new_calls() -> None:
    device, pool = torch.device("cuda"), torch.cuda.graph_pool_handle()

    def on_device() -> dict[str, Tensor]:
        return {name: t if name == "segments" else t.to(device) for name, t in contents(torch.bfloat16).items()}

    buffers, results = on_device(), []
    with torch.no_grad():
        found = record(device, lambda: results.append(dense(buffers)), pool=pool)
        assert (found.kind, found.reason) == ("graph", "")
        for _ in range(3):
            expected = on_device()
            expected["segments"] = buffers["segments"].clone()
            fill(buffers, expected)
            kept = clones(expected)
            result = dense(expected)
            found.replay()
            assert all(same_bits(buffers[name].cpu(), expected[name].cpu()) for name in kept)
            assert same_bits(results[-1].cpu(), result.cpu())
        read = record(device, lambda: buffers["x"].sum().item(), pool=pool)
        assert read.kind == "eager" and "capture" in read.reason
