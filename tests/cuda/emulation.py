"""CUDA kernels on the CPU: ``kernels/cuda/*.cu`` compiled by the C++ compiler against ``emulator/``, which runs a
thread as a fiber. :class:`Emulated` has the ops of ``dsa_rt._native`` with the same arguments, on CPU tensors.

Logic, addresses and alignment are those of the real kernels; speed, memory ordering and the rounding of rsqrt
and exp2 are not.
"""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import POINTER, Structure, c_bool, c_float, c_int, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("step", "layers", "confidence_pool", "quantize")


def build(folder: Path) -> ctypes.CDLL:
    """The shared library of the emulated kernels; RuntimeError with the compiler's words."""
    emulator, library = ROOT / "tests/cuda/emulator", folder / "emulated.so"
    kernels = [ROOT / f"kernels/cuda/{name}.cu" for name in SOURCES]
    command = ["c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-w",
               f"-I{emulator}", "-o", library, "-x", "c++", *kernels, emulator / "emulator.cpp"]  # fmt: skip
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(built.stderr)
    return ctypes.CDLL(str(library))


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("element", c_int)]

    @classmethod
    def of(cls, x: Tensor | None) -> Rows:
        return cls() if x is None else cls(x.data_ptr(), x.stride(0), x.stride(1), _element(x))


