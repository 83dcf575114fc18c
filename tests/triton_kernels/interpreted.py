"""Cases for Triton's interpreter: tiny sizes that divide nothing, fp32 and fp16 (its bf16 arithmetic is wrong)."""

from __future__ import annotations

from .cases import Case

_FLOATS = ("float32", "float16")


def _each(op: str, *variants: dict[str, object], dtypes: tuple[str, ...] = _FLOATS) -> list[Case]:
    return [Case(op, dtype, sizes) for dtype in dtypes for sizes in variants]


def _rows(op: str) -> list[Case]:
    dtypes = ("float32", "float16", "uint8", "bool", "int64", "complex64", "float8_e4m3fn")
    some = {"batch": 2, "active": 5, "total": 9}
    return [
        *_each(op, {**some, "shape": (3, 7)}, dtypes=dtypes),
        *_each(op, {**some, "shape": (1,)}, {**some, "shape": (2055,)}, {**some, "shape": (5,), "beyond": True}),
        *_each(op, {"batch": 1, "active": 0, "total": 3, "shape": (4,)}, dtypes=("float32",)),
    ]


_ATTENTION = {"batch": 2, "active": 37, "total": 83, "heads": 3, "dim": 24}
_SMALL = {"tile": (16, 16)}
_SEGMENTS = (  # counts and ranges around multiples of a tile, an empty segment, single rows
    (16, 0, 16, 20, 53),
    (0, 3, 5, 0, 0),
    (1, 40, 41, 0, 0),
    (5, 7, 7, 30, 62),
    (10, 82, 83, 0, 1),
    (2, 7, 7, 30, 35),
    (3, 1, 80, 0, 0),
)

CASES = [
    *_each(
        "norm_modulate",
        {"batch": 2, "active": 5, "width": 37, "table": 3},
        {"batch": 2, "active": 3, "width": 64, "table": 1, "shared": True},
        {"batch": 1, "active": 7, "width": 19, "table": 4, "beyond": True},
        {"batch": 1, "active": 1, "width": 1, "table": 1},
    ),
    *_each(
        "residual_norm_modulate",
        {"batch": 2, "active": 5, "width": 37, "table": 3},
        {"batch": 2, "active": 3, "width": 40, "table": 1, "gated": False, "in_place": True},
        {"batch": 1, "active": 7, "width": 19, "table": 4, "beyond": True, "in_place": True, "shared": True},
    ),
    *_each(
        "rms_norm",
        {"batch": 2, "active": 5, "width": 37},
        {"batch": 1, "active": 3, "width": 64, "weights": "float16", "in_place": True},
        {"batch": 1, "active": 1, "width": 1},
    ),
    *_each(
        "qk_norm_rope_store",
        {"batch": 2, "active": 5, "heads": 3, "dim": 10, "total": 11},
        {"batch": 1, "active": 4, "heads": 2, "dim": 16, "total": 7, "slots": "none", "weights": "float16"},
        {"batch": 2, "active": 6, "heads": 3, "dim": 2, "total": 9, "beyond": True},
    ),
    *_rows("gather_rows"),
    *_rows("scatter_rows"),
    *_each(
        "philox_normal",
        {"batch": 2, "active": 7, "width": 3, "draw": 0},
        {"batch": 3, "active": 37, "width": 30, "draw": 2**32 - 1},
        {"batch": 1, "active": 5, "width": 1029, "draw": 1},
    ),
    *_each(
        "renoise",
        {"batch": 2, "active": 7, "width": 3, "sigma_next": 0.31, "clean": True},
        {"batch": 1, "active": 37, "width": 66, "sigma_next": 0.5, "clean": False, "velocity": "float16"},
        {"batch": 2, "active": 9, "width": 30, "sigma_next": 0.0, "clean": True},
        {"batch": 2, "active": 9, "width": 30, "sigma_next": 0.25, "clean": False, "in_place": "x"},
    ),
    *_each(
        "renoise",
        {"batch": 1, "active": 9, "width": 30, "sigma_next": 0.9, "clean": True, "in_place": "velocity"},
        dtypes=("float32",),
    ),
    *_each(
        "cached_step",
        {"batch": 2, "total": 7, "active": 4, "width": 3, "score": True},
        {"batch": 3, "total": 37, "active": 19, "width": 30, "score": True, "velocity": "float16"},
        {"batch": 1, "total": 9, "active": 9, "width": 1029, "score": True},
        {"batch": 2, "total": 9, "active": 5, "width": 30, "score": False},
        {"batch": 2, "total": 9, "active": 5, "width": 30, "score": True, "beyond": True},
        {"batch": 2, "total": 9, "active": 0, "width": 30, "score": True},
    ),
    *_each("exit_decision", {"count": 5, "flag": "bool"}, {"count": 200, "flag": "uint8"}),
    *_each(
        "confidence_pool",
        {"batch": 2, "active": 37, "heads": 3, "dim": 10},
        {"batch": 1, "active": 300, "heads": 2, "dim": 16, "weights": "float16"},  # shares that are merged
        {"batch": 1, "active": 300, "heads": 2, "dim": 16, "multiprocessors": 1},  # shares of several blocks
        {"batch": 2, "active": 130, "heads": 2, "dim": 16, "multiprocessors": 1},  # one share of several blocks
        {"batch": 2, "active": 129, "heads": 5, "dim": 37, "large": 8.0},
        {"batch": 1, "active": 1, "heads": 1, "dim": 4},
    ),
    *_each(
        "active_attention",
        {**_ATTENTION, **_SMALL},
        {**_ATTENTION, **_SMALL, "large": 8.0, "lse": False},
        {**_ATTENTION, **_SMALL, "shares": 3},
        {**_ATTENTION, **_SMALL, "segments": _SEGMENTS},
        {**_ATTENTION, **_SMALL, "segments": _SEGMENTS, "shares": 4},  # some shares have no row
        {**_ATTENTION, **_SMALL, "segments": ((37, 5, 21, 40, 75),)},
        {**_ATTENTION, "tile": (32, 16), "segments": ((20, 0, 32, 0, 0), (17, 64, 80, 0, 0))},
        {**_ATTENTION, "dim": 64, "heads": 1, "tile": (16, 32), "total": 64},
        {"batch": 1, "active": 70, "total": 131, "heads": 1, "dim": 6},
        {"batch": 1, "active": 1, "total": 1, "heads": 2, "dim": 128},
    ),
    *_each(
        "active_attention_fp8",
        {"batch": 2, "active": 5, "total": 130, "heads": 2, "dim": 24},
        {**_ATTENTION, "segments": _SEGMENTS},
        {"batch": 1, "active": 3, "total": 132, "heads": 1, "dim": 66, "capability": 12, "lse": False},
        {
            "batch": 1, "active": 70, "total": 200, "heads": 2, "dim": 16,
            "segments": ((69, 7, 71, 100, 193), (1, 0, 1, 9, 9)),
        },
        {"batch": 1, "active": 1, "total": 1, "heads": 2, "dim": 128},
    ),
    *_each(
        "quantize_rows",
        {"batch": 2, "active": 5, "total": 9, "heads": 3, "dim": 24},
        {"batch": 2, "active": 7, "total": 11, "heads": 2, "dim": 37, "beyond": True},
        {"batch": 1, "active": 130, "total": 150, "heads": 2, "dim": 64, "slots": "none"},
        {"batch": 1, "active": 1, "total": 1, "heads": 1, "dim": 1},
    ),
]
