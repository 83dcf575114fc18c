"""Published checkpoints, small, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from published import pipeline

Published = Callable[[str], Path]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Folder of a whole diffusers pipeline by its kind; tests only read it."""
    root, known = tmp_path_factory.mktemp("published"), {}

    def folder(kind: str) -> Path:
        if kind not in known:
            known[kind] = root / kind
            pipeline(kind).save_pretrained(known[kind])
        return known[kind]

    return folder
