"""Ranges for a profiler: nothing without one, and with one the right names in the right order."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dsa_rt import trace
from dsa_rt.errors import OptionError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """What a stand-in for the package is told."""
    told: list[tuple[str, ...]] = []

    @contextmanager
    def annotate(name: str, domain: str) -> Iterator[None]:
        told.append(("begin", name, domain))
        try:
            yield
        finally:
            told.append(("end", name, domain))

    package = types.ModuleType("nvtx")
    package.annotate = annotate  # type: ignore[attr-defined]
    package.push_range = lambda name, domain: told.append(("push", name, domain))  # type: ignore[attr-defined]
    package.pop_range = lambda domain: told.append(("pop", domain))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    yield told
    trace.enable(False)


def test_ranges_nest_and_end_with_an_exception(calls: list[tuple[str, ...]]) -> None:
    trace.enable()
    with pytest.raises(ZeroDivisionError), trace.stage("denoise"), trace.stage("pass 1"):
        _ = 1 / 0
    trace.push("decode")
    trace.pop()
    assert calls == [
        ("begin", "denoise", "dsa_rt"), ("begin", "pass 1", "dsa_rt"), ("end", "pass 1", "dsa_rt"),
        ("end", "denoise", "dsa_rt"), ("push", "decode", "dsa_rt"), ("pop", "dsa_rt"),
    ]  # fmt: skip


def test_off_makes_nothing(calls: list[tuple[str, ...]]) -> None:
    assert not trace.enabled()
    with trace.stage("denoise"):
        trace.push("pass")
        trace.pop()
    assert trace.stage("a") is trace.stage("b")  # nothing is allocated
    trace.enable()
    assert trace.enabled() and trace.stage("a") is not trace.stage("a")
    trace.enable(False)
    assert not trace.enabled() and not [call for call in calls if call[0] != "begin"]


def test_named_functions(calls: list[tuple[str, ...]]) -> None:
    def double(x: int, *, plus: int) -> int:
        return 2 * x + plus

    assert trace.named("op", double) is double
    trace.enable()
    assert trace.named("op", double)(4, plus=1) == 9
    assert calls == [("begin", "op", "dsa_rt"), ("end", "op", "dsa_rt")]


def test_native_ops_have_names_where_the_environment_asks_for_them() -> None:
    program = """
import sys, types, contextlib
package, told = types.ModuleType("nvtx"), []
@contextlib.contextmanager
def annotate(name, domain):
    told.append(name)
    yield
package.annotate = annotate
sys.modules["nvtx"] = package
import torch
from dsa_rt.ops import step
step.philox_normal(torch.empty(1, 2, 4), torch.tensor([1]), torch.arange(2), 0)
print(told)
"""
    for value, expected in (("1", "['philox_normal']"), ("0", "[]")):
        ran = subprocess.run([sys.executable, "-c", program], env=os.environ | {"DSA_RT_NVTX": value},
                             capture_output=True, text=True, check=True)  # fmt: skip
        assert ran.stdout.strip() == expected


def test_off_lets_exceptions_through() -> None:
    with pytest.raises(KeyError), trace.stage("denoise"):
        raise KeyError


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(OptionError, match="pip install nvtx"):
        trace.enable()
    assert not trace.enabled()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_environment(value: str, on: bool) -> None:
    program = "import sys, types; sys.modules['nvtx'] = types.ModuleType('nvtx')\n"
    program += "import dsa_rt.trace as t; print(t.enabled())"
    ran = subprocess.run([sys.executable, "-c", program], env={"DSA_RT_NVTX": value, "PATH": ""}, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert ran.stdout.strip() == str(on)


def test_import_is_light() -> None:
    program = "import dsa_rt.trace, sys; print([n for n in ('torch', 'numpy', 'nvtx') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
