"""An export that is interrupted goes on where it stopped, and one tensor is in memory at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from published import original_state, transformer
from safetensors.torch import save_file
from torch import Tensor

from dsa_rt.bundle import Bundle, open_bundle
from dsa_rt.convert import convert, sources, writing
from dsa_rt.errors import BundleError, OutputError

SHARD = 40_000


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read."""
    counted: Counter[str] = Counter()
    read = sources.SafetensorsSource.read

    def counting(self: sources.SafetensorsSource, name: str) -> Tensor:
        counted[name] += 1
        return read(self, name)

    monkeypatch.setattr(sources.SafetensorsSource, "read", counting)
    return counted


class Killed(BaseException):
    """As if the process had died."""


def interrupted(wan: Path, dest: Path, after: float, error: BaseException, **options: Any) -> None:
    """An export that ends with an error after that part of its bytes."""

    def progress(done: int, total: int) -> None:
        if done >= after * total:
            raise error

    with pytest.raises(type(error)):
        convert(wan, dest, shard_bytes=SHARD, progress=progress, **options)


def shards(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("generator-*.safetensors")}


def whole(dest: Path, reference: Path) -> Bundle:
    """The bundle, checked with its hashes against one written without interruption; nothing lies beside or in it."""
    files = [{str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*.*")} for root in (dest, reference)]
    assert files[0] == files[1] and not dest.with_name(f"{dest.name}.partial").exists()
    return open_bundle(dest)


@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0.0, 0.3, 0.7, 1.0])
def test_goes_on(wan: Path, tmp_path: Path, reads: Counter[str], after: float, error: BaseException) -> None:
    convert(wan, tmp_path / "reference", shard_bytes=SHARD)
    every = set(reads)
    expected = OutputError("x") if isinstance(error, OSError) else error

    def progress(done: int, total: int) -> None:
        if done >= after * total:
            raise error

    with pytest.raises(type(expected)):
        convert(wan, tmp_path / "b", shard_bytes=SHARD, progress=progress)
    assert not (tmp_path / "b").exists()
    partial = tmp_path / "b.partial"
    finished = shards(partial)
    journal = json.loads((partial / "journal.json").read_text())
    assert {entry["path"] for entry in journal["done"]} == finished
    reads.clear()
    seen: list[tuple[int, int]] = []
    convert(wan, tmp_path / "b", shard_bytes=SHARD, progress=lambda *at: seen.append(at))
    bundle = whole(tmp_path / "b", tmp_path / "reference")
    there = {name for name, entry in bundle.tensors["generator"].items() if entry.file in finished}
    assert set(reads) == every - there and set(reads.values()) <= {1}
    assert seen[-1][0] == seen[-1][1]
    assert len(finished) > 2 or after < 0.5


def test_again_and_again(wan: Path, tmp_path: Path) -> None:
    """Interrupted at every shard: each time it gets further."""
    convert(wan, tmp_path / "reference", shard_bytes=SHARD)
    count, before = 0, -1
    while not (tmp_path / "b").exists():
        def progress(done: int, total: int, limit: int = count) -> None:
            if len(shards(tmp_path / "b.partial")) > limit:
                raise Killed

        try:
            convert(wan, tmp_path / "b", shard_bytes=SHARD, progress=progress)
        except Killed:
            assert len(shards(tmp_path / "b.partial")) > before
            before = len(shards(tmp_path / "b.partial"))
        count += 1
    assert count > 3
    whole(tmp_path / "b", tmp_path / "reference")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_written_again(wan: Path, tmp_path: Path, reads: Counter[str], damage: str) -> None:
    convert(wan, tmp_path / "reference", shard_bytes=SHARD)
    interrupted(wan, tmp_path / "b", 0.7, Killed())
    finished = sorted(shards(tmp_path / "b.partial"))
    file = tmp_path / "b.partial" / finished[1]
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    reads.clear()
    convert(wan, tmp_path / "b", shard_bytes=SHARD)
    bundle = whole(tmp_path / "b", tmp_path / "reference")
    kept = {name for name, entry in bundle.tensors["generator"].items() if entry.file in {*finished} - {file.name}}
    assert set(reads) == set(bundle.tensors["generator"]) - kept


