"""active_attention_fp8 on a Hopper GPU, called as a model calls it, against fp64 with the kernel's roundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops.attention import active_attention_fp8
from dsa_rt.reference import layers as reference

from .attention_oracle import Segments, random_segments
from .fp8_oracle import E4M3, check, codes_of, poison, random_cache
from .hopper.fp8 import Cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
dims = pytest.mark.parametrize("dim", [64, 128])
SUMS = 2.0**-12  # 8-bit products keep about 14 bits of a sum


def queries(batch: int, active: int, heads: int, dim: int) -> Tensor:
    """Numbers of E4M3 with a scale of 2^-6 or 2^-5, so that no rounding of 1 / scale decides on a code."""
    codes = torch.randn(batch, active, heads, dim).mul(64).clamp(-400, 400).to(E4M3).float()
    codes[..., 0] = 448
    return (codes * 2.0 ** -torch.randint(5, 7, codes.shape[:-1])[..., None]).bfloat16().cuda()


def cache_of(rng: np.random.Generator, batch: int, rows: int, heads: int, dim: int) -> Cache:
    return random_cache(rng, batch, rows, heads, dim, 0.5, "cuda")


def run(
    q: Tensor, cache: Cache, scratch: Tensor | None = None, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp of the native kernel, both parts of larger tensors whose other elements stay as they are;
    keys are split where there is scratch."""
    batch, active, heads, dim = q.shape
    buffer = torch.full((batch, active + 2, heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    sums = torch.full((batch, heads, active + 3), float("nan"), device="cuda")
    out, lse = buffer[:, 1:-1], sums[..., 1:-2]
    table = None if segments is None else torch.tensor(segments)
    stream = torch.cuda.current_stream().cuda_stream
    _native.active_attention_fp8(out, lse, q, *cache, table, scratch=scratch, stream=stream)
    assert buffer[:, [0, -1]].isnan().all() and sums[..., [0, -2, -1]].isnan().all()
    return out, lse


def defused(cache: Cache) -> Cache:
    """Zeros for NaN."""
    found = [x.nan_to_num(0) if x.dtype == torch.float32 else codes_of(x).clone() for x in cache]
    for codes in found[:2]:
        codes[codes & 0x7F == 0x7F] = 0
    return found[0].view(E4M3), found[1].view(E4M3), found[2], found[3]


@dims
@pytest.mark.parametrize("case", range(6))
def test_a_layer_of_a_cache(dim: int, case: int, rng: np.random.Generator) -> None:
    """Odd sizes that divide nothing; fewer and more tiles than multiprocessors."""
    batch, active, rows, heads = (int(n) for n in rng.integers((1, 1, 1, 1), (3, 900, 2000, 9)))
    print(f"batch {batch}, active {active}, rows {rows}, heads {heads}")
    q, cache = queries(batch, active, heads, dim), cache_of(rng, batch, rows, heads, dim)
    check(*run(q, cache), q, cache, sums=SUMS)


@dims
@pytest.mark.parametrize("most", [1, 2, 8])
def test_segments_see_their_ranges_alone(dim: int, most: int, rng: np.random.Generator) -> None:
    batch, active, rows = 2, int(rng.integers(1, 1500)), int(rng.integers(1, 1500))
    segments = random_segments(rng, active, rows, most)
    print(f"active {active}, rows {rows}, segments {segments}")
    q, cache = queries(batch, active, 3, dim), cache_of(rng, batch, rows, 3, dim)
    poison(cache, segments)
    check(*run(q, cache, None, segments), q, defused(cache), segments, sums=SUMS)


@dims
@pytest.mark.parametrize("active", [1, 64, 65, 128, 129])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 384, 513])
def test_at_the_edges_of_tiles(dim: int, active: int, rows: int, rng: np.random.Generator) -> None:
    q, cache = queries(1, active, 2, dim), cache_of(rng, 1, rows, 2, dim)
    check(*run(q, cache), q, cache, sums=SUMS)


@dims
def test_as_near_to_the_definition_as_the_notes_say(dim: int, rng: np.random.Generator) -> None:
    """Normal numbers; a root mean square of 0.037 or 0.038 where sums are exact."""
    q = torch.randn(1, 1111, 4, dim, device="cuda").bfloat16()
    (k, k_scale), (v, v_scale) = (reference.quantize_rows(torch.randn(1, 4001, 4, dim, device="cuda")) for _ in "kv")
    out = torch.empty_like(q)
    active_attention_fp8(out, q, k, v, k_scale, v_scale, backend="native")
    want = reference.active_attention_fp8(q.float(), k, v, k_scale, v_scale)
    assert (out.float() - want).square().mean().sqrt() <= 0.045 * want.square().mean().sqrt()


