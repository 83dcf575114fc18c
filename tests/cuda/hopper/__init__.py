"""The Hopper kernels on the CPU: their own source, compiled by the C++ compiler with the headers of this folder in
place of the four that hold instructions. What is checked is everything but those four."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "kernels"
INSTRUCTIONS = ("barrier.cuh", "registers.cuh", "tma.cuh", "wgmma.cuh")


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


class Request(Structure):
    _fields_ = [("params", Params), ("blocks", c_int64), ("seed", c_uint64), ("late", c_int64)]


def params(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None = None,
    segments: list[list[int]] | None = None,
) -> Params:
    """The arguments of ``active_attention``; segments are [queries, begin, end, begin, end]."""
    p = Params(*map(Heads.of, (out, q, k, v)), int(q.dtype == torch.bfloat16))
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
        command = ["c++", *flags, f"-I{folder}", "-include", header, HERE / "attention.cpp", "-o", built]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
        loaded = ctypes.CDLL(str(built))
    loaded.attention_run.restype = loaded.attention_refusal.restype = c_char_p
    loaded.plan_tiles.restype = loaded.key_tiles_of.restype = c_int64
    loaded.plan_tiles.argtypes = [POINTER(Params), c_int64, c_int64, POINTER(c_int64)]
    loaded.key_tiles_of.argtypes = [POINTER(Params), c_int64, POINTER(c_int64)]
    for name in ("k_major_descriptor", "mn_major_descriptor"):
        getattr(loaded, name).restype = c_uint64
        getattr(loaded, name).argtypes = [c_uint32, c_int, c_int]
    return loaded


LATE = ("nothing", "copies", "products")


def run(p: Params, blocks: int = 1, seed: int = 0, late: str = "nothing") -> None:
    """Runs the attention kernel on that many blocks, one after the other; RuntimeError where one deadlocks or misuses
    a barrier. ``late``, of :data:`LATE`, happens only when nothing else can."""
    if error := library().attention_run(byref(Request(p, blocks, seed, LATE.index(late)))):
        raise RuntimeError(error.decode())


def refusal(p: Params) -> str:
    """Why the kernel does not take the arguments; empty where it does."""
    return library().attention_refusal(byref(p)).decode()
