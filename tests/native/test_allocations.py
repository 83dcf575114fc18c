"""A replay allocates nothing: a child process counts the calls of the system's allocator, on every thread."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_rt import _native

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
CHILD = """
import ctypes, sys
import torch
import recorded_pass
from dsa_rt import _native
from dsa_rt.ops import backend

native = backend.Implementation("native", ("cpu",), (torch.float32, torch.bfloat16))
backend.IMPLEMENTATIONS["active_attention"] = (native,)
counter = ctypes.CDLL(None)
large, seeds, tokens = torch.empty(1, 300, 512), torch.tensor([1]), torch.arange(300)
programs = []
for dtype in (torch.float32, torch.bfloat16):
    buffers = recorded_pass.contents(dtype)
    program = _native.Program()
    program.record(lambda: recorded_pass.run(buffers))
    programs.append(program)
for name in _native.build_info()["instruction_sets"]:
    program = _native.Program()
    program.record(lambda: _native.philox_normal(large, seeds, tokens, 0, instruction_set=name))  # wakes threads
    programs.append(program)

def counted(function, times):
    function()
    before = counter.counted_allocations()
    counter.count_allocations(1)
    for _ in range(times):
        function()
    counter.count_allocations(0)
    return counter.counted_allocations() - before

for program in programs:
    for threads in (1, 2):
        print(counted(lambda: program.replay(threads), 100), end=" ")
print("|", counted(lambda: torch.empty(1000), 10) >= 10)
"""


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="preloads a library that it compiles")
@pytest.mark.skipif(_native.build_info()["threads"] != "openmp", reason="threads of its own are made for each call")
def test_a_replay_allocates_nothing(tmp_path: Path) -> None:
    """Every op, both dtypes, every instruction set, one thread and two; and the counter counts."""
    library = tmp_path / "count_allocations.so"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-O1", str(HERE / "count_allocations.c"), "-o", str(library)], check=True
    )
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts, works = done.stdout.split("|")
    assert works.strip() == "True"
    assert len(counts.split()) >= 6 and set(counts.split()) == {"0"}, counts
