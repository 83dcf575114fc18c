"""The build: what an installed copy holds, the native module's independence, and clear failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source tree")
needs_build_tools = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "c++")), reason="needs cmake and a C++ compiler"
)


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def copy_of_the_source(target: Path) -> Path:
    """What a build reads, without what earlier builds left: setuptools takes stale files from build/."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("csrc", "kernels", "dsa_rt"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py works in a checkout and is missing from the wheel."""
    for module in (*ROOT.glob("dsa_rt/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        assert (module.parent / "__init__.py").exists(), f"{module.parent} has no __init__.py"


@pytest.mark.slow
@needs_build_tools
def test_wheel(tmp_path: Path) -> None:
    """A wheel built from an sdist, without CUDA: works outside the checkout; modules, bundles, no sources."""
    pytest.importorskip("pybind11", reason="builds without isolation, since tests may have no network")
    pytest.importorskip("setuptools")
    source = copy_of_the_source(tmp_path / "source")
    packed = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    quickly = tmp_path / "quickly"  # what a wheel holds does not depend on how well its code is optimised
    quickly.write_text('#!/bin/sh\nfor word do shift; [ "$word" = -O3 ] || set -- "$@" "$word"; done\nexec "$@" -O0\n')
    quickly.chmod(0o755)
    built = run(
        sys.executable, "-m", "pip", "wheel", archive, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir",
        tmp_path, env=os.environ | {"DSA_RT_CUDA": "OFF", "CMAKE_CXX_COMPILER_LAUNCHER": str(quickly)},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        files.extractall(tmp_path / "site")
    for suffix in (".cpp", ".h", ".cu", ".cuh"):
        assert not [name for name in names if name.endswith(suffix)]
    assert not [name for name in names if name.startswith(("tests", "csrc", "kernels"))]
    for file in source.glob("dsa_rt/**/*"):
        if file.suffix in (".py", ".pyi", ".safetensors", ".json") or file.name == "py.typed":
            assert str(file.relative_to(source)) in names
    program = """
import json, torch, dsa_rt, dsa_rt.kernels, dsa_rt.kernels.triton
from dsa_rt import _native
from dsa_rt.ops import step
out = torch.full((1, 3, 5), float("nan"))
step.philox_normal(out, torch.tensor([1]), torch.arange(3), 0, backend="native")
files = [dsa_rt.__file__, dsa_rt.kernels.__file__, _native.__file__]
finite = bool(out.isfinite().all())
print(json.dumps({"files": files, "cuda": _native.build_info()["cuda"], "finite": finite}))
"""
    paths = [
        str(tmp_path / "site"),
        *(path for path in sys.path if path and Path(path).name == "site-packages"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S: without the .pth file of an editable install, which would point back to the checkout
    program = f"import sys; sys.path[:0] = {paths!r}\n{program}"
    used = run(sys.executable, "-S", "-c", program, cwd=tmp_path, env=environment)
    assert used.returncode == 0, used.stderr
    found = json.loads(used.stdout)
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in found["files"]), found
    assert found["cuda"] == "" and found["finite"]


def configure(tmp_path: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    """CMake's configure step on a machine whose nvcc does not work."""
    pybind11 = pytest.importorskip("pybind11")
    generator = ["-GNinja"] if shutil.which("ninja") else []
    return run(
        "cmake", *generator, "-S", ROOT, "-B", tmp_path, f"-DDSA_RT_CUDA={cuda}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", env=os.environ | {"CUDACXX": "/nowhere/nvcc"},
    )  # fmt: skip


@needs_build_tools
def test_cuda_on_without_nvcc_fails_clearly(tmp_path: Path) -> None:
    result = configure(tmp_path, "ON")
    assert result.returncode != 0
    assert "DSA_RT_CUDA=ON, but no working nvcc was found" in " ".join(result.stderr.split())


@needs_build_tools
def test_cuda_auto_without_nvcc_builds_for_the_cpu(tmp_path: Path) -> None:
    result = configure(tmp_path, "AUTO")
    assert result.returncode == 0, result.stderr
    assert "no working nvcc was found, building without CUDA kernels" in result.stdout


def test_unknown_cuda_option(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    result = run(
        sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path, cwd=ROOT,
        env=os.environ | {"DSA_RT_CUDA": "yes"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "DSA_RT_CUDA is 'YES', expected AUTO, ON or OFF" in result.stderr


@needs_build_tools
def test_threads_without_an_openmp_runtime(tmp_path: Path) -> None:
    """The split over threads where there is no OpenMP runtime to borrow; beside torch there always is one."""
    program = tmp_path / "parallel_check"
    sources = (ROOT / "tests/native/parallel_check.cpp", ROOT / "csrc/parallel.cpp")
    built = run("c++", "-std=c++17", "-O1", *sources, "-o", program, "-pthread", "-ldl")
    assert built.returncode == 0, built.stderr
    result = run(program)
    assert (result.returncode, result.stdout.strip()) == (0, "threads"), result.stdout
