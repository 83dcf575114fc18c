"""active_attention on a Hopper GPU, called as a model calls it, against fp64 and the framework's attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops.attention import active_attention

from .attention_oracle import HALVES, Segments, check, poison_outside, random_segments, slices_of_a_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
dims = pytest.mark.parametrize("dim", [64, 128])
dtypes = pytest.mark.parametrize("dtype", HALVES)


def queries(batch: int, active: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(batch, active, heads, dim, device="cuda").to(dtype)


def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp, both parts of larger tensors whose other elements stay as they are."""
    batch, active, heads, dim = q.shape
    buffer = torch.full((batch, active + 2, heads, dim), float("nan"), dtype=q.dtype, device="cuda")
    sums = torch.full((batch, heads, active + 3), float("nan"), device="cuda")
    out, lse = buffer[:, 1:-1], sums[..., 1:-2]
    active_attention(
        out, q, k, v, lse, None if segments is None else torch.tensor(segments), backend="native"
    )
    assert buffer[:, [0, -1]].isnan().all() and sums[..., [0, -2, -1]].isnan().all()
    return out, lse


@dims
@dtypes
@pytest.mark.parametrize("case", range(8))
def test_a_layer_of_a_cache(dim: int, dtype: torch.dtype, case: int, rng: np.random.Generator) -> None:
    """Odd sizes that divide nothing; fewer and more tiles than multiprocessors."""
    batch, active, rows, heads = (int(n) for n in rng.integers((1, 1, 1, 1), (4, 1500, 3000, 13)))
    print(f"batch {batch}, active {active}, rows {rows}, heads {heads}")
    q = queries(batch, active, heads, dim, dtype)
    k, v = slices_of_a_cache(batch, rows, heads, dim, "cuda", dtype)
    check(*run(q, k, v), q, k, v)


@dims
@dtypes
@pytest.mark.parametrize("most", [1, 2, 8])
def test_segments_see_their_ranges_alone(
    dim: int, dtype: torch.dtype, most: int, rng: np.random.Generator
) -> None:
    batch, active, rows = 2, int(rng.integers(1, 2000)), int(rng.integers(1, 2000))
    segments = random_segments(rng, active, rows, most)
    print(f"active {active}, rows {rows}, segments {segments}")
    q = queries(batch, active, 3, dim, dtype)
    k, v = slices_of_a_cache(batch, rows, 3, dim, "cuda", dtype)
    poison_outside(k, segments)
    poison_outside(v, segments)
    check(*run(q, k, v, segments), q, k, v, segments)


@dims
@dtypes
@pytest.mark.parametrize("active", [1, 64, 65, 128, 129])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 384, 513])
def test_at_the_edges_of_tiles(
    dim: int, dtype: torch.dtype, active: int, rows: int, rng: np.random.Generator
) -> None:
    q = queries(1, active, 2, dim, dtype)
    k, v = slices_of_a_cache(1, rows, 2, dim, "cuda", dtype)
    check(*run(q, k, v), q, k, v)


@dims
@dtypes
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_as_exact_as_the_framework(
    dim: int, dtype: torch.dtype, scale: float, rng: np.random.Generator
) -> None:
    """Largest and mean error against fp64 at most 1.5 times those of the framework's attention in the same dtype."""
    q = scale * queries(1, 1111, 4, dim, dtype)
    k, v = slices_of_a_cache(1, 4001, 4, dim, "cuda", dtype)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(q_.double(), k_.double(), v_.double()).transpose(1, 2)
    theirs = (F.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).double() - want).abs()
    ours = (run(q, k, v)[0].double() - want).abs()
    assert ours.max() <= 1.5 * theirs.max() and ours.mean() <= 1.5 * theirs.mean()


@dims
@pytest.mark.parametrize("active", [333, 2000])
def test_the_same_bits_in_every_run(dim: int, active: int, rng: np.random.Generator) -> None:
    """Where keys are split and where they are not."""
    q = queries(2, active, 8, dim)
    k, v = slices_of_a_cache(2, 5000, 8, dim, "cuda")
    first = run(q, k, v)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(q, k, v), strict=True))


