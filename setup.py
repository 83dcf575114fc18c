"""Builds the native module through CMake, and maps kernels/ to the package dsa_rt.kernels.

Set DSA_RT_CUDA=AUTO|ON|OFF in the environment of the build to choose CUDA kernels (default AUTO: when nvcc is
found). Everything declarative is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds CMakeLists.txt with Ninja where it is found, else with CMake's default generator."""

    def build_extension(self, ext: Extension) -> None:
        """Leaves the module where setuptools expects it: in the wheel's tree, or in dsa_rt/ when editable."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = os.environ.get("DSA_RT_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"DSA_RT_CUDA is {cuda!r}, expected AUTO, ON or OFF")
        ninja = shutil.which("ninja")
        build = Path(self.build_temp).resolve()
        if self.editable_mode or self.inplace:  # kept, so that the next build compiles only what changed
            build = ROOT / "build" / f"{sys.implementation.cache_tag}-{'ninja' if ninja else 'default'}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DDSA_RT_CUDA={cuda}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if ninja:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]  # said each time: pip's own one moves
        # At most two jobs: a kernel file can take gigabytes to compile.
        for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                raise SystemExit("cmake was not found; install it or use pip's build isolation") from None
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"the native module was not built: {' '.join(command)} failed") from error


setup(
    packages=[*find_packages(include=["dsa_rt", "dsa_rt.*"]), "dsa_rt.kernels", "dsa_rt.kernels.triton"],
    package_dir={"dsa_rt.kernels": "kernels", "dsa_rt.kernels.triton": "kernels/triton"},
    ext_modules=[Extension("dsa_rt._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
