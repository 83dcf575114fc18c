"""The generator against diffusers' class and against a plain fp64 transcription, on weights random everywhere."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from plain_wan import plain_wan, token_positions
from tiny import make_model, randomise

from dsa_rt.cache import KVCache
from dsa_rt.convert.names import from_diffusers
from dsa_rt.errors import OptionError
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens, rope_table


def pair(
    seed: int, heads: int, head_dim: int, layers: int = 2, in_channels: int = 3, out_channels: int = 3,
    patch: tuple[int, int, int] = (1, 2, 2),
) -> tuple[WanTransformer3DModel, WanModel]:  # fmt: skip
    """diffusers' model and ours with the same random weights."""
    theirs = WanTransformer3DModel(
        patch_size=patch, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=in_channels,
        out_channels=out_channels, text_dim=20, freq_dim=32, ffn_dim=80, num_layers=layers,
    ).eval()  # fmt: skip
    randomise(theirs, seed)
    ours = WanModel(
        WanConfig(heads * head_dim, 80, heads, layers, in_channels, out_channels, 20, 7, patch=patch, freq_dim=32)
    )
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    return theirs, ours.requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 2, 14), (5, 4, 6), (2, 10, 2)])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 24), (1, 64), (1, 128), (3, 12)])
def test_forward_equals_diffusers(shape: tuple[int, int, int], heads: int, head_dim: int) -> None:
    theirs, ours = pair(sum(shape) + head_dim, heads, head_dim)
    frames, height, width = shape
    latents = torch.randn(3, 3, frames, height, width)
    timesteps = torch.tensor([1000 * torch.rand(()).item(), 0.0, 833.3333])  # another one for every sample
    text = torch.randn(3, 7, 20)
    with torch.no_grad():
        expected = theirs(latents, timesteps, text, return_dict=False)[0]
        grid = TokenGrid.for_latents(height, width, (1, 2, 2))
        active = frame_tokens(grid, range(frames), head_dim, per_frame=False)
        velocity = ours(grid.patchify(latents), active, timesteps[:, None], ours.embed_text(text)).velocity
    assert expected.std() > 0.3  # or 1e-4 would mean nothing
    assert (grid.unpatchify(velocity) - expected).abs().max() <= 1e-4


def test_forward_per_frame_timesteps_equals_diffusers() -> None:
    """Timesteps per frame, against diffusers' per-token form (Wan 2.2 TI2V), with fewer channels out than in."""
    theirs, ours = pair(5, 2, 24, in_channels=5, out_channels=2)
    latents, text = torch.randn(2, 5, 4, 6, 4), torch.randn(2, 7, 20)
    per_frame = 1000 * torch.rand(2, 4)
    per_frame[1, 2] = 0
    grid = TokenGrid.for_latents(6, 4, (1, 2, 2))
    with torch.no_grad():
        expected = theirs(latents, per_frame.repeat_interleave(grid.tokens, 1), text, return_dict=False)[0]
        active = frame_tokens(grid, range(4), 24, per_frame=True)
        velocity = ours(grid.patchify(latents), active, per_frame, ours.embed_text(text)).velocity
    assert (grid.unpatchify(velocity) - expected).abs().max() <= 1e-4


def test_forward_other_patch_equals_diffusers() -> None:
    theirs, ours = pair(6, 2, 24, patch=(1, 3, 2))
    latents, text, timesteps = torch.randn(2, 3, 2, 9, 4), torch.randn(2, 7, 20), torch.tensor([625.0, 12.0])
    grid = TokenGrid.for_latents(9, 4, (1, 3, 2))
    with torch.no_grad():
        expected = theirs(latents, timesteps, text, return_dict=False)[0]
        active = frame_tokens(grid, range(2), 24, per_frame=False)
        velocity = ours(grid.patchify(latents), active, timesteps[:, None], ours.embed_text(text)).velocity
    assert (grid.unpatchify(velocity) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("head_dim", [12, 24, 64, 128, 22])
def test_rope_equals_diffusers(head_dim: int) -> None:
    frames, height, width = 5, 3, 7
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 1, frames, 2 * height, 2 * width))
    ours_cos, ours_sin = rope_table(token_positions(list(range(frames)), height, width), head_dim)
    # diffusers repeats each value for both members of a pair
    torch.testing.assert_close(ours_cos.double(), cos[0, :, 0, 0::2].double(), rtol=0, atol=2e-7)
    torch.testing.assert_close(ours_sin.double(), sin[0, :, 0, 1::2].double(), rtol=0, atol=2e-7)


