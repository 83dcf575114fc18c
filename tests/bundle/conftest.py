"""A small bundle with random tensors, and ways to damage it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.bundle import Latent, Manifest, Part, Schedule, Size, reader, write_bundle

ARCHITECTURE = {"kind": "wan", "form": "causal", "dim": 8, "heads": 2, "patch": [1, 2, 2], "eps": 1e-6}
HEAD = {"dim": 8, "heads": 2, "taps": [0, 1]}


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "test",
        "architecture": ARCHITECTURE,
        "schedule": Schedule(shift=5.0, steps=(1000.0, 750.0, 500.0, 250.0)),
        "latent": Latent(2, 8, 4, mean=(0.0, 0.5), std=(1.0, 2.0)),
        "size": Size(96, 96, 81),
        "codec": Part("conv", {"z": 2}),
        "text_encoder": Part("grammar", {"layers": 2}),
        "chunk_frames": 3,
        "confidence_head": HEAD,
        "training": {"steps": 7, "note": "käse"},
    }
    return Manifest(**(values | changes))


def make_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "generator": {"blocks.0.weight": random(3, 5), "blocks.0.bias": random(3), "scale": random()},
        "confidence_head": {"query": random(2, 8)},
        "codec": {"conv.weight": random(2, 3, 3, 3), "steps": torch.tensor([1, -2, 3])},
        "text_encoder": {"embedding": random(7, 4)},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound bundle; tests damage it."""
    path = tmp_path / "bundle"
    write_bundle(path, make_manifest(), make_tensors())
    return path


@pytest.fixture
def no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a file is mapped."""

    def mapped(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was mapped")

    monkeypatch.setattr(reader, "safe_open", mapped)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "manifest.json"
    value = json.loads(file.read_bytes())
    change(value)
    file.write_text(json.dumps(value))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """New contents, and a manifest that agrees with them: what a hostile author would write."""
    (folder / name).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != name]
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"].append({"path": name, "sha256": digest, "bytes": len(data)})

    edit_manifest(folder, change)


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, built by hand; `length` overrides the true header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
