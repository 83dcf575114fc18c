"""The Hopper kernels on the CPU: their own source, compiled by the C++ compiler with the headers of this folder in
place of the five that hold instructions. What is checked is everything but those five."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "kernels"
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # of kernels/element.h
INSTRUCTIONS = ("barrier.cuh", "instructions_fp8.cuh", "registers.cuh", "tma.cuh", "wgmma.cuh")


class Heads(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        return cls(x.data_ptr(), *x.stride()[:3])


class Params(Structure):
    """AttentionParams of kernels/attention.h."""

    _fields_ = [
        *((name, Heads) for name in ("out", "q", "k", "v")),
        ("element", c_int),
        ("lse", c_void_p),
        *((name, c_int64) for name in ("lse_batch_stride", "lse_head_stride")),
        *((name, c_int64) for name in ("batch", "heads", "active", "rows", "dim")),
        ("segments", POINTER(c_int64)),
        ("segment_count", c_int64),
    ]


class Splitting(Structure):
    """On how many multiprocessors, and how the keys of the last tiles are split: not at all; as the host decides;
    those of the tiles from ``whole`` on into parts of ``length`` key tiles or less."""

    _fields_ = [("blocks", c_int64), ("decided", c_int64), ("whole", c_int64), ("length", c_int64)]


class Request(Structure):
    _fields_ = [
        ("params", Params),
        ("splitting", Splitting),
        ("scratch", c_void_p),
        ("seed", c_uint64),
        ("late", c_int64),
    ]


def params(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None = None,
    segments: list[list[int]] | None = None,
) -> Params:
    """The arguments of ``active_attention``; segments are [queries, begin, end, begin, end]."""
    p = Params(*map(Heads.of, (out, q, k, v)), ELEMENTS.index(q.dtype))
    p.batch, p.active, p.heads, p.dim = q.shape
    p.rows = k.shape[1]
    if lse is not None:
        p.lse, p.lse_batch_stride, p.lse_head_stride = lse.data_ptr(), *lse.stride()[:2]
    if segments is not None:
        # the struct holds both begins, then both ends
        flat = [x for queries, a, b, c, d in segments for x in (queries, a, c, b, d)]
        p.segments, p.segment_count = (c_int64 * len(flat))(*flat), len(segments)
    return p


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled emulation; RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "kernels"
        shutil.copytree(
            KERNELS, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__", "cpu", "triton")
        )
        for name in (*INSTRUCTIONS, "device.h"):
            shutil.copy(HERE / name, sources / "cuda/hopper" / name)
        built = Path(folder) / "attention.so"
        flags = [
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ]
        header = sources / "cuda/hopper/device.h"
        folders = [f"-I{folder}", f"-I{HERE.parent}"]
        entries = [HERE / "attention.cpp", HERE / "attention_fp8.cpp"]
        command = ["c++", *flags, *folders, "-include", header, *entries, "-o", built]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        loaded = ctypes.CDLL(str(built))
    loaded.attention_run.restype = loaded.attention_refusal.restype = c_char_p
    plan, table = [POINTER(Params), POINTER(Splitting)], POINTER(c_int64)
    for name, arguments in {
        "key_tiles_of": [POINTER(Params), c_int64, table],
        "plan_joins": [*plan, table],
        "plan_works": [*plan, c_int64, table],
        "scratch_of": plan,
    }.items():
        getattr(loaded, name).restype, getattr(loaded, name).argtypes = c_int64, arguments
    for name in ("k_major_descriptor", "mn_major_descriptor"):
        getattr(loaded, name).restype = c_uint64
        getattr(loaded, name).argtypes = [c_uint32, c_int, c_int]
    return loaded


LATE = ("nothing", "copies", "products")


def run(
    p: Params,
    splitting: Splitting,
    scratch: Tensor | None = None,
    seed: int = 0,
    late: str = "nothing",
) -> None:
    """Runs the attention kernel, and the one that joins parts, block after block; RuntimeError where one deadlocks or
    misuses a barrier. ``scratch``: fp32, of :func:`scratch_floats`. ``late``, of :data:`LATE`, happens only when
    nothing else can."""
    address = None if scratch is None else scratch.data_ptr()
    if error := library().attention_run(byref(Request(p, splitting, address, seed, LATE.index(late)))):
        raise RuntimeError(error.decode())


WHOLE = Splitting(1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[list[int]] | None = None,
    splitting: Splitting = WHOLE,
    seed: int = 0,
    late: str = "products",
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp of a :func:`run`, both parts of larger tensors whose other elements stay as they are, through
    scratch that holds NaN, and behind it what stays as it is."""
    batch, active, heads, dim = q.shape

    def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    buffer = poison(batch, active + 2, heads, dim, dtype=q.dtype)
    sums = poison(batch, heads, active + 3)
    out, lse = buffer[:, 1:-1], sums[..., 1:-2]
    p = params(out, q, k, v, lse, segments)
    size = scratch_floats(p, splitting)
    scratch = poison(size + 64)
    run(p, splitting, scratch, seed, late)
    assert buffer[:, [0, -1]].isnan().all() and sums[..., [0, -2, -1]].isnan().all()
    assert scratch[size:].isnan().all()
    return out, lse


def scratch_floats(p: Params, splitting: Splitting) -> int:
    """How many floats of scratch a run takes."""
    return int(library().scratch_of(byref(p), byref(splitting)))


@dataclass(frozen=True)
class Plan:
    """tiles, those of them that are whole, works; works of each block [first query, batch, head, queries, first and end
    key tile, slot]; what is joined [first query, batch, head, parts, first slot, stride]."""

    tiles: int
    whole: int
    works: int
    of_block: list[np.ndarray]
    joins: np.ndarray


def plan(p: Params, splitting: Splitting) -> Plan:
    """What a run would do."""
    sizes = (c_int64 * 3)()
    library().plan_sizes(byref(p), byref(splitting), sizes)
    tiles, whole, works = sizes
    buffer = (c_int64 * (7 * (works + 1)))()
    of_block = []
    for block in range(splitting.blocks):
        count = library().plan_works(byref(p), byref(splitting), block, buffer)
        of_block.append(np.array(buffer[: 7 * count], int).reshape(-1, 7))
    count = library().plan_joins(byref(p), byref(splitting), buffer)
    return Plan(tiles, whole, works, of_block, np.array(buffer[: 6 * count], int).reshape(-1, 6))


def refusal(p: Params) -> str:
    """Why the kernel does not take the arguments; empty where it does."""
    return library().attention_refusal(byref(p)).decode()
