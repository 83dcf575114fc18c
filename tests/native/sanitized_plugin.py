"""Puts another build of the native module in place of the installed one: ``pytest -p sanitized_plugin``.

DSA_RT_NATIVE_MODULE names its file. Imported before anything imports ``dsa_rt._native``.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (first: its OpenMP runtime is the one to use)

import dsa_rt

PATH = os.environ["DSA_RT_NATIVE_MODULE"]


def _replace() -> None:
    assert "dsa_rt._native" not in sys.modules, "dsa_rt._native was imported before this plugin"
    spec = importlib.util.spec_from_file_location("dsa_rt._native", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dsa_rt._native"] = dsa_rt._native = module
    spec.loader.exec_module(module)


def pytest_report_header() -> str:
    return f"native module: {sys.modules['dsa_rt._native'].__file__}"


_replace()
