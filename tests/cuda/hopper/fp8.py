"""The Hopper kernel with K and V in E4M3 on the CPU, as :mod:`cuda.hopper` has the one for bf16."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_char_p, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from . import LATE, WHOLE, Heads, Params, Splitting, library, params


class Scales(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Scales:
        return cls(x.data_ptr(), *x.stride()[:2])


class ScaledParams(Structure):
    """ScaledAttentionParams of kernels/attention.h."""

    _fields_ = [("params", Params), ("k_scale", Scales), ("v_scale", Scales)]


class Request(Structure):
    _fields_ = [
        ("params", ScaledParams),
        ("splitting", Splitting),
        ("scratch", c_void_p),
        ("seed", c_uint64),
        ("late", c_int64),
    ]


Cache = tuple[Tensor, Tensor, Tensor, Tensor]  # k, v in E4M3, k_scale, v_scale


def scaled_params(
    out: Tensor, q: Tensor, cache: Cache, lse: Tensor | None = None, segments: list[list[int]] | None = None
) -> ScaledParams:
    """The arguments of ``active_attention_fp8``; segments are [queries, begin, end, begin, end]."""
    k, v, k_scale, v_scale = cache
    return ScaledParams(params(out, q, k, v, lse, segments), Scales.of(k_scale), Scales.of(v_scale))


def refusal(p: ScaledParams) -> str:
    """Why the kernel does not take the arguments; empty where it does."""
    library().fp8_refusal.restype = c_char_p
    return library().fp8_refusal(byref(p)).decode()


def run(
    p: ScaledParams, splitting: Splitting, scratch: Tensor | None = None, seed: int = 0, late: str = "nothing"
) -> None:
    """As :func:`cuda.hopper.run`."""
    library().fp8_run.restype = c_char_p
    address = None if scratch is None else scratch.data_ptr()
    if error := library().fp8_run(byref(Request(p, splitting, address, seed, LATE.index(late)))):
        raise RuntimeError(error.decode())


def scratch_floats(p: ScaledParams, splitting: Splitting) -> int:
    """How many floats of scratch a run takes."""
    library().fp8_scratch_of.restype = c_int64
    library().fp8_scratch_of.argtypes = [POINTER(ScaledParams), POINTER(Splitting)]
    return int(library().fp8_scratch_of(byref(p), byref(splitting)))


def attend(
    q: Tensor, cache: Cache, segments: list[list[int]] | None = None, splitting: Splitting = WHOLE, seed: int = 0,
    late: str = "products",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`cuda.hopper.attend`."""
    batch, active, heads, dim = q.shape
    buffer = torch.full((batch, active + 2, heads, dim), float("nan"), dtype=torch.bfloat16)
    sums = torch.full((batch, heads, active + 3), float("nan"))
    out, lse = buffer[:, 1:-1], sums[..., 1:-2]
    p = scaled_params(out, q, cache, lse, segments)
    size = scratch_floats(p, splitting)
    scratch = torch.full((size + 64,), float("nan"))
    run(p, splitting, scratch, seed, late)
    assert buffer[:, [0, -1]].isnan().all() and sums[..., [0, -2, -1]].isnan().all()
    assert scratch[size:].isnan().all()
    return out, lse


__all__ = ["Cache", "Heads", "ScaledParams", "Scales", "attend", "refusal", "run", "scaled_params", "scratch_floats"]
