"""What nvcc makes of the CUDA kernels: no spills, no local memory, bounded registers, the instructions they are about.

Each file is compiled once, with the flags of CMakeLists.txt. Registers and spills are ptxas's own report; instructions
need cuobjdump, from the CUDA toolkit or from Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
EVERYWHERE = ("80", "90a", "120")
HALF = "I(13__nv_bfloat16|6__half)"  # as a template's first argument in a kernel's name


@dataclass(frozen=True)
class Source:
    """A file of kernels/cuda: where it runs, and the most registers a kernel whose name holds a word may use.

    The words are tried in order. 65,536 registers of a multiprocessor over the threads of a block give how many blocks
    run at once.
    """

    architectures: tuple[str, ...]
    registers: dict[str, int]


SOURCES = {
    "step": Source(EVERYWHERE, {"": 40}),  # 6 blocks of 256
    "layers": Source(
        EVERYWHERE,
        # Rows of 16-byte pieces of bf16 or fp16: 5 blocks of 128. A row over a block: up to 512 threads. Else 3 of 128.
        {
            f"norm_modulate.*{HALF}Li8E": 96, "norm_modulate.*Lb1E": 128, "norm_modulate": 168,
            f"rms_norm.*{HALF}Li8E": 96, "rms_norm.*Lb1E": 128, "rms_norm": 168,
            "qk_norm_rope": 96, "move_rows": 48,
        },
    ),
    "confidence_pool": Source(EVERYWHERE, {"": 128}),  # 2 blocks of 256
    "quantize": Source(EVERYWHERE, {"": 64}),  # 4 blocks of 256
    "attention_fp8_sm90": Source(("90a",), {"join_kernel": 64, "": 168}),
}
ELSEWHERE = {"attention_sm90"}  # test_attention_layouts.py


@dataclass
class Kernel:
    """A kernel on one architecture. instructions: their names, with modifiers, in order; operands: theirs, as written;
    both empty without cuobjdump."""

    source: str
    architecture: str
    name: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    instructions: list[str] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; else of Triton's wheel."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


needs_cuobjdump = pytest.mark.skipif(
    tool("cuobjdump") is None, reason="needs cuobjdump, from the CUDA toolkit or Triton's wheel"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CUDA.exists(), reason="not a source tree"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


def parse_report(source: str, report: str) -> Iterator[Kernel]:
    """What ``-Xptxas -v`` says."""
    kernel = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel = Kernel(source, match[2], match[1])
        elif kernel and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)):
            kernel.stack, kernel.spilled = int(match[1]), int(match[2])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
            yield kernel
            kernel = None


def parse_dump(dump: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Instructions and their operands by (architecture, kernel) of ``cuobjdump -sass``."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    architecture, body = "", []
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)").match
    for line in dump.splitlines():
        if match := instruction(line):
            body.append((match[1], match[2]))
        elif match := re.search(r"\barch = sm_(\w+)", line) if "arch" in line else None:
            architecture = match[1]
        elif match := re.search(r"\bFunction : (\w+)", line) if "Function" in line else None:
            body = found.setdefault((architecture, match[1]), [])
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder, made = tmp_path_factory.mktemp("machine_code"), []
    for name, source in SOURCES.items():
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in source.architectures]
        target = folder / f"{name}.o"
        compiled = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "--threads=2", *codes, "-Xptxas=-v", "-c",
             str(CUDA / f"{name}.cu"), "-o", str(target)],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        assert compiled.returncode == 0, compiled.stderr
        assert "C75" not in compiled.stdout + compiled.stderr  # a product made to wait, registers not reassigned
        these = list(parse_report(name, compiled.stdout + compiled.stderr))
        assert {kernel.architecture for kernel in these} == set(source.architectures)
        made += these
        if dumper := tool("cuobjdump"):
            path = os.pathsep.join((str(Path(dumper).parent), os.environ["PATH"]))  # it calls nvdisasm
            dumped = subprocess.run(
                [dumper, "-sass", str(target)], capture_output=True, text=True, env=os.environ | {"PATH": path}
            )
            assert dumped.returncode == 0, dumped.stderr
            instructions = parse_dump(dumped.stdout)
            for kernel in these:
                lines = instructions[kernel.architecture, kernel.name]
                kernel.instructions, kernel.operands = [name for name, _ in lines], [rest for _, rest in lines]
                assert "EXIT" in kernel.instructions
    return made


def test_every_file_is_listed() -> None:
    assert {path.stem for path in CUDA.glob("*.cu")} == set(SOURCES) | ELSEWHERE


def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    assert not [kernel for kernel in kernels if kernel.spilled or kernel.stack]


def test_registers(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        bounds = SOURCES[kernel.source].registers
        bound = next(most for words, most in bounds.items() if re.search(words, kernel.name))
        assert 0 < kernel.registers <= bound, f"{kernel.name} on {kernel.architecture}: {kernel.registers}"


@needs_cuobjdump
def test_no_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        local = {i for i in kernel.instructions if re.match(r"(LDL|STL)\b", i)}
        assert not local, f"{kernel.name} on {kernel.architecture}: {local}"


@needs_cuobjdump
def test_rows_move_in_16_bytes(kernels: list[Kernel]) -> None:
    """Kernels for aligned rows of bf16 and fp16 read and write them 16 bytes at a time; FP8 leaves in pieces of 8."""
    found = [k for k in kernels if re.search(f"RowLayout{HALF}Li8E", k.name)]
    assert len(found) == 2 * 3 * 5 * len(EVERYWHERE)  # norms, their RMSNorm, and q, k, v
    for kernel in found:
        reads, writes = ([i for i in kernel.instructions if i.startswith(op)] for op in ("LDG", "STG"))
        rows = [i for i in reads if "STRONG" in i or "BYPASS" in i]  # past L1
        assert rows and all(".128" in i for i in (*rows, *writes)), kernel.name
        assert not [i for i in reads if ".U16" in i], kernel.name
    quantized = [k for k in kernels if re.search(f"quantize_rows_kernel{HALF}Li8E", k.name)]
    assert len(quantized) == 2 * len(EVERYWHERE)
    for kernel in quantized:
        of_rows = [i for i in kernel.instructions if i.startswith("LDG") and ("STRONG" in i or "BYPASS" in i)]
        assert of_rows and all(".128" in i for i in of_rows), kernel.name
        stores = [i for i in kernel.instructions if i.startswith("STG")]
        assert {i for i in stores if i.startswith("STG.E.64")} and not [i for i in stores if ".U8" in i], kernel.name
    moves = [k for k in kernels if "move_rows_kernelI5uint4" in k.name]
    assert len(moves) == len(EVERYWHERE)
    for kernel in moves:
        assert {i[:9] for i in kernel.instructions if i.startswith("STG")} == {"STG.E.128"}


@needs_cuobjdump
def test_attention_in_fp8_multiplies_codes(kernels: list[Kernel]) -> None:
    """8-bit products with their operands where they should be, copies that pass registers by, V through matrices of 8 x
    8 and one byte permutation for each word; no conversion of codes."""
    found = {k.name: k for k in kernels if "attention_fp8_kernel" in k.name}
    assert len(found) == 2
    for name, kernel in found.items():
        dim = 64 if "ILi64E" in name else 128
        count = Counter(i.partition(".")[0] for i in kernel.instructions)
        # S before and in the loop, P V; a transposing warp has half of 32 keys x 16 channels at a time
        assert count["QGMMA"] == 2 * dim // 32 + 4 and count["HGMMA"] == count["HMMA"] == 0
        assert count["LDSM"] == count["STSM"] == dim // 8 and count["PRMT"] == 4 * dim // 8
        assert count["LDGSTS"] == 2 * 4 and count["UTMALDG"] == count["USETMAXREG"] == 2 and count["CALL"] == 0
        assert sum(i.startswith("F2FP.SATFINITE.E4M3") for i in kernel.instructions) == 2 * (16 + dim // 8)
        assert sum(i == "MUFU.EX2" for i in kernel.instructions) == 64 + 2
        assert not [i for i in kernel.instructions if "F16.E4M3" in i]
        # each product of weights, and of a query, begins at zero: one in the prologue, two in the loop
        products = zip(kernel.instructions, kernel.operands, strict=True)
        assert sum(i.startswith("QGMMA") and "RZ" in rest for i, rest in products) == 3
        # what the copying and transposing warps use, up to the waiting loops behind the code, of the 56 they keep
        first = kernel.instructions.index("USETMAXREG.DEALLOC.CTAPOOL")
        last = len(kernel.instructions) - 1 - kernel.instructions[::-1].index("EXIT")
        registers = re.findall(r"\bR(\d+)\b", " ".join(kernel.operands[first:last]))
        assert max(map(int, registers)) < 56
        assert max(map(int, re.findall(r"\bR(\d+)\b", " ".join(kernel.operands)))) < 224
