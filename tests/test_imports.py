"""What an import costs: nothing heavy before it is needed. In fresh interpreters, as this one has all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dsa_rt

PICTURES = {"av", "matplotlib", "PIL", "tqdm"}


def modules_of(code: str, before: str = "") -> set[str]:
    """Top-level modules that the code brings into a fresh interpreter which has run ``before``."""
    program = (
        f"import json, sys; {before}\nknown = set(sys.modules)\n{code}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - known})))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_import_is_light() -> None:
    loaded = modules_of("import dsa_rt; dsa_rt.__version__; dir(dsa_rt)")
    assert "dsa_rt" in loaded and not loaded & {"torch", "numpy", "safetensors", *PICTURES}


def test_errors_and_events_need_no_torch() -> None:
    loaded = modules_of("from dsa_rt import Cancelled, PromptError, Event, ShapeError; import dsa_rt.progress")
    assert "dsa_rt" in loaded and not loaded & {"torch", *PICTURES}


def test_runtime_needs_no_pictures() -> None:
    """Video files, charts and bars come with their first use; what torch itself imports is torch's affair."""
    names = "dsa_rt.load, dsa_rt.Video, dsa_rt.Generate, dsa_rt.export, dsa_rt.attach"
    loaded = modules_of(f"import dsa_rt; {names}", "import torch")
    assert {"dsa_rt", "safetensors"} <= loaded and not loaded & {"diffusers", *PICTURES}


def test_export_is_the_function_whatever_was_imported_before() -> None:
    """No module of the package may be called like a function of it: importing the module would hide the function."""
    modules = {path.stem for path in Path(dsa_rt.__path__[0]).iterdir()}
    assert "runtime" in modules and not modules & set(dsa_rt.__all__)


def test_names_of_the_package() -> None:
    for name in dsa_rt.__all__:
        assert getattr(dsa_rt, name) is not None
    with pytest.raises(AttributeError, match="'dsa_rt' has no attribute 'compile'"):
        _ = dsa_rt.compile
