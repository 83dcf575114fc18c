"""Denoise and context passes of a chunk: what they leave in the cache, and their form with gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from dsa_rt.cache import KVCache
from dsa_rt.plan import TokenGrid
from dsa_rt.train.passes import ChunkPasses

GRID = TokenGrid(2, 2)


def chunk_passes(batch: int, window: int, sink: int = 0, seed: int = 1) -> ChunkPasses:
    model = make_model(seed)
    cache = KVCache(
        layers=2, batch=batch, window=window, sink=sink, tokens_per_frame=GRID.tokens, heads=2, head_dim=24,
        dtype=torch.float32,
    )  # fmt: skip
    text = torch.randn(batch, 7, 20, generator=torch.Generator().manual_seed(seed))
    return ChunkPasses(model, GRID, model.embed_text(text), cache)


def test_the_context_pass_alone_decides_what_stays() -> None:
    """K and V left behind do not depend on how many passes ran, nor on their input."""
    kept = []
    for passes in (1, 4):
        p = chunk_passes(2, 6)
        x0 = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(3))
        for chunk in range(2):
            active = p.active(range(3 * chunk, 3 * chunk + 3))
            for number in range(passes):
                p.denoise(torch.randn(2, 12, 12), active, 1 - 0.2 * number)
            p.write_context(x0[chunk], active)
        kept.append((p.cache.k.clone(), p.cache.v.clone()))
    assert torch.equal(kept[0][0], kept[1][0]) and torch.equal(kept[0][1], kept[1][1])
    assert kept[0][0].abs().amin(dim=(0, 1, 3, 4)).min() > 0  # every row was written


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    together = chunk_passes(3, 4, sink=1)
    alone = [chunk_passes(1, 4, sink=1) for _ in range(3)]
    for number, p in enumerate(alone):
        for k, v in together.text.layers:
            assert len(k) == len(v) == 3
        p.text.layers = [(k[number : number + 1], v[number : number + 1]) for k, v in together.text.layers]
    for chunk in range(3):
        rows = torch.randn(3, 8, 12)
        frames = range(2 * chunk, 2 * chunk + 2)
        whole = together.denoise(rows, together.active(frames), 0.7).velocity
        together.write_context(rows, together.active(frames))
        for number, p in enumerate(alone):
            own = rows[number : number + 1]
            one = p.denoise(own, p.active(frames), 0.7).velocity
            torch.testing.assert_close(one, whole[number : number + 1], rtol=0, atol=1e-5)
            p.write_context(own, p.active(frames))


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (3, 0), (4, 1)])
def test_passes_with_gradients_have_the_values_of_inference(window: int, sink: int) -> None:
    """Training drives the same passes: equal outputs, an unchanged cache, gradients into the own chunk only."""
    frozen, training = chunk_passes(1, window, sink), chunk_passes(1, window, sink)
    training.model.requires_grad_(True)
    for chunk in range(3):
        frames = range(2 * chunk, 2 * chunk + 2)
        x, x0 = torch.randn(1, 8, 12), torch.randn(1, 8, 12)
        before = training.cache.k.clone()
        expected = frozen.denoise(x, frozen.active(frames), 0.8).velocity
        leaf = x.clone().requires_grad_()
        velocity = training.denoise(leaf, training.active(frames), 0.8).velocity
        torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)
        assert torch.equal(training.cache.k, before) and not training.cache.k.requires_grad
        velocity.square().sum().backward()
        assert leaf.grad is not None and (leaf.grad.abs().amin(-1) > 0).all()
        assert training.model.blocks[0].self_attn.k.weight.grad.abs().max() > 0
        for p in (frozen, training):
            p.write_context(x0, p.active(frames))
        torch.testing.assert_close(training.cache.k, frozen.cache.k, rtol=0, atol=1e-5)


def test_gradients_against_finite_differences() -> None:
    """The derivative through cache, attention and modulation, in one random direction."""
    p = chunk_passes(1, 5, sink=1)
    p.model.double()
    p.model.requires_grad_(False)
    p.cache.k, p.cache.v = p.cache.k.double(), p.cache.v.double()
    p.text.layers = [(k.double(), v.double()) for k, v in p.text.layers]
    for chunk in range(2):
        p.write_context(torch.randn(1, 8, 12).double(), p.active(range(2 * chunk, 2 * chunk + 2)))
    active, x, direction, weight = p.active(range(4, 6)), *torch.randn(3, 1, 8, 12).double()
    leaf = x.clone().requires_grad_()
    (p.denoise(leaf, active, 0.5).velocity * weight).sum().backward()
    slope = float((leaf.grad * direction).sum())
    step = 1e-2  # norms and modulation work in fp32 whatever the dtype
    plus, minus = (float((p.denoise(x + s * direction, active, 0.5).velocity * weight).sum()) for s in (step, -step))
    assert slope == pytest.approx((plus - minus) / (2 * step), rel=2e-2)
