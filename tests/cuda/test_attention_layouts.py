"""Index arithmetic of the Hopper attention kernel: descriptors and fragments against models written from the PTX ISA's
chapter on wgmma, what the kernel refuses, and the machine code."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from . import hopper
from .test_machine_code import tool

dims = pytest.mark.parametrize("dim", [64, 128])
TILE_ROWS = 128


def tile_in_shared_memory(start: int, dim: int) -> dict[int, tuple[int, int]]:
    """Which (row, column) TMA puts at each address: a box (64 columns, 128 rows, D / 64 slabs), first dimension
    fastest, and 16-byte piece p of a 128-byte line at p xor the line's number modulo 8 (CU_TENSOR_MAP_SWIZZLE_128B)."""
    places = {}
    for slab in range(dim // 64):
        for row in range(TILE_ROWS):
            for column in range(64):
                line, byte = slab * TILE_ROWS + row, 2 * column
                places[start + 128 * line + ((byte // 16) ^ (line % 8)) * 16 + byte % 16] = (
                    row,
                    64 * slab + column,
                )
    return places


class Descriptor:
    """PTX ISA, matrix descriptor: bits 0-13 start, 16-29 leading, 32-45 stride (all / 16), 49-51 base offset, 62-63
    swizzle, of which 1 is 128 bytes. Canonical layouts are in units of T = 8 elements of 16 bits, 16 bytes."""

    def __init__(self, bits: int) -> None:
        self.start, self.leading, self.stride = (bits >> at & 0x3FFF for at in (0, 16, 32))
        assert bits >> 62 == 1 and bits >> 49 & 7 == 0

    def address(self, unit: int, byte: int) -> int:
        """Swizzle<3, 4, 3>: address bits 4-6 are xored with bits 7-9."""
        address = 16 * (self.start + unit) + byte
        return address ^ (address >> 7 & 7) << 4

    def k_major(self, i: int, k: int) -> int:
        """((8, m), (T, 2)) : ((8 T, SBO), (1, T)): element i of M or N, k of 16."""
        return self.address(i % 8 * 8 + i // 8 * self.stride + k // 8, k % 8 * 2)

    def mn_major(self, i: int, k: int) -> int:
        """((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO))."""
        return self.address(i // 8 % 8 + i // 64 * self.leading + k % 8 * 8 + k // 8 * self.stride, i % 8 * 2)


@dims
def test_q_and_k_are_read_where_tma_put_them(dim: int, rng: np.random.Generator) -> None:
    tile = 1024 * int(rng.integers(1, 100))
    places = tile_in_shared_memory(tile, dim)
    for first_row, rows in ((0, 128), (0, 64), (64, 64)):  # K; Q of both consumers
        for step in range(dim // 16):
            bits = hopper.library().k_major_descriptor(tile + 128 * first_row, step, TILE_ROWS)
            for i in range(rows):
                for k in range(16):
                    assert places[Descriptor(bits).k_major(i, k)] == (first_row + i, 16 * step + k)


@dims
def test_v_is_read_where_tma_put_it(dim: int, rng: np.random.Generator) -> None:
    tile = 1024 * int(rng.integers(1, 100))
    places = tile_in_shared_memory(tile, dim)
    for step in range(TILE_ROWS // 16):
        bits = hopper.library().mn_major_descriptor(tile, step, TILE_ROWS)
        for column in range(dim):
            for k in range(16):
                assert places[Descriptor(bits).mn_major(column, k)] == (16 * step + k, column)


def test_scores_are_the_operand_of_the_next_product() -> None:
    """PTX ISA, register fragments of wgmma m64k16 (A) and m64nN (D), bf16 and fp16: A's element i of eight is at row
    groupID, + 8 where i is 2, 3, 6 or 7, and column 2 * (lane % 4) + i % 2, + 8 where i >= 4; groupID is lane / 4."""
    library = hopper.library()
    for thread in range(128):
        row, column = library.accumulator_row(thread), library.accumulator_column(thread)
        assert (row, column) == (thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2)
        for step in range(8):
            for i in range(8):
                d = library.accumulator_of_pair(step, i // 2) + i % 2
                at_row, at_column = row + 8 * (d // 2 % 2), d // 4 * 8 + column + d % 2
                assert at_row == thread // 32 * 16 + thread % 32 // 4 + 8 * (i in (2, 3, 6, 7))
                assert at_column == 16 * step + thread % 4 * 2 + i % 2 + 8 * (i >= 4)


def test_what_the_kernel_takes() -> None:
    def refusal(heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.bfloat16, **over: object) -> str:
        x = torch.empty(2, 40, heads, dim, dtype=dtype)
        arguments = {"out": x, "q": x, "k": x, "v": x, **over}
        return hopper.refusal(hopper.params(**arguments))  # type: ignore[arg-type]

    def tensor(*strides: int, shape: tuple[int, ...] = (2, 40, 2, 64), offset: int = 0) -> torch.Tensor:
        return torch.empty(1 << 17, dtype=torch.bfloat16).as_strided(shape, (*strides, 1), offset)

    assert refusal() == refusal(dim=128) == ""
    assert refusal(k=tensor(5120, 128, 64), v=tensor(64 * 999, 136, 64)) == ""
    assert refusal(dtype=torch.float16) == ""
    assert "float32" in refusal(dtype=torch.float32)
    assert "80" in refusal(dim=80)
    assert "k's row stride is 129" in refusal(k=tensor(5160, 129, 64))
    assert "v's batch stride is 0" in refusal(v=tensor(0, 128, 64))
    assert "out's head stride is 68" in refusal(out=tensor(9999 * 8, 136, 68))
    assert "q's address" in refusal(q=tensor(5120, 128, 64, offset=4))
    assert "9 segments" in refusal(segments=[[5, 0, 1, 0, 0]] * 8 + [[0, 0, 1, 0, 0]])
    # what has one element needs no stride
    one = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16).as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert refusal(out=one, q=one, k=one, v=one) == ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The kernels for sm_90a, and what the assembler said."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("cubin")
    source = hopper.KERNELS / "cuda/attention_sm90.cu"
    cubin = folder / "attention.cubin"
    target = "-gencode=arch=compute_90a,code=sm_90a"
    flags = [target, "-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-Xptxas=-v", "-cubin"]
    result = subprocess.run(["nvcc", *flags, "-o", str(cubin), str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return cubin, result.stderr


def test_the_assembler_keeps_registers_and_overlap(compiled: tuple[Path, str]) -> None:
    """No spills, no stack, no product made to wait (C7508 to C7519 say so), for both kernels, head dimensions and
    dtypes; 8 blocks of 128 threads that join, one block of 384, which splits its registers anew."""
    said = compiled[1]
    of_kernel = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", said, re.DOTALL))
    assert len(of_kernel) == 8
    assert all(int(count) <= (64 if "join_kernel" in name else 168) for name, count in of_kernel.items())
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 8
    assert "C75" not in said and "warning" not in said.lower(), said


def test_instructions_of_the_machine_code(compiled: tuple[Path, str]) -> None:
    """A product is in flight during the softmax: in the loop, the powers of two lie between the end of the first
    product and the end of the second."""
    if (disassembler := tool("nvdisasm")) is None:
        pytest.skip("needs nvdisasm, from the CUDA toolkit or Triton's wheel")
    code = subprocess.run(
        [disassembler, "-c", str(compiled[0])], capture_output=True, text=True, check=True
    ).stdout
    products, joins = 0, 0
    for kernel in code.split(".section\t.text.")[1:]:
        assert "LDL" not in kernel and "STL" not in kernel and " HMMA" not in kernel
        if "join_kernel" in kernel.splitlines()[0]:
            joins += 1
            assert "HGMMA" not in kernel and "LDS" not in kernel
            assert "LDG.E.128" in kernel and "STG.E.128" in kernel
            continue
        products += 1
        dim = 64 if "ILi64E" in kernel.splitlines()[0] else 128
        in_bf16 = "ElementE1E" in kernel.splitlines()[0]
        assert kernel.count("HGMMA") == 2 * dim // 16 + 2 * 8
        assert len(re.findall(r"HGMMA\.64x\d+x16\.F32" + r"\.BF16" * in_bf16 + r"\s", kernel)) == kernel.count("HGMMA")
        assert kernel.count("USETMAXREG") == 2 and "UTMALDG.5D" in kernel and ".tnspB" in kernel
        loop = kernel[kernel.index("DEPBAR.LE gsb0, 0x1") :]
        assert loop[: loop.index("DEPBAR.LE gsb0, 0x0")].count("MUFU.EX2") == 64 + 2
        producer = kernel[kernel.index("USETMAXREG.DEALLOC") :]
        producer = producer[: producer.rindex("EXIT")]
        assert max(int(register) for register in re.findall(r"\bR(\d+)", producer)) < 24
    assert products == joins == 4


def test_the_emulated_parameters_are_the_real_ones() -> None:
    """ctypes' layout of AttentionParams against the compiler's."""
    assert hopper.library().params_bytes() == ctypes.sizeof(hopper.Params)