@dims
@pytest.mark.parametrize("active", [333, 2000])
def test_the_same_bits_in_every_run(dim: int, active: int, rng: np.random.Generator) -> None:
    """Where keys are split and where they are not."""
    q, cache = queries(2, active, 8, dim), cache_of(rng, 2, 5000, 8, dim)

    def call() -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), torch.empty(2, 8, active, device="cuda")
        active_attention_fp8(out, q, *cache, lse, backend="native")
        return out, lse

    first = call()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@dims
@pytest.mark.parametrize("active, rows, heads", [(1, 32760, 12), (131, 9360, 5), (400, 8190, 12)])
def test_split_keys(dim: int, active: int, rows: int, heads: int, rng: np.random.Generator) -> None:
    """Through scratch that holds NaN and is as small as may be; as without it, but for rounding."""
    q, cache = queries(1, active, heads, dim), cache_of(rng, 1, rows, heads, dim)
    count = _native.active_attention_fp8_scratch(q, None, q, *cache)
    assert count > 0
    scratch = torch.full((count + 64,), float("nan"), device="cuda")
    out, lse = run(q, cache, scratch[:count])
    assert scratch[count:].isnan().all() and not scratch[:count].isnan().all()
    whole = run(q, cache)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)
    assert (out - whole[0]).float().square().mean().sqrt() <= 0.05 * whole[0].float().square().mean().sqrt()
    with pytest.raises(ShapeError, match="scratch"):
        run(q, cache, scratch[: count - 1])


@dims
def test_nan_stays_where_it_belongs(dim: int, rng: np.random.Generator) -> None:
    """Of a query: its row. Of a value's code: its channel; its scale: all channels. Of a key's scale: everything."""
    q, cache = queries(1, 300, 2, dim), cache_of(rng, 1, 700, 2, dim)
    k, v, k_scale, v_scale = cache
    clean, clean_lse = run(q, cache)
    hit, column, row = (int(rng.integers(n)) for n in (300, dim, 700))
    for what in ("nan", "inf"):
        spoilt = q.clone()
        spoilt[:, hit, :, column] = float(what)
        out, lse = run(spoilt, cache)
        others = torch.arange(300, device="cuda") != hit
        assert out[:, hit].isnan().all() and lse[..., hit].isnan().all()
        assert torch.equal(out[:, others], clean[:, others]) and torch.equal(lse[..., others], clean_lse[..., others])
    codes = codes_of(v).clone()
    codes[:, row, :, column] = 0x7F
    out, lse = run(q, (k, codes.view(E4M3), k_scale, v_scale))
    columns = torch.arange(dim, device="cuda") != column
    assert out[..., column].isnan().all() and torch.equal(out[..., columns], clean[..., columns])
    scale = v_scale.clone()
    scale[:, row] = float("nan")
    out, lse = run(q, (k, v, k_scale, scale))
    assert out.isnan().all() and torch.equal(lse, clean_lse)
    scale = k_scale.clone()
    scale[:, row] = float("nan")
    out, lse = run(q, (k, v, scale, v_scale))
    assert out.isnan().all() and lse.isnan().all()


@dims
def test_in_a_graph(dim: int, rng: np.random.Generator) -> None:
    """Replays see the tensors' new values; segments are those of the capture, and split keys use its scratch."""
    segments = [[150, 0, 64, 200, 6001], [183, 10, 7999, 7999, 7999]]
    q, cache = queries(1, 333, 4, dim), cache_of(rng, 1, 7999, 4, dim)
    assert _native.active_attention_fp8_scratch(q, None, q, *cache, torch.tensor(segments)) > 0
    out, lse = torch.empty_like(q), torch.empty(1, 4, 333, device="cuda")
    held = torch.tensor(segments)

    def call() -> None:
        active_attention_fp8(out, q, *cache, lse, held, backend="native")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(2):
        q.copy_(queries(1, 333, 4, dim))
        for kept, fresh in zip(cache, cache_of(rng, 1, 7999, 4, dim), strict=True):
            kept.view(torch.uint8 if kept.dtype == E4M3 else kept.dtype).copy_(
                fresh.view(torch.uint8 if fresh.dtype == E4M3 else fresh.dtype)
            )
        call()
        want = out.clone(), lse.clone()
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_what_it_does_not_serve_is_refused(rng: np.random.Generator) -> None:
    cache = cache_of(rng, 1, 9, 1, 80)
    with pytest.raises(OptionError):
        active_attention_fp8(torch.empty(1, 5, 1, 80).bfloat16().cuda(), queries(1, 5, 1, 80), *cache, backend="native")
    q = queries(1, 5, 1, 64).float()
    with pytest.raises(OptionError):
        active_attention_fp8(torch.empty_like(q), q, *cache_of(rng, 1, 9, 1, 64), backend="native")