def test_forward_equals_plain_transcription_with_taps() -> None:
    """Also proves the oracle that the causal tests use."""
    model = make_model(3, layers=3)
    grid = TokenGrid.for_latents(4, 6, (1, 2, 2))
    rows, text = torch.randn(2, 3 * grid.tokens, 12), torch.randn(2, 7, 20)
    timesteps = 1000 * torch.rand(2, 3)
    active = frame_tokens(grid, range(4, 7), 24, per_frame=True)
    out = model(rows, active, timesteps, model.embed_text(text), taps=(0, 2))
    expected, taps = plain_wan(
        model.state_dict(), 2, rows, token_positions([4, 5, 6], 2, 3), timesteps.repeat_interleave(grid.tokens, 1),
        text, taps=(0, 2),
    )  # fmt: skip
    assert (out.velocity - expected).abs().max() <= 1e-4
    assert len(out.taps) == 2
    for ours, theirs in zip(out.taps, taps, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_cached_rollout_equals_block_causal_forward(chunk: int) -> None:
    """Chunk after chunk against the cache, against one forward of clean context and noisy chunk under a mask."""
    model, grid, chunks, batch = make_model(chunk), TokenGrid(2, 3), 4, 2
    frames, per_chunk = chunk * chunks, chunk * grid.tokens
    clean, text = torch.randn(batch, frames * grid.tokens, 12), torch.randn(batch, 7, 20)
    cache = poisoned_cache(batch, frames, 0, grid.tokens)
    text_kv = model.embed_text(text)
    positions = token_positions(list(range(frames)), grid.height, grid.width)
    for index in range(chunks):
        span = range(index * chunk, (index + 1) * chunk)
        active = frame_tokens(grid, span, 24, per_frame=True, slots=cache.slots(span), valid=cache.valid(span.stop))
        seen = (index + 1) * per_chunk
        order = torch.arange(seen) // per_chunk
        for _ in range(2):  # the second pass overwrites the K/V of the first
            sigma = torch.rand(batch, 1).expand(batch, chunk)
            noisy = torch.randn(batch, per_chunk, 12)
            velocity = model(noisy, active, 1000 * sigma, text_kv, cache).velocity
            rows = torch.cat([clean[:, : seen - per_chunk], noisy], 1)
            timesteps = torch.zeros(batch, seen)
            timesteps[:, -per_chunk:] = 1000 * sigma[:, :1]
            expected, _ = plain_wan(
                model.state_dict(), 2, rows, positions[:seen], timesteps, text, order[:, None] >= order[None, :]
            )
            assert (velocity - expected[:, -per_chunk:]).abs().max() <= 1e-4
        model(clean[:, seen - per_chunk : seen], active, torch.zeros(batch, chunk), text_kv, cache)


@pytest.mark.parametrize(
    ("window", "sink", "chunk"), [(5, 0, 2), (5, 1, 2), (7, 2, 3), (6, 3, 3), (4, 3, 1), (8, 4, 3)]
)
def test_rollout_past_the_window(window: int, sink: int, chunk: int) -> None:
    """Past the window a pass sees the frames of the window and no others, at their absolute positions.

    The oracle keeps all frames and masks: a context frame saw what was in the window when it was written. A window
    that chunks do not divide cuts chunks in two.
    """
    model, grid, chunks = make_model(window), TokenGrid(1, 2), 6
    text = torch.randn(1, 7, 20)
    text_kv = model.embed_text(text)
    cache = poisoned_cache(1, window, sink, grid.tokens)
    frames, tokens = chunks * chunk, grid.tokens
    clean = torch.randn(1, frames * tokens, 12)
    positions = token_positions(list(range(frames)), 1, 2)
    frame_of = torch.arange(frames * tokens) // tokens
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    kept: list[int] = []
    for index in range(chunks):
        span = range(index * chunk, (index + 1) * chunk)
        while len(kept) + chunk > window:
            del kept[sink]
        kept.extend(span)
        for frame in span:
            sees[frame, kept] = True
        active = frame_tokens(grid, span, 24, per_frame=True, slots=cache.slots(span), valid=cache.valid(span.stop))
        noisy = torch.randn(1, chunk * tokens, 12)
        velocity = model(noisy, active, torch.full((1, chunk), 700.0), text_kv, cache).velocity
        seen = span.stop * tokens
        rows = torch.cat([clean[:, : seen - chunk * tokens], noisy], 1)
        timesteps = torch.zeros(1, seen)
        timesteps[:, -chunk * tokens :] = 700.0
        mask = sees[frame_of[:seen]][:, frame_of[:seen]]
        expected, _ = plain_wan(model.state_dict(), 2, rows, positions[:seen], timesteps, text, mask)
        assert (velocity - expected[:, -chunk * tokens :]).abs().max() <= 1e-4
        model(clean[:, seen - chunk * tokens : seen], active, torch.zeros(1, chunk), text_kv, cache)
    assert not sees[-1].all()  # the window was passed


def test_some_active_tokens_against_stale_keys() -> None:
    """An active set that is a part of a chunk, in any order: its K/V are fresh, all others stay from the last pass."""
    model, grid, count = make_model(8), TokenGrid(3, 3), 2
    tokens, text = count * grid.tokens, torch.randn(2, 7, 20)
    text_kv = model.embed_text(text)
    cache = poisoned_cache(2, count, 0, grid.tokens)
    span = range(count)
    everything = frame_tokens(grid, span, 24, per_frame=True, slots=cache.slots(span), valid=cache.valid(count))
    old, new = torch.randn(2, tokens, 12), torch.randn(2, tokens, 12)
    model(old, everything, torch.full((2, count), 900.0), text_kv, cache)
    chosen = torch.randperm(tokens)[:7]
    part = ActiveSet(
        chosen, everything.cos[chosen], everything.sin[chosen], everything.modulation_rows[chosen],
        everything.slots[chosen], everything.valid,
    )  # fmt: skip
    timesteps = torch.tensor([[500.0, 300.0], [40.0, 990.0]])
    velocity = model(new[:, chosen], part, timesteps, text_kv, cache).velocity

    positions = token_positions([0, 1], 3, 3)
    of_frame = positions[:, 0]
    rows = torch.cat([old, new[:, chosen]], 1)
    steps = torch.cat([torch.full((2, tokens), 900.0), timesteps[:, of_frame[chosen]]], 1)
    mask = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.bool)
    mask[:tokens, :tokens] = True
    mask[tokens:, tokens:] = True
    stale = torch.ones(tokens, dtype=torch.bool)
    stale[chosen] = False
    mask[tokens:, :tokens] = stale
    expected, _ = plain_wan(
        model.state_dict(), 2, rows, torch.cat([positions, positions[chosen]]), steps, text, mask
    )
    assert (velocity - expected[:, tokens:]).abs().max() <= 1e-4


