"""Whole or not at all: no failure leaves a trace or harms what was there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.bundle import open_bundle, write_bundle, writer
from dsa_rt.errors import BundleError, OptionError, OutputError

from .conftest import make_manifest, make_tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and every empty folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b""
        for file in folder.rglob("*")
        if file.is_file() or not any(file.iterdir())
    }


def test_overwriting_needs_the_flag(folder: Path) -> None:
    before = contents(folder.parent)
    with pytest.raises(OutputError, match=f"'{folder}' exists: .*overwrite=True"):
        write_bundle(folder, make_manifest(), make_tensors(seed=1))
    assert contents(folder.parent) == before
    write_bundle(folder, make_manifest(), make_tensors(seed=1), overwrite=True, shard_bytes=1)
    loaded = open_bundle(folder).load("generator", "cpu", torch.float32)
    assert torch.equal(loaded["scale"], make_tensors(seed=1)["generator"]["scale"])
    assert not (folder / "generator.safetensors").exists()
    assert [file.name for file in folder.parent.iterdir()] == ["bundle"]


def test_a_damaged_bundle_may_be_overwritten(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"{")
    write_bundle(folder, make_manifest(), make_tensors(), overwrite=True)
    open_bundle(folder)


def test_only_a_bundle_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (folder / "codec/notes.txt").write_text("mine")
    before = contents(tmp_path)
    for path, message in [
        (tmp_path / "home", "not a bundle"),
        (tmp_path / "file", "not a bundle"),
        (folder, "also holds 'codec/notes.txt'"),
    ]:
        with pytest.raises(OutputError, match=message):
            write_bundle(path, make_manifest(), make_tensors(), overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("stage", ["first tensor", "last tensor", "manifest", "rename", "second rename"])
def test_failure_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, exists: bool, failure: Any
) -> None:
    tensors = make_tensors(seed=1)
    if exists:
        write_bundle(tmp_path / "b", make_manifest(), make_tensors())
    before = contents(tmp_path)
    rename, calls = os.rename, 0
    reached = False

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal reached
        reached = True
        assert len(contents(tmp_path)) > len(before)  # there is something to clean up
        raise failure

    def progress(done: int, total: int) -> None:
        if stage == "first tensor" or (stage == "last tensor" and done == total):
            fail()

    def flaky_rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (2 if stage == "second rename" and exists else 1):
            fail()
        rename(source, target)

    if stage == "manifest":
        monkeypatch.setattr(writer, "read_bundle", fail)
    if "rename" in stage:
        monkeypatch.setattr(os, "rename", flaky_rename)
    with pytest.raises(OutputError if isinstance(failure, OSError) else failure) as caught:
        write_bundle(
            tmp_path / "b", make_manifest(), tensors, overwrite=True, shard_bytes=20, progress=progress
        )
    assert reached and contents(tmp_path) == before
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value) and str(tmp_path / "b") in str(caught.value)


def test_unwritable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        write_bundle(tmp_path / "not" / "there", make_manifest(), make_tensors())

    def denied(*_: Any, **__: Any) -> None:  # permissions do not stop root, who may run this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer.tempfile, "TemporaryDirectory", denied)
    with pytest.raises(OutputError, match="Permission denied; check"):
        write_bundle(tmp_path / "b", make_manifest(), make_tensors())
    assert contents(tmp_path) == {}


def test_others_may_read_it(folder: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((folder / "generator.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_link_keeps_pointing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    write_bundle(tmp_path / "latest", make_manifest(), make_tensors(seed=1), overwrite=True)
    assert (tmp_path / "latest").is_symlink() and (folder / "manifest.json").is_file()


def nan_at_end(count: int) -> Tensor:
    return torch.cat([torch.zeros(count - 1), torch.tensor([torch.nan])])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"generator": {"w": nan_at_end(1)}}, "generator: tensor 'w' holds NaN or Inf"),
        ({"generator": {"w": nan_at_end(1001).half()}}, "generator: tensor 'w' holds NaN or Inf"),
        (
            {"generator": {"w": torch.tensor([1, -torch.inf]).bfloat16()}},
            "generator: tensor 'w' holds NaN or Inf",
        ),
        ({"generator": {"w": torch.zeros(2, 0)}}, r"generator: tensor 'w' is empty \(shape \(2, 0\)\)"),
        ({"generator": {"w": torch.zeros(2, dtype=torch.bool)}}, "tensor 'w' has dtype torch.bool; expected"),
        ({"generator": {"w": torch.zeros(2, device="meta")}}, "tensor 'w' is .*expected a dense tensor"),
        ({"generator": {"w": [1.0]}}, r"tensor 'w' is \[1.0\]; expected a dense tensor"),
        ({"generator": {"__metadata__": torch.zeros(2)}}, "tensor '__metadata__': expected a name"),
        ({"vae": {"w": torch.zeros(2)}}, "unknown component 'vae'; a bundle has generator, "),
        ({"generator": {}}, "no generator.safetensors"),
        ({"codec": {"w": torch.zeros(2)}}, "no generator.safetensors"),
        ({"generator": {"w": torch.zeros(2)}, "confidence_head": {}}, "disagree on .* confidence_head"),
    ],
)
def test_what_no_reader_accepts_is_not_written(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "b", make_manifest(), tensors)
    assert contents(tmp_path) == {}


def test_a_manifest_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    for changes, message in [
        ({"training": {"loss": float("nan")}}, "cannot be written as JSON"),
        ({"training": {"loss": torch.zeros(1)}}, "cannot be written as JSON"),
        ({"chunk_frames": 2.5}, "chunk_frames is 2.5; expected a whole number"),
        ({"architecture": {"kind": "wan", "x": 1 << 70}}, "64 bits"),
    ]:
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path / "b", make_manifest(**changes), make_tensors())
    assert contents(tmp_path) == {}


def test_shard_bytes_is_checked(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="shard_bytes is 0"):
        write_bundle(tmp_path / "b", make_manifest(), make_tensors(), shard_bytes=0)
