"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the op tests, in a child process.

The module is built anew, at -O1. A finding ends the child with a report.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = 99  # exit code of a finding


def library(name: str) -> str | None:
    """The compiler's copy of a shared library."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(asked.stdout.strip())
    return str(path.resolve()) if path.is_absolute() else None


PRELOADED = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source tree"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake"),
    pytest.mark.skipif(None in PRELOADED, reason="needs a compiler with libasan and libubsan, such as GCC"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Builds the module; the environment in which a child uses it."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("sanitized")
    configure = [
        "cmake", "-S", ROOT, "-B", folder, *(["-GNinja"] if shutil.which("ninja") else []), "-DDSA_RT_CUDA=OFF",
        "-DDSA_RT_SANITIZE=address;undefined", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    (module,) = folder.glob("_native*.so")
    return os.environ | {
        "DSA_RT_NATIVE_MODULE": str(module),
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
        "LD_PRELOAD": ":".join(str(path) for path in PRELOADED),
        # Python never frees all it has; the allocator of torch takes what the system's gives.
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={REPORT}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode={REPORT}",
    }


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200
    )


def test_the_ops(environment: dict[str, str]) -> None:
    """Every kernel of every instruction set of this machine. Left out: what is about the framework, not the kernels;
    what compares bits of calls that others make too; large outputs on the instruction set that does not stream them."""
    ops = sorted(str(path) for path in (ROOT / "tests/ops").glob("test_*.py") if path.name != "test_backend.py")
    files = (*ops, str(ROOT / "tests/test_recording.py"))
    left_out = ("opcheck", "compile", "torch", "itself_alone", "(streams and generic)")
    done = run(environment, "-m", "pytest", "-p", "sanitized_plugin", "-p", "no:cacheprovider", "-x", *files,
               "-k", " and ".join(f"not {name}" for name in left_out))  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert f"native module: {environment['DSA_RT_NATIVE_MODULE']}" in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 500


OUT_OF_BOUNDS = """
import sanitized_plugin, sys
import numpy as np, torch
from dsa_rt import _native
memory = np.zeros(5000, np.float32)
claimed = np.lib.stride_tricks.as_strided(memory, (1, 1, 5000 + int(sys.argv[1])), (20000, 20000, 4))
out, tokens = torch.from_numpy(claimed), torch.arange(1)
_native.philox_normal(out, torch.ones(1, dtype=torch.int64), tokens, 0, instruction_set=sys.argv[2])
print("ran through")
"""


def test_a_write_past_the_end_is_reported(environment: dict[str, str]) -> None:
    """The harness can fail: a tensor that claims one element more than its memory has, and one that does not."""
    from dsa_rt import _native

    for instruction_set in _native.build_info()["instruction_sets"]:
        fine = run(environment, "-c", OUT_OF_BOUNDS, "0", instruction_set)
        assert (fine.returncode, fine.stdout.strip()) == (0, "ran through"), fine.stderr
    beyond = run(environment, "-c", OUT_OF_BOUNDS, "1", "generic")
    assert beyond.returncode == REPORT and "ran through" not in beyond.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in beyond.stderr and "philox_normal" in beyond.stderr