class Heads(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("head_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        return cls(x.data_ptr(), *x.stride()[:3])


class Modulation(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor | None) -> Modulation:
        if x is None:
            return cls()
        return cls(x.data_ptr(), x.stride(0) * (x.shape[0] > 1), x.stride(1) * (x.shape[1] > 1))


class NormModulateParams(Structure):
    _fields_ = [
        *((name, Rows) for name in ("out", "x", "sum", "y")),
        *((name, Modulation) for name in ("gate", "shift", "scale")),
        ("table_rows", c_void_p), *((name, c_int64) for name in ("table_length", "batch", "active", "width")),
        ("eps", c_float), ("streams", c_bool),
    ]  # fmt: skip


class RmsNormParams(Structure):
    _fields_ = [
        ("out", Rows), ("x", Rows), ("weight", c_void_p), ("weight_element", c_int),
        *((name, c_int64) for name in ("batch", "active", "width")), ("eps", c_float), ("streams", c_bool),
    ]  # fmt: skip


class QkNormRopeStoreParams(Structure):
    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v")), *((name, Heads) for name in ("q_out", "k_cache", "v_cache")),
        ("q_weight", c_void_p), ("k_weight", c_void_p), ("weight_element", c_int),
        *((name, c_void_p) for name in ("cos", "sin", "slots")),
        *((name, c_int64) for name in ("batch", "active", "heads", "dim", "cache_rows")), ("eps", c_float),
        ("streams", c_bool),
    ]  # fmt: skip


class MoveRowsParams(Structure):
    _fields_ = [
        ("out", c_void_p), ("from", c_void_p),
        *((name, c_int64) for name in ("out_batch", "out_row", "from_batch", "from_row")), ("rows", c_void_p),
        *((name, c_int64) for name in ("batch", "active", "all_rows", "row_bytes")), ("streams", c_bool),
    ]  # fmt: skip


class ConfidencePoolParams(Structure):
    _fields_ = [
        ("out", c_void_p), ("query", c_void_p), ("keys", Rows), ("tokens", Rows), ("key_weight", c_void_p),
        ("weight_element", c_int), *((name, c_int64) for name in ("batch", "active", "heads", "dim")),
        ("eps", c_float),
    ]  # fmt: skip


class QuantizeRowsParams(Structure):
    _fields_ = [
        ("out", Heads), ("scale", c_void_p), ("scale_batch_stride", c_int64), ("scale_row_stride", c_int64),
        ("rows", Heads), ("element", c_int), ("slots", c_void_p),
        *((name, c_int64) for name in ("batch", "active", "heads", "dim", "all_rows")),
    ]  # fmt: skip


class PhiloxNormalParams(Structure):
    _fields_ = [("out", Rows), ("seeds", c_void_p), ("tokens", c_void_p),
                *((name, c_int64) for name in ("batch", "rows", "width")), ("draw", c_uint32)]  # fmt: skip


class RenoiseParams(Structure):
    _fields_ = [
        *((name, Rows) for name in ("out", "x0", "x", "velocity")), ("seeds", c_void_p), ("tokens", c_void_p),
        *((name, c_int64) for name in ("batch", "rows", "width")),
        *((name, c_float) for name in ("sigma", "keep", "sigma_next")), ("draw", c_uint32),
    ]  # fmt: skip


class CachedStepParams(Structure):
    _fields_ = [
        *((name, Rows) for name in ("x", "cache", "fresh")), ("score", c_void_p), ("score_stride", c_int64),
        ("fresh_rows", c_void_p), ("fresh_index", POINTER(c_int32)),
        *((name, c_int64) for name in ("batch", "rows", "active", "width")), ("delta_sigma", c_float),
    ]  # fmt: skip


class ExitDecisionParams(Structure):
    _fields_ = [("refine", POINTER(c_uint8)), ("confidence", c_void_p), ("logit", c_void_p), ("logit_element", c_int),
                ("threshold", c_void_p), ("batch", c_int64)]  # fmt: skip


def _element(x: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Emulated:
    """The ops, in the argument order of ``dsa_rt._native``. RuntimeError for what would fail on a device."""

    device = torch.device("cpu")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def run(self, op: str, *arguments: Any) -> None:
        """One launch, finished on return."""
        getattr(self, op)(*arguments)

    def _call(self, name: str, params: Structure, *more: int) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        size = ctypes.c_size_t(ctypes.sizeof(params))
        if message := function(ctypes.byref(params), size, *more).decode():
            raise RuntimeError(message)

    def norm_modulate(
        self, out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float
    ) -> None:
        self._norm(out, x, None, None, (None, shift, scale), rows, eps)

    def residual_norm_modulate(
        self, total: Tensor, out: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor,
        scale: Tensor, rows: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        self._norm(out, x, total, y, (gate, shift, scale), rows, eps)

    def _norm(
        self, out: Tensor, x: Tensor, total: Tensor | None, y: Tensor | None,
        tables: tuple[Tensor | None, Tensor, Tensor], rows: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        length = max(table.shape[1] for table in tables if table is not None)
        self._call("norm_modulate", NormModulateParams(
            *(Rows.of(t) for t in (out, x, total, y)), *(Modulation.of(table) for table in tables),
            _address(rows) if length > 1 else None, length, *x.shape, eps))  # fmt: skip

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        self._call("rms_norm", RmsNormParams(
            Rows.of(out), Rows.of(x), weight.data_ptr(), _element(weight), *x.shape, eps))  # fmt: skip

    def qk_norm_rope_store(
        self, q_out: Tensor, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor,
        k_weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        batch, active, heads, dim = q_out.shape
        self._call("qk_norm_rope_store", QkNormRopeStoreParams(
            *(Rows.of(t) for t in (q, k, v)), *(Heads.of(t) for t in (q_out, k_cache, v_cache)),
            q_weight.data_ptr(), k_weight.data_ptr(), _element(q_weight), cos.data_ptr(), sin.data_ptr(),
            _address(slots), batch, active, heads, dim, k_cache.shape[1], eps))  # fmt: skip

    def _move(self, out: Tensor, source: Tensor, rows: Tensor, all_rows: int, scatter: bool) -> None:
        size = out.element_size()
        strides = (stride * size for t in (out, source) for stride in t.stride()[:2])
        self._call("move_rows", MoveRowsParams(
            out.data_ptr(), source.data_ptr(), *strides, rows.data_ptr(), out.shape[0], len(rows), all_rows,
            out[0, 0].numel() * size), scatter)  # fmt: skip

    def gather_rows(self, out: Tensor, x: Tensor, rows: Tensor) -> None:
        self._move(out, x, rows, x.shape[1], False)

    def scatter_rows(self, x: Tensor, rows: Tensor, src: Tensor) -> None:
        self._move(x, src, rows, x.shape[1], True)

    def confidence_pool(
        self, out: Tensor, query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float
    ) -> None:
        self._call("confidence_pool", ConfidencePoolParams(
            out.data_ptr(), query.data_ptr(), Rows.of(keys), Rows.of(tokens), key_weight.data_ptr(),
            _element(key_weight), *keys.shape[:2], *query.shape, eps))  # fmt: skip

    def quantize_rows(self, out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None) -> None:
        self._call("quantize_rows", QuantizeRowsParams(
            Heads.of(out), scale.data_ptr(), *scale.stride()[:2], Heads.of(rows), _element(rows), _address(slots),
            *rows.shape, out.shape[1]))  # fmt: skip

    def philox_normal(self, out: Tensor, seeds: Tensor, tokens: Tensor, draw: int) -> None:
        self._call("philox_normal", PhiloxNormalParams(
            Rows.of(out), seeds.data_ptr(), tokens.data_ptr(), *out.shape, draw))  # fmt: skip

    def renoise(
        self, out: Tensor, x0: Tensor | None, x: Tensor, velocity: Tensor, seeds: Tensor, tokens: Tensor,
        sigma: float, sigma_next: float, draw: int,
    ) -> None:  # fmt: skip
        self._call("renoise", RenoiseParams(
            *(Rows.of(t) for t in (out, x0, x, velocity)), seeds.data_ptr(), tokens.data_ptr(), *x.shape, sigma,
            1 - sigma_next, sigma_next, draw))  # fmt: skip

    def cached_step(
        self, x: Tensor, cache: Tensor, score: Tensor | None, rows: Tensor, fresh: Tensor, delta_sigma: float
    ) -> None:
        batch, count, width = x.shape
        self._call("cached_step", CachedStepParams(
            *(Rows.of(t) for t in (x, cache, fresh)), _address(score), 0 if score is None else score.stride(0),
            rows.data_ptr(), None, batch, count, len(rows), width, delta_sigma))  # fmt: skip

    def exit_decision(self, refine: Tensor, confidence: Tensor, logit: Tensor, threshold: Tensor) -> None:
        self._call("exit_decision", ExitDecisionParams(
            ctypes.cast(refine.data_ptr(), POINTER(c_uint8)), confidence.data_ptr(), logit.data_ptr(),
            _element(logit), threshold.data_ptr(), len(logit)))  # fmt: skip
