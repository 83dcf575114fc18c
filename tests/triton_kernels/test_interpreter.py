"""Every kernel in Triton's interpreter against ``dsa_rt.reference``: all cases in one process, a test for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest

from dsa_rt.ops.triton import FAMILIES

from .cases import Case
from .interpreted import CASES

triton = pytest.importorskip("triton", reason="Triton is not installed")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.partition("+")[0].split(".")[:3])


pytestmark = pytest.mark.skipif(
    _version(triton.__version__) < (3, 7, 1) and _version(numpy.__version__) >= (2, 4),
    reason="the interpreter of this Triton cannot loop to a bound known at run time with NumPy 2.4 or newer",
)

SCRIPT = Path(__file__).with_name("interpret.py")


@pytest.fixture(scope="module")
def results() -> Mapping[str, dict[str, float] | str]:
    """Case -> the error of each output, or the traceback."""
    ran = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow  # the fixture
def test_every_case_ran(results: Mapping[str, object]) -> None:
    assert sorted(results) == sorted(case.id for case in CASES)
    assert {case.op for case in CASES} == {name for name in FAMILIES if not name.endswith("_scratch")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_interpreted(case: Case, results: Mapping[str, dict[str, float] | str]) -> None:
    errors = results[case.id]
    assert isinstance(errors, dict), errors
    wrong = {output: error for output, error in errors.items() if not error <= 1}
    assert not wrong, f"error over what is allowed, by output: {wrong}"


def test_triton_is_imported_with_the_first_use() -> None:
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import dsa_rt, dsa_rt.ops.step, dsa_rt.ops.triton as loader
        print(loader.installed(), "triton" in set(sys.modules) - before)
        loader.function("norm_modulate")
        print("triton" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False", "True"]
