"""The CUDA kernels' logic without a card: compiled for the CPU, a thread as a fiber (:mod:`emulation`)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsa_rt.reference import layers as reference

from . import emulation, layer_checks
from .layer_checks import FLOATS, LAYOUTS, Machine

pytestmark = [
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(not (emulation.ROOT / "kernels/cuda").exists(), reason="not a source tree"),
]
HALVES = (torch.bfloat16, torch.float16)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def rows_of(shapes: list[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Every shape in every layout, in fp32 and one of bf16 and fp16, whose kernels are the same template."""
    every = [(shape, layout, (i + j) % 2) for i, shape in enumerate(shapes) for j, layout in enumerate(LAYOUTS)]
    return pytest.mark.parametrize(
        "shape, dtype, layout",
        [(shape, dtype, layout) for shape, layout, half in every for dtype in (torch.float32, HALVES[half])],
    )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return emulation.Emulated(emulation.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")
    return np.random.default_rng(seed)


@rows_of(layer_checks.NORM_SHAPES)
def test_norm_modulate(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for residual in ("none", "gate", "no gate", "in place"):
        layer_checks.norm_modulate(machine, rng, shape, dtype, layout, residual)


@rows_of(layer_checks.NORM_SHAPES)
def test_rms_norm(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for weights in FLOATS:
        layer_checks.rms_norm(machine, rng, shape, dtype, layout, weights)


@rows_of(layer_checks.QK_SHAPES)
def test_qk_norm_rope_store(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype,
    layout: str,
) -> None:  # fmt: skip
    for weights, with_slots in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, True)):
        layer_checks.qk_norm_rope_store(machine, rng, shape, dtype, layout, weights, with_slots)


@layouts
@pytest.mark.parametrize(("row", "dtype"), layer_checks.MOVES)
def test_move_rows(
    machine: Machine, rng: np.random.Generator, row: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    layer_checks.move_rows(machine, rng, row, dtype, layout)


@rows_of(layer_checks.QUANTIZE_SHAPES)
def test_quantize_rows(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype,
    layout: str,
) -> None:  # fmt: skip
    for with_slots in (True, False):
        layer_checks.quantize_rows(machine, rng, shape, dtype, layout, with_slots)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 2**31, 2, 8), "4294967296 heads of rows, expected at most 4294967295"),
     ((1, 1, 1, 2**30 + 1), "1073741825 elements in a head, expected at most 1073741824")],
)  # fmt: skip
def test_more_than_quantize_rows_counts(machine: Machine, shape: tuple[int, ...], says: str) -> None:
    rows = torch.empty(1, 1, 1, 1).expand(shape)
    with pytest.raises(RuntimeError, match=f"quantize_rows: {says}; use another backend"):
        machine.run("quantize_rows", rows, rows[..., 0], rows, None)


@rows_of(layer_checks.POOL_SHAPES)
def test_confidence_pool(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: torch.dtype,
    layout: str,
) -> None:  # fmt: skip
    layer_checks.confidence_pool(machine, rng, shape, dtype, layout, dtype)


def test_confidence_pool_refuses_what_does_not_fit(machine: Machine, rng: np.random.Generator) -> None:
    with pytest.raises(RuntimeError, match="confidence_pool: 129 heads, expected at most 128"):
        layer_checks.confidence_pool(machine, rng, (1, 2, 129, 2), torch.float32, "dense", torch.float32)
    with pytest.raises(RuntimeError, match="C = 1024 needs more blocks at once than this device runs"):
        layer_checks.confidence_pool(machine, rng, (1, 2, 16, 64), torch.float32, "dense", torch.float32)


def test_rows_that_are_too_wide(machine: Machine, rng: np.random.Generator) -> None:
    with pytest.raises(RuntimeError, match="norm_modulate: rows of 8200 elements, expected at most 8192"):
        layer_checks.norm_modulate(machine, rng, (1, 1, 8200), torch.float32, "dense", "none")
    with pytest.raises(RuntimeError, match="rms_norm: rows of 8200 elements, expected at most 8192"):
        layer_checks.rms_norm(machine, rng, (1, 1, 8200), torch.float32, "dense", torch.float32)


@pytest.mark.parametrize("bad", [-1, 6, -(2**62)])
@pytest.mark.parametrize("op", layer_checks.OUT_OF_RANGE)
def test_out_of_range(machine: Machine, op: str, bad: int) -> None:
    def stops(call: Callable[[], None]) -> None:
        with pytest.raises(RuntimeError, match="a trap"):
            call()

    layer_checks.out_of_range(machine, op, bad, lambda tensor: tensor, stops)


def test_fp16_ends_at_65504(machine: Machine, rng: np.random.Generator) -> None:
    """Beyond it a result is infinite, as in the definition; below 2^-14 it is a multiple of 2^-24."""
    x = layer_checks.random(rng, 1, 1, 40, dtype=torch.float16)
    for scale in (1e6, 1e-6):
        out = torch.full_like(x, math.nan)
        machine.run("rms_norm", out, x, torch.full((40,), scale), 1e-6)
        expected = reference.rms_norm(x, torch.full((40,), scale), 1e-6)
        torch.testing.assert_close(out, expected, rtol=2.0**-10, atol=2.0**-24)
        assert out.isinf().any() if scale > 1 else (out.abs() < 2.0**-14).all() and out.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("velocity_dtype", FLOATS)
@pytest.mark.parametrize("shape", layer_checks.STEP_SHAPES)
def test_step_family(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype,
    velocity_dtype: torch.dtype,
) -> None:  # fmt: skip
    layer_checks.step_family(machine, rng, shape, dtype, velocity_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exit_decision(machine: Machine, rng: np.random.Generator, dtype: torch.dtype) -> None:
    layer_checks.exit_decision(machine, rng, dtype)
