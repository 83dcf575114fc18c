"""One result of small cases that all tests of the suite share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_rt.suite import records
from dsa_rt.suite.measure import measure

from .small import SMALL


@pytest.fixture(scope="session")
def result_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured once; written as ``dsa-rt bench`` writes it."""
    torch.set_num_threads(1)
    made = measure(SMALL, runs=5, warm_up_seconds=0.0, small_peaks=True)
    return records.write_json(tmp_path_factory.mktemp("suite"), "suite.json", made)


@pytest.fixture
def result(result_file: Path) -> dict[str, Any]:
    """The same as a dict of the test's own."""
    read: dict[str, Any] = json.loads(result_file.read_text())
    return read
