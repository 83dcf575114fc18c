"""Random damage gives a BundleError or, where nothing can tell, a bundle that works; never anything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dsa_rt.bundle import describe_text, open_bundle, write_bundle
from dsa_rt.errors import BundleError

from .conftest import make_manifest, make_tensors, replace_file

FILES = [
    "manifest.json",
    "generator.safetensors",
    "codec/model.safetensors",
    "confidence_head.safetensors.index.json",
]
CALIBRATION = {"passes": 4, "levels": {"1": {"confidence": [0.1, 0.4], "gain": [3.0, -0.5]}}}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = make_tensors()
    tensors["confidence_head"] = {"a": torch.randn(900), "b": torch.randn(900)}
    write_bundle(tmp_path / "b", make_manifest(calibration=CALIBRATION), tensors, shard_bytes=4000)
    return tmp_path / "b"


def damage(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(5)
    place = chance.randrange(len(data))
    # Headers and JSON are at the front: aim there half of the time.
    place = place if chance.random() < 0.5 else min(place, chance.randrange(400))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + chance.randbytes(chance.randrange(1, 9)) + data[place + 1 :]
    if kind == 2:  # JSON that stays JSON, more often than not
        return (
            data[:place]
            + chance.choice([b"0", b"9", b"-", b"]", b"{", b'"', b"null", b"[]"])
            + data[place + 1 :]
        )
    flipped = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at = min(place, len(data) - 1) if kind == 3 else chance.randrange(len(data))
        flipped[at] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def outcome(folder: Path, verify_hashes: bool) -> bool:
    """True when everything loads; False after a BundleError; anything else fails the test."""
    try:
        bundle = open_bundle(folder, verify_hashes)
        for component, entries in bundle.tensors.items():
            bundle.expect(component, {name: entry.shape for name, entry in entries.items()})
            loaded = bundle.load(component, "cpu", torch.float32)
            assert all(torch.isfinite(tensor).all() for tensor in loaded.values())
        assert describe_text(bundle).replace("\n", "").isprintable()
    except BundleError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused(sharded: Path, name: str) -> None:
    chance = random.Random(f"{name} 1")
    original = (sharded / name).read_bytes()
    for _ in range(80):
        damaged = damage(original, chance)
        if damaged == original:
            continue
        (sharded / name).write_bytes(damaged)
        outcome(sharded, False)
        if name == "manifest.json":
            outcome(sharded, True)  # the manifest has no hash: a changed name is nobody's error
        else:
            assert not outcome(sharded, True)
    (sharded / name).write_bytes(original)
    assert outcome(sharded, True)


@pytest.mark.parametrize("name", FILES[1:])
def test_damage_with_matching_hash(sharded: Path, name: str) -> None:
    chance = random.Random(f"{name} 2")
    original = (sharded / name).read_bytes()
    refused = 0
    for _ in range(100):
        replace_file(sharded, name, damage(original, chance))
        refused += not outcome(sharded, True)
    assert refused > 30
