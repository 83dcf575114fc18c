"""What is written comes back, bit by bit, and others can read it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dsa_rt.bundle import (
    Bundle,
    Manifest,
    Part,
    describe,
    describe_text,
    open_bundle,
    write_bundle,
    write_manifest,
)
from dsa_rt.errors import BundleError

from .conftest import ARCHITECTURE, HEAD, make_manifest, make_tensors, replace_file

CALIBRATION = {"passes": 4, "levels": {"1": {"confidence": [0.1, 0.4], "gain": [3, -0.5]}}, "clips": 12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 30, 1])
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    tensors = make_tensors(seed=3, dtype=dtype)
    written = write_bundle(tmp_path / "b", make_manifest(), tensors, shard_bytes=shard_bytes)
    bundle = open_bundle(tmp_path / "b")
    assert written == bundle and bundle.hashes_verified
    assert (tmp_path / "b/generator.safetensors").exists() == (shard_bytes > 100)
    for component, expected in tensors.items():
        bundle.expect(component, {name: tensor.shape for name, tensor in expected.items()})
        loaded = bundle.load(component, "cpu", dtype)
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_other_readers_understand_the_files(tmp_path: Path) -> None:
    tensors = make_tensors(seed=4, dtype=torch.bfloat16)
    write_bundle(tmp_path / "b", make_manifest(), tensors, shard_bytes=31)
    index = json.loads((tmp_path / "b/generator.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors["generator"].values())
    for name, tensor in tensors["generator"].items():
        loaded = safetensors.torch.load_file(tmp_path / "b" / index["weight_map"][name])
        assert torch.equal(loaded[name], tensor)
    for entry in open_bundle(tmp_path / "b").manifest.files:
        data = (tmp_path / "b" / entry.path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes)


def test_files_of_other_writers_are_understood(folder: Path) -> None:
    tensors = make_tensors(seed=5)["generator"] | {"extra": torch.arange(3, dtype=torch.uint8)}
    replace_file(folder, "generator.safetensors", safetensors.torch.save(tensors))
    loaded = open_bundle(folder).load("generator", "cpu", torch.float32)
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_load_converts_and_owns_its_memory(folder: Path) -> None:
    tensors = make_tensors()
    bundle = open_bundle(folder)
    loaded = bundle.load("codec", "cpu", torch.bfloat16)
    assert torch.equal(loaded["conv.weight"], tensors["codec"]["conv.weight"].bfloat16())
    assert torch.equal(loaded["steps"], torch.tensor([1, -2, 3]))
    same = bundle.load("generator", torch.device("cpu"), torch.float32)
    file = folder / "generator.safetensors"
    with open(file, "r+b") as stream:  # in place: a mapping would see it
        stream.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors["generator"].items())


def test_strided_and_trained_tensors_are_written(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = make_tensors() | {
        "codec": {"t": base.t(), "part": base[1:3, ::2], "p": torch.nn.Parameter(base)}
    }
    write_bundle(tmp_path / "b", make_manifest(), tensors)
    loaded = open_bundle(tmp_path / "b").load("codec", "cpu", torch.float32)
    for name, tensor in tensors["codec"].items():
        assert torch.equal(loaded[name], tensor)
        assert not loaded[name].requires_grad


def test_manifest_comes_back(tmp_path: Path) -> None:
    manifest = make_manifest(calibration=CALIBRATION, window=12, sink=3, fps=8)
    bundle = write_bundle(tmp_path / "b", manifest, make_tensors())
    again = open_bundle(tmp_path / "b").manifest
    assert again == bundle.manifest == dataclasses.replace(manifest, files=again.files)
    many = make_manifest(
        schedule=dataclasses.replace(manifest.schedule, steps=50),
        architecture=ARCHITECTURE | {"form": "bidirectional"},
        chunk_frames=None,
    )
    assert Manifest.from_json(many.to_json()) == many


def test_a_second_write_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_bundle(tmp_path / name, make_manifest(), make_tensors(), shard_bytes=40)
    files = [{f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*.*")} for n in "ab"]
    assert files[0] == files[1] and len(files[0]) > 5


def test_write_manifest_keeps_the_tensors(folder: Path) -> None:
    bundle = open_bundle(folder)
    before = sorted(file.name for file in folder.iterdir())
    changed = write_manifest(bundle, dataclasses.replace(bundle.manifest, calibration=CALIBRATION, files=()))
    again = open_bundle(folder)
    assert again == changed and again.manifest.calibration == CALIBRATION
    text = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="disagree"):
        write_manifest(bundle, dataclasses.replace(bundle.manifest, confidence_head=None))
    assert (folder / "manifest.json").read_bytes() == text
    assert sorted(file.name for file in folder.iterdir()) == before


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    calls: dict[str, list[tuple[int, int]]] = {"write": [], "open": [], "load": []}
    tensors = make_tensors()
    write_bundle(tmp_path / "b", make_manifest(), tensors, progress=lambda *at: calls["write"].append(at))
    bundle = open_bundle(tmp_path / "b", progress=lambda *at: calls["open"].append(at))
    bundle.load("generator", "cpu", torch.float32, progress=lambda *at: calls["load"].append(at))
    size = {name: sum(tensor.nbytes for tensor in members.values()) for name, members in tensors.items()}
    assert calls["write"][-1] == (sum(size.values()),) * 2
    assert calls["open"][-1] == (sum(entry.bytes for entry in bundle.manifest.files),) * 2
    assert calls["load"][-1] == (size["generator"],) * 2
    assert all(done == sorted(done) for done in ([at[0] for at in seen] for seen in calls.values()))


@dataclass(frozen=True)
class Config:
    form: str
    dim: int
    heads: int
    patch: tuple[int, int, int]
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads")


@dataclass(frozen=True)
class CodecConfig:
    z: int = 16


def with_section(bundle: Bundle, **changes: Any) -> Bundle:
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **changes))


def test_sections_are_read_by_their_owners(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.config("architecture", Config) == Config("causal", 8, 2, (1, 2, 2), 1e-6)
    assert bundle.config("codec", CodecConfig) == CodecConfig(2)
    for change, message in [
        ({"dim": 9}, "architecture: dim 9 does not split into 2 heads"),
        ({"dim": 8.0}, "architecture: dim is 8.0; expected a whole number"),
        ({"dim": True}, "architecture: dim is True; expected a whole number"),
        ({"eps": "1"}, "architecture: eps is '1'; expected a number"),
        ({"patch": [1, 2]}, "architecture: patch is .1, 2.; expected a list of 3"),
        ({"patch": [1, 2, None]}, r"architecture: patch\[2\] is None"),
        ({"width": 3}, "architecture has unknown keys 'width'"),
    ]:
        with pytest.raises(BundleError, match=f"{folder}.*manifest.json: {message}"):
            with_section(bundle, architecture=ARCHITECTURE | change).config("architecture", Config)
    with pytest.raises(
        BundleError, match="manifest.json: confidence_head has missing keys 'form', 'patch', 'eps'"
    ):
        bundle.config("confidence_head", Config)


def test_a_section_that_is_not_there(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["confidence_head"], tensors["codec"]
    bundle = write_bundle(tmp_path / "b", make_manifest(confidence_head=None), tensors)
    with pytest.raises(BundleError, match="no confidence_head"):
        bundle.config("confidence_head", Config)
    with pytest.raises(BundleError, match="no confidence_head"):
        bundle.load("confidence_head", "cpu", torch.float32)
    with pytest.raises(BundleError, match=r"codec/model\.safetensors .* missing tensor 'conv'"):
        bundle.expect("codec", {"conv": (1, 2)})


def test_describe_says_what_is_in_it(tmp_path: Path, no_mapping: None) -> None:
    tensors = make_tensors(dtype=torch.bfloat16)
    write_bundle(tmp_path / "b", make_manifest(calibration=CALIBRATION), tensors, shard_bytes=30)
    summary = describe(open_bundle(tmp_path / "b"))
    assert json.loads(json.dumps(summary))["architecture"] == ARCHITECTURE
    assert summary["hashes"] == "ok" and summary["confidence_head"] == HEAD
    assert summary["components"]["generator"] == {
        "tensors": 3, "parameters": 19, "dtypes": {"bfloat16": 19}, "bytes": 38,
    }  # fmt: skip
    assert summary["components"]["codec"]["dtypes"] == {"bfloat16": 54, "int64": 3}
    assert sum(summary["files"].values()) == sum(
        file.stat().st_size for file in (tmp_path / "b").rglob("*.*") if file.name != "manifest.json"
    )
    text = describe_text(open_bundle(tmp_path / "b", verify_hashes=False))
    for word in (
        "wan",
        "19 parameters in 3 tensors, bfloat16, 38 bytes",
        "not checked",
        "shift 5.0",
        "2 values",
    ):
        assert word in text, text


def test_describe_prints_no_control_characters(tmp_path: Path) -> None:
    manifest = make_manifest(training={"note": "\x1b[2Jgone"})
    text = describe_text(write_bundle(tmp_path / "b", manifest, make_tensors()))
    assert "gone" in text and "\x1b" not in text


def test_two_experts_and_an_asset(tmp_path: Path) -> None:
    """A second generator, an image encoder, and a tokenizer that goes along unread."""
    tokenizer = json.dumps({"version": "1.0", "text": "x" * (9 << 20)}).encode()  # more than other JSON may have
    tensors = make_tensors() | {"generator_2": make_tensors(7)["generator"], "image_encoder": {"w": torch.randn(3)}}
    manifest = make_manifest(
        boundary=0.875, image_conditioning="concat", image_encoder=Part("clip-vision", {"hidden_size": 3})
    )
    written = write_bundle(tmp_path / "b", manifest, tensors, assets={"tokenizer": tokenizer})
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest == written.manifest and bundle.manifest.boundary == 0.875
    assert bundle.read_asset("tokenizer") == tokenizer
    for component in ("generator", "generator_2", "image_encoder"):
        loaded = bundle.load(component, "cpu", torch.float32)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors[component].items())
    assert describe(bundle)["components"]["generator_2"]["tensors"] == 3


def test_manifests_of_before(folder: Path) -> None:
    """What the first version wrote lacks the keys that came later."""
    text = (folder / "manifest.json").read_text()
    value = json.loads(text)
    for key in ("boundary", "image_conditioning", "image_encoder"):
        del value[key]
    (folder / "manifest.json").write_text(json.dumps(value))
    assert open_bundle(folder).manifest == Manifest.from_json(text.encode())


def test_a_bundle_without_codec_and_text_encoder(tmp_path: Path) -> None:
    tensors = {name: members for name, members in make_tensors().items() if name in ("generator", "confidence_head")}
    bundle = write_bundle(tmp_path / "b", make_manifest(codec=None, text_encoder=None), tensors)
    assert open_bundle(tmp_path / "b").manifest.codec is None
    with pytest.raises(BundleError, match="it has no codec; export one that has"):
        bundle.config("codec", CodecConfig)
    assert "codec" in describe_text(bundle)