@pytest.mark.parametrize("change", ["source", "dtype", "shard size"])
def test_another_export_does_not_go_on(wan: Path, tmp_path: Path, change: str) -> None:
    interrupted(wan, tmp_path / "b", 0.5, Killed())
    options: dict[str, Any] = {"shard_bytes": SHARD}
    if change == "source":
        save_file(original_state(transformer(2, 1, 128)), wan)
    elif change == "dtype":
        options["dtype"] = "bf16"
    else:
        options["shard_bytes"] = SHARD // 2
    before = shards(tmp_path / "b.partial")
    with pytest.raises(OutputError, match=r"b.partial' is the unfinished export of another checkpoint, or of other"):
        convert(wan, tmp_path / "b", **options)
    assert shards(tmp_path / "b.partial") == before
    convert(wan, tmp_path / "reference", **options)
    convert(wan, tmp_path / "b", overwrite=True, **options)
    whole(tmp_path / "b", tmp_path / "reference")


def test_what_a_manifest_says_may_change(wan: Path, tmp_path: Path) -> None:
    """Names and schedules are written at the end; changing them keeps what is done."""
    from dsa_rt.convert import Choices

    interrupted(wan, tmp_path / "b", 0.5, Killed())
    bundle = convert(wan, tmp_path / "b", shard_bytes=SHARD, choices=Choices(name="second", steps=9))
    assert (bundle.manifest.name, bundle.manifest.schedule.steps) == ("second", 9)


JOURNALS = ["", "{", "[]", '{"plan": 3, "done": []}', '{"plan": "x", "done": [{"path": "../x"}]}']


@pytest.mark.parametrize("text", JOURNALS)
def test_a_damaged_journal(wan: Path, tmp_path: Path, text: str) -> None:
    interrupted(wan, tmp_path / "b", 0.5, Killed())
    (tmp_path / "b.partial" / "journal.json").write_text(text)
    with pytest.raises(OutputError, match="has a damaged journal"):
        convert(wan, tmp_path / "b", shard_bytes=SHARD)
    convert(wan, tmp_path / "b", shard_bytes=SHARD, overwrite=True)


def test_killed_before_anything_was_written(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_save", killed)
        with pytest.raises(Killed):
            convert(wan, tmp_path / "b")
    assert (tmp_path / "b.partial").is_dir()
    convert(wan, tmp_path / "b")


def test_overwriting_keeps_the_old_one_until_the_end(wan: Path, tmp_path: Path) -> None:
    convert(wan, tmp_path / "b", shard_bytes=SHARD)
    before = {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}
    interrupted(wan, tmp_path / "b", 0.9, Killed(), overwrite=True, dtype="bf16")
    assert {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()} == before
    bundle = convert(wan, tmp_path / "b", shard_bytes=SHARD, overwrite=True, dtype="bf16")
    assert {entry.dtype for entry in bundle.tensors["generator"].values()} == {torch.bfloat16}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "wan.safetensors"]


def test_two_at_once(wan: Path, tmp_path: Path) -> None:
    interrupted(wan, tmp_path / "b", 0.5, Killed())
    with open(tmp_path / "b.partial" / "lock.json", "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another export is writing"):
            convert(wan, tmp_path / "b", shard_bytes=SHARD)
    convert(wan, tmp_path / "b", shard_bytes=SHARD)


def test_a_bad_tensor_leaves_nothing(tmp_path: Path) -> None:
    state = original_state(transformer(1, 1, 128))
    state["head.head.weight"][3, 3] = torch.nan  # in the last shard
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(BundleError, match=r"'head.head.weight' holds NaN"):
        convert(tmp_path / "wan.safetensors", tmp_path / "b", shard_bytes=SHARD)
    assert os.listdir(tmp_path) == ["wan.safetensors"]


@contextmanager
def live_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    live, read = LiveBytes(), sources.SafetensorsSource.read

    def watched(self: sources.SafetensorsSource, name: str) -> Tensor:
        tensor = read(self, name)
        live.add(tensor)
        return tensor

    with monkeypatch.context() as patch, live:
        patch.setattr(sources.SafetensorsSource, "read", watched)
        yield live


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_memory_is_that_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str) -> None:
    """A tensor, and what it becomes; however many there are. A torch file's tensors are mapped, which takes none."""
    state = original_state(transformer(1, 1, 128, layers=9))
    file = tmp_path / f"wan.{kind}"
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    sizes = [tensor.nbytes for tensor in state.values()]
    with live_bytes(monkeypatch) as live:
        convert(file, tmp_path / "b", dtype=dtype, shard_bytes=10**9)
    assert live.peak >= max(sizes) / 2  # it does see them
    assert live.peak <= 2 * max(sizes) < sum(sizes) / 5, (live.peak, max(sizes), sum(sizes))