def natively(q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.full_like(q, float("nan")), torch.full((*q.shape[:3],), float("nan"), device="cuda")
    lse = lse.transpose(1, 2).contiguous()
    stream = torch.cuda.current_stream().cuda_stream
    _native.active_attention(out, lse, q, k, v, scratch=scratch, stream=stream)
    return out, lse


@dims
def test_without_scratch_the_same_bits_in_every_active_set(dim: int, rng: np.random.Generator) -> None:
    q = queries(2, 2000, 8, dim)
    k, v = slices_of_a_cache(2, 5000, 8, dim, "cuda")
    first = natively(q, k, v, None)
    some = torch.randperm(2000, device="cuda")[:333]
    out, lse = natively(q[:, some], k, v, None)
    assert torch.equal(out, first[0][:, some]) and torch.equal(lse, first[1][..., some])


@dims
@dtypes
@pytest.mark.parametrize("active, rows, heads", [(1, 32760, 12), (131, 9360, 5), (400, 8190, 12), (1409, 5003, 12)])
def test_split_keys(
    dim: int, dtype: torch.dtype, active: int, rows: int, heads: int, rng: np.random.Generator
) -> None:
    """Through scratch that holds NaN and is as small as may be; as without it, but for rounding."""
    q = queries(1, active, heads, dim, dtype)
    k, v = slices_of_a_cache(1, rows, heads, dim, "cuda", dtype)
    count = _native.active_attention_scratch(q, None, q, k, v)
    assert count > 0
    scratch = torch.full((count + 64,), float("nan"), device="cuda")
    out, lse = natively(q, k, v, scratch[:count])
    assert scratch[count:].isnan().all() and not scratch[:count].isnan().all()
    whole = natively(q, k, v, None)
    assert not torch.equal(lse, whole[1])
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)
    some = torch.randperm(active, device="cuda")[:100]
    check(out[:, some], lse[..., some], q[:, some], k, v)
    with pytest.raises(ShapeError, match="scratch"):
        natively(q, k, v, scratch[: count - 1])
    with pytest.raises(ShapeError, match="scratch"):
        natively(q, k, v, scratch[1 : count + 1])


@dims
def test_nan_in_a_query_stays_in_its_row(dim: int, rng: np.random.Generator) -> None:
    q = queries(1, 300, 2, dim)
    k, v = slices_of_a_cache(1, 700, 2, dim, "cuda")
    clean, clean_lse = run(q, k, v)
    hit = int(rng.integers(300))
    q[:, hit] = float("nan")
    out, lse = run(q, k, v)
    assert out[:, hit].isnan().all() and lse[..., hit].isnan().all()
    others = torch.arange(300, device="cuda") != hit
    assert torch.equal(out[:, others], clean[:, others]) and torch.equal(
        lse[..., others], clean_lse[..., others]
    )


@dims
@dtypes
def test_in_a_graph(dim: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Replays see the tensors' new values; segments are those of the capture, and split keys use its scratch."""
    segments = [[150, 0, 64, 200, 6001], [183, 10, 7999, 7999, 7999]]
    q = queries(1, 333, 4, dim, dtype)
    k, v = slices_of_a_cache(1, 7999, 4, dim, "cuda", dtype)
    assert _native.active_attention_scratch(q, None, q, k, v, torch.tensor(segments)) > 0
    out, lse = torch.empty_like(q), torch.empty(1, 4, 333, device="cuda")
    held = torch.tensor(segments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        active_attention(out, q, k, v, lse, held, backend="native")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        active_attention(out, q, k, v, lse, held, backend="native")
    held.zero_()
    for _ in range(2):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        check(out, lse, q, k, v, segments)


def test_wan_at_480p(rng: np.random.Generator) -> None:
    """The shape the kernel is for: 1170 active tokens, 32760 rows, 12 heads of 128."""
    q = queries(1, 1170, 12, 128)
    k, v = slices_of_a_cache(1, 32760, 12, 128, "cuda")
    out, lse = run(q, k, v)
    for head in range(0, 12, 5):
        part = [x[:, :, head : head + 1] for x in (out, q, k, v)]
        check(part[0][:, :200], lse[:, head : head + 1, :200], part[1][:, :200], part[2], part[3])


def test_what_it_does_not_serve_is_refused(rng: np.random.Generator) -> None:
    for x in (queries(1, 5, 1, 80), queries(1, 5, 1, 64).float(), queries(1, 5, 1, 72)[..., 4:68]):
        with pytest.raises(OptionError):
            active_attention(torch.empty_like(x), x, x, x, backend="native")
