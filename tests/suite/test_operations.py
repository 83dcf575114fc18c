"""The formula against PyTorch's own counter on the plain model, and what a run adds up to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsa_rt.plan import TokenGrid
from dsa_rt.runtime import Runtime
from dsa_rt.suite.operations import NOTHING, pass_work, run_work

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no part of the package
from bench.peers.plain_model import PlainWan, SliceCache


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in operations that the counter knows on every device."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2)


@pytest.mark.parametrize(
    "sizes", [{}, {"dim": 72, "heads": 3, "ffn_dim": 100, "layers": 3, "text_length": 11, "in_channels": 5,
                   "out_channels": 5, "freq_dim": 64}]
)  # fmt: skip
@pytest.mark.parametrize("start", [0, 2])
def test_against_the_counter_of_the_framework(sizes: dict[str, int], start: int) -> None:
    """A chunk of two frames that attends to ``start`` frames before it; the text's K/V are there already."""
    model = make_model(0, **sizes)
    config, grid, frames = model.config, TokenGrid(3, 2), 2
    plain = PlainWan.of(model, two_products)
    cache, texts = SliceCache(config, 4 * grid.tokens, torch.float32, torch.device("cpu")), {}
    text = torch.randn(1, config.text_length, config.text_dim)

    def run(first: int) -> None:
        cache.start = first * grid.tokens
        plain(torch.randn(1, config.in_channels, frames, 6, 4), torch.rand(1, frames), text, cache, texts, first)

    for first in range(0, start + 1, 2):
        run(first)  # leaves K/V of the text and of what came before
    with FlopCounterMode(display=False) as counter:
        run(start)
    embedding = 2 * config.text_length * config.dim * (config.text_dim + config.dim)  # the plain model: in every pass
    active, rows = frames * grid.tokens, (start + frames) * grid.tokens
    assert pass_work(config, active, rows, frames, 4).operations == counter.get_total_flops() - embedding


def test_bytes_are_those_of_the_tensors() -> None:
    model = make_model(0)
    read = [  # biases, norms and tables are left out, the text's own layers too: they ran before
        p.nbytes for name, p in model.named_parameters()
        if p.ndim == 2 and not name.startswith("text_embedding") and "cross_attn.k" not in name
        and "cross_attn.v" not in name
    ]  # fmt: skip
    kv = 4 * 2 * model.config.layers * model.config.dim * (18 + 6 + model.config.text_length)
    assert pass_work(model.config, 6, 18, 2, 4).bytes == sum(read) + kv


@pytest.mark.parametrize(("window", "sink", "seen"), [(9, 0, (3, 6, 9)), (6, 0, (3, 6, 6)), (5, 1, (3, 5, 5))])
def test_a_streaming_run(causal: Runtime, window: int, sink: int, seen: tuple[int, ...]) -> None:
    generate = causal.compile(policy="fixed-3-then-1", window=window, sink=sink)
    stats, config = generate("a red square bouncing").stats, causal.model.config
    expected = NOTHING
    calls = (3 + 1, 1 + 1, 1)  # passes and the context pass, which the last chunk has none of
    for frames, count in zip(seen, calls, strict=True):
        expected += pass_work(config, 18, 6 * frames, 3, 2) * count
    assert run_work(config, generate.settings, stats.chunks, 2) == expected


def test_a_run_that_skips_tokens(many_step: Runtime) -> None:
    generate = many_step.compile(policy="hsa-25", guidance_scale=3.0)
    stats, plan = generate("a red square bouncing").stats, generate.settings.token_plan
    assert plan is not None and min(plan.counts) < plan.tokens
    expected = NOTHING
    for count in plan.counts:
        if count:
            expected += pass_work(many_step.model.config, count, plan.tokens, 1, 4) * 2
    assert run_work(many_step.model.config, generate.settings, stats.chunks, 4) == expected


def test_work_adds_up() -> None:
    one = SimpleNamespace(operations=3, bytes=5)
    assert (NOTHING + one) * 4 == type(NOTHING)(12, 20)  # type: ignore[operator]