def test_bf16_forward_is_near_fp32() -> None:
    """Mixed precision: the error stays of the order of the dtype, norms and modulation being fp32 inside."""
    model = make_model(9)
    grid = TokenGrid(2, 3)
    rows, text, timesteps = torch.randn(2, 12, 12), torch.randn(2, 7, 20), torch.tensor([[937.5], [0.0]])
    active = frame_tokens(grid, range(2), 24, per_frame=False)
    exact = model(rows, active, timesteps, model.embed_text(text)).velocity
    half = make_model(9).to(torch.bfloat16)
    rough = half(rows, active, timesteps, half.embed_text(text)).velocity
    assert rough.dtype == torch.bfloat16
    assert 1e-5 < (rough.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 50, "heads": 4}, "50"), ({"dim": 9, "heads": 3}, "9"), ({"layers": 0}, "0"), ({"heads": 2.0}, "2.0"),
        ({"freq_dim": 31}, "31"), ({"patch": (2, 2, 2)}, r"\(2, 2, 2\)"), ({"form": "acausal"}, "acausal"),
        ({"text_dim": -1}, "-1"),
    ],
)  # fmt: skip
def test_wrong_sizes(change: dict[str, object], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        make_model(**change)


def poisoned_cache(batch: int, window: int, sink: int, tokens: int) -> KVCache:
    """Rows that were never written are NaN, so that attending one shows."""
    cache = KVCache(
        layers=2, batch=batch, window=window, sink=sink, tokens_per_frame=tokens, heads=2, head_dim=24,
        dtype=torch.float32,
    )  # fmt: skip
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache
