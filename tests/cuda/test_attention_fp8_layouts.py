"""Index arithmetic of the Hopper kernel with K and V in E4M3: descriptors, fragments and the transposition of V,
against models written from the PTX ISA."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from . import hopper
from .hopper import fp8

dims = pytest.mark.parametrize("dim", [64, 128])
KEYS = 128


def swizzled(address: int, width: int) -> int:
    """CU_TENSOR_MAP_SWIZZLE_64B and _128B: bits 4 and 5, or 4 to 6, are xored with bits 7 and 8, or 7 to 9."""
    return address ^ (address >> 7 & {64: 3, 128: 7}[width]) << 4


def read_by(bits: int, width: int) -> np.ndarray:
    """The addresses of B [128 or fewer rows, 32] that a K-major descriptor of 8-bit elements names. PTX ISA: bits 0-13
    start, 32-45 stride (both / 16), 49-51 base offset, 62-63 swizzle: 1 is 128 bytes, 2 is 64. Canonical layout
    Swizzle<3 or 2, 4, 3> o ((8, m), (T, 2k)) : ((8 T or 4 T, SBO), (1, T)) in units of 16 bytes, T of them elements."""
    assert bits >> 62 == {128: 1, 64: 2}[width] and bits >> 49 & 7 == 0
    start, stride = 16 * (bits & 0x3FFF), 16 * (bits >> 32 & 0x3FFF)
    return np.array([
        [swizzled(start + i // 8 * stride + i % 8 * width + k, width) for k in range(32)] for i in range(KEYS)
    ])  # fmt: skip


def descriptor(tile: int, width: int, step: int) -> int:
    hopper.library().codes_descriptor.restype = ctypes.c_uint64
    return int(hopper.library().codes_descriptor(tile, width, step))


@dims
def test_keys_are_read_where_tma_put_them(dim: int, rng: np.random.Generator) -> None:
    tile = 1024 * int(rng.integers(1, 100))
    for step in range(dim // 32):
        wanted = [[swizzled(tile + row * dim + 32 * step + k, dim) for k in range(32)] for row in range(KEYS)]
        assert (read_by(descriptor(tile, dim, step), dim) == wanted).all()


def test_slots_hold_every_key_once() -> None:
    """And the weights that a thread holds are the codes of its operand, in their order. PTX ISA, m64nN D: element 4 j +
    2 i + e at column 8 j + 2 (t % 4) + e, row + 8 i; m64k32 A of 8 bits: word 2 h + i at columns 16 h + 4 (t % 4) + 0
    to 3, row + 8 i."""
    library = hopper.library()
    slots = [library.slot_of_key(key) for key in range(KEYS)]
    assert sorted(slots) == list(range(KEYS))
    key_in = np.argsort(slots)
    seen = set()
    for column in range(4):
        for group in range(KEYS // 16):
            for i in range(2):
                assert library.word_of_operand(group, i) == 4 * (group // 2) + 2 * (group % 2) + i
                for n in range(4):
                    element = library.accumulator_of_weight(group, i, n)
                    assert element // 2 % 2 == i
                    key = element // 4 * 8 + 2 * column + element % 2
                    assert key_in[16 * group + 4 * column + n] == key
                    seen.add((column, element))
    assert len(seen) == 4 * 64


def matrices(lines: list[int]) -> list[list[int]]:
    """The lines of each of four matrices: lanes 8 m to 8 m + 7 name those of matrix m."""
    return [lines[8 * m : 8 * m + 8] for m in range(4)]


def no_conflict(lines: list[int]) -> bool:
    """Eight lines of 16 bytes are in different groups of four banks."""
    return len({line // 16 % 8 for line in lines}) == 8


@dims
def test_values_are_transposed(dim: int, rng: np.random.Generator) -> None:
    """Instruction by instruction, from TMA's tile to what the products read; each byte once, without bank conflicts."""
    library = hopper.library()
    v = rng.integers(0, 256, (KEYS, dim), np.uint8)
    memory = np.zeros(KEYS * dim, np.uint8)
    for key in range(KEYS):
        for channel in range(dim):
            memory[swizzled(key * dim + channel, dim)] = v[key, channel]
    turned, times = np.zeros(dim * KEYS, np.uint8), np.zeros(dim * KEYS, int)
    for keys in range(KEYS // 32):
        for channels in range(dim // 16):
            lines = [library.byte_read(dim, keys, channels, lane) for lane in range(32)]
            assert all(no_conflict(matrix) for matrix in matrices(lines))
            words = np.zeros((4, 32, 4), np.uint8)  # ldmatrix.trans: lane l has lines 2 (l % 4), + 1, 16-bit word l / 4
            for m, matrix in enumerate(matrices(lines)):
                for lane in range(32):
                    for half in range(2):
                        at = matrix[2 * (lane % 4) + half] + lane // 4 * 2
                        words[m, lane, 2 * half : 2 * half + 2] = memory[at : at + 2]
            out = np.zeros((4, 32, 4), np.uint8)
            for lane in range(32):
                for pair in range(2):
                    both = np.concatenate([words[2 * pair, lane], words[2 * pair + 1, lane]])
                    for which in range(2):
                        pick = library.pick_of(lane, which)
                        out[2 * pair + which, lane] = [both[pick >> 4 * i & 7] for i in range(4)]
            lines = [library.byte_written(keys, channels, lane) for lane in range(32)]
            for m, matrix in enumerate(matrices(lines)):
                assert no_conflict(matrix)
                for lane in range(32):  # stmatrix: lane l gives bytes 4 (l % 4) to + 3 of line l / 4
                    at = matrix[lane // 4] + 4 * (lane % 4)
                    turned[at : at + 4] = out[m, lane]
                    times[at : at + 4] += 1
    assert (times == 1).all()
    key_in = np.argsort([library.slot_of_key(key) for key in range(KEYS)])
    for step in range(KEYS // 32):
        read = turned[read_by(descriptor(0, 128, step), 128)[:dim]]  # [channel, slot of the step]
        assert (read == v[key_in[32 * step : 32 * step + 32]].T).all()


def test_the_emulated_parameters_are_the_real_ones() -> None:
    """ctypes' layout of ScaledAttentionParams against the compiler's."""
    assert hopper.library().scaled_params_bytes() == ctypes.sizeof(fp8.ScaledParams)
