"""Every way a bundle can be wrong: one BundleError that names file and tensor, before anything is mapped."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_rt.bundle import open_bundle, write_bundle
from dsa_rt.errors import BundleError

from .conftest import edit_manifest, make_manifest, make_tensors, pack, replace_file

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OUTSIDE = b"secret"


@pytest.fixture(autouse=True)
def small_memory() -> Iterator[None]:
    """No damage makes the check take memory: 40 MB allows for parsing a JSON file at its limit."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def refused(folder: Path, message: str, verify: tuple[bool, ...] = (True, False)) -> None:
    for verify_hashes in verify:
        with pytest.raises(BundleError, match=message) as caught:
            open_bundle(folder, verify_hashes)
        assert type(caught.value) is BundleError and str(folder) in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# The folder


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "missing", "there is no bundle")
    refused(tmp_path / "file", "is a file; a bundle is the folder")
    refused(tmp_path / "empty", "has no manifest.json")


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:  # permissions do not stop root, who may run this
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(Permission denied\)"):
            open_bundle(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", denied)
        with pytest.raises(BundleError, match="cannot be read: Permission denied"):
            open_bundle(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "generator.safetensors"])
def test_a_pipe_or_folder_instead_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    refused(folder, f"{name} is not an ordinary file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} is not an ordinary file")


# The manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "format_version None"),
        (b"3", "format_version None"),
        (b'{"format_version": 2}', "format_version 2; this dsa_rt reads 1: update"),
        (b'{"format_version": true}', "format_version True"),
        (b'{"format_version": 1, "format_version": 1}', "'format_version' appears twice"),
        (b'{"format_version": 1, "fps": NaN}', "the number 'NaN' is not finite"),
        (b'{"format_version": 1, "fps": 1e999}', "the number '1e999' is not finite"),
        (b'{"format_version": 1' + b"0" * 5000 + b"}", "does not fit into 64 bits"),
        (b'{"format_version": 1, "name": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": 1, "x": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
        (b'{"format_version": 1, "x": "' + b"a" * (9 << 20) + b'"}', "larger than 8388608 bytes"),
    ],
)
def test_broken_manifest(folder: Path, no_mapping: None, text: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(text)
    refused(folder, f"manifest.json .*{message}")


def test_a_manifest_without_end_is_not_read(folder: Path) -> None:
    with open(folder / "manifest.json", "ab") as stream:
        stream.truncate(1 << 40)
    refused(folder, "manifest.json is larger than")


LATER = {"boundary", "image_conditioning", "image_encoder"}  # keys that older bundles lack


@pytest.mark.parametrize("key", sorted(set(make_manifest().__dataclass_fields__) - LATER))
def test_every_key_is_needed(folder: Path, no_mapping: None, key: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop(key))
    refused(folder, "format_version None" if key == "format_version" else f"missing keys '{key}'")


def calibration(**level: Any) -> dict[str, Any]:
    return {"passes": 4, "levels": {"1": {"confidence": [0.1, 0.2], "gain": [1.0]} | level}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": 3}, "unknown keys 'chunks'"),
        ({"name": 3}, "name is 3; expected text"),
        ({"name": "a\nb"}, r"name is 'a\\nb'; expected a line of text"),
        ({"name": ""}, "name is ''"),
        ({"architecture": {"form": "causal"}}, 'architecture has no "kind"'),
        ({"architecture": []}, "architecture is .*expected an object"),
        ({"prediction": "x0"}, "prediction is 'x0'; this version of dsa_rt knows \"velocity\""),
        ({"fps": 0}, "fps is 0"),
        ({"fps": "16"}, "fps is '16'; expected a number"),
        ({"guidance": -1}, "guidance is -1"),
        ({"chunk_frames": None}, "chunk_frames is null; a causal"),
        ({"chunk_frames": 0}, "chunk_frames is 0"),
        ({"window": 3, "sink": 3}, "sink is 3 and window 3"),
        ({"window": 0}, "window is 0"),
        ({"size": {"height": 96, "width": 96}}, "size has missing keys 'frames'"),
        ({"size": {"height": 96, "width": -1, "frames": 1}}, "size: width is -1"),
        ({"codec": {"kind": "conv"}}, "codec has missing keys 'config'"),
        ({"codec": 3}, "codec is 3; expected an object"),
        ({"boundary": 0.9}, "disagree on whether there are two experts"),
        ({"boundary": 1.5}, "boundary is 1.5; expected null or a part of the timesteps between 0 and 1"),
        ({"image_conditioning": "last-frame"}, "image_conditioning is 'last-frame'; this version of dsa_rt knows"),
        ({"image_encoder": {"kind": "clip-vision", "config": {}}}, 'image_conditioning is "none"; expected "concat"'),
        ({"confidence_head": None}, "disagree on whether there is a confidence_head"),
        ({"files": []}, "no generator.safetensors"),
        ({"files": {}}, "files is .*expected a list"),
        ({"calibration": {}}, "calibration: passes is None"),
        ({"calibration": {"passes": 4, "levels": {"5": {}}}}, "calibration: levels are .*keys of 1 to 4"),
        ({"calibration": calibration(confidence=[0.2, 0.1])}, "confidence is not sorted"),
        ({"calibration": calibration(confidence=[0.2, 1.1])}, "confidence is not sorted from 0 to 1"),
        ({"calibration": calibration(confidence=[])}, "'confidence' is not a list of finite numbers"),
        ({"calibration": calibration(gain=[None])}, "'gain' is not a list of finite numbers"),
        (
            {"calibration": {"passes": 4, "levels": {"1": {"gain": []}}}},
            "level 1 is .*expected confidence and",
        ),
    ],
)
def test_wrong_manifest(folder: Path, no_mapping: None, change: dict[str, Any], message: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(change))
    refused(folder, message)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("schedule", {"kind": "edm"}, "schedule: kind is 'edm'; this version of dsa_rt knows \"flow\""),
        ("schedule", {"shift": 0}, "schedule: shift is 0"),
        ("schedule", {"steps": []}, "schedule: steps are .*expected falling timesteps in .0, 1000."),
        ("schedule", {"steps": [500, 500]}, "schedule: steps are .*falling"),
        ("schedule", {"steps": [1001]}, "schedule: steps are .*falling"),
        ("schedule", {"steps": [10, "5"]}, r"schedule: steps\[1\] is '5'; expected a number"),
        ("schedule", {"steps": 0}, "schedule: steps is 0"),
        ("latent", {"mean": [0.0]}, "latent: mean or std has 1 values for 2 channels"),
        ("latent", {"mean": None}, "latent: mean and std: expected both or neither"),
        ("latent", {"std": [1.0, 0.0]}, "latent: std has a value that is not above 0"),
        ("latent", {"mean": [], "std": []}, "latent: mean .*0 values"),
        ("latent", {"spatial": 0}, "latent: spatial is 0"),
    ],
)
def test_wrong_section(
    folder: Path, no_mapping: None, section: str, change: dict[str, Any], message: str
) -> None:
    edit_manifest(folder, lambda manifest: manifest[section].update(change))
    refused(folder, f"manifest.json: {message}")


# The file list


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "codec/../../outside.safetensors", "/outside.safetensors", "C:/x.safetensors",
     "codec//model.safetensors", "./generator.safetensors", "codec\\..\\x.safetensors", "", ".safetensors",
     "~/outside.safetensors", "a\x00.safetensors", "generator.safetensors/", "a" * 300 + ".safetensors",
     "generator.safetensors\n"],
)  # fmt: skip
def test_paths_that_leave_the_bundle(folder: Path, no_mapping: None, path: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(OUTSIDE)
    edit_manifest(folder, lambda manifest: manifest["files"][0].update(path=path, bytes=len(OUTSIDE)))
    refused(folder, r"manifest.json: files\[0\]: path .* is not a plain path inside the bundle")


def test_links(folder: Path, no_mapping: None) -> None:
    file = folder / "generator.safetensors"
    (folder / "kept.safetensors").write_bytes(file.read_bytes())
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to("kept.safetensors")
    assert open_bundle(folder).hashes_verified  # a link inside is fine
    file.unlink()
    file.symlink_to(outside)
    refused(folder, "generator.safetensors is a link that leaves the bundle")
    file.unlink()
    file.write_bytes(outside.read_bytes())
    (folder / "codec").rename(folder.parent / "codec")
    (folder / "codec").symlink_to("../codec")
    refused(folder, "codec/model.safetensors is a link that leaves the bundle")
    (folder / "codec").unlink()
    (folder.parent / "codec").rename(folder / "codec")
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to("../manifest.json")
    refused(folder, "manifest.json is a link that leaves the bundle")


def test_a_bundle_reached_by_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert open_bundle(folder.parent / "link").load("generator", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "model.pt"}, "'model.pt' is neither a .safetensors nor a .json file"),
        ({"path": "codec/model.safetensors"}, "files lists 'codec/model.safetensors' twice"),
        ({"path": "vae.safetensors"}, "vae.safetensors is missing; copy or export"),
        ({"sha256": "0" * 63}, "sha256 of generator.safetensors is not 64 hex digits"),
        ({"bytes": -1}, "bytes of generator.safetensors is -1"),
        (
            {"bytes": 1 << 60},
            "generator.safetensors is [0-9]+ bytes long, manifest.json says 1152921504606846976",
        ),
    ],
)
def test_wrong_file_entry(folder: Path, no_mapping: None, change: dict[str, Any], message: str) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"][0].update(change))
    refused(folder, message)


def test_a_listed_file_that_belongs_nowhere(folder: Path, no_mapping: None) -> None:
    replace_file(folder, "generator-2.safetensors", pack({"w": F32}, bytes(8)))
    refused(folder, "'generator-2.safetensors', which belongs to no component")


def test_missing_and_truncated_files(folder: Path, no_mapping: None) -> None:
    file = folder / "text_encoder/model.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-1], data + b"\0", b""):
        file.write_bytes(damaged)
        refused(
            folder,
            f"text_encoder/model.safetensors is {len(damaged)} bytes long, manifest.json says {len(data)}",
        )
    file.unlink()
    refused(folder, "text_encoder/model.safetensors is missing")


def test_wrong_hash(folder: Path, no_mapping: None) -> None:
    file = folder / "codec/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not open_bundle(folder, verify_hashes=False).hashes_verified
    refused(folder, "codec/model.safetensors does not match its SHA-256", verify=(True,))


# The tensors' headers, in files whose size and hash are right


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is 0 bytes long, too short"),
        (b"1234567", "is 7 bytes long, too short"),
        (pack({"w": F32}, bytes(8), length=1 << 50), "claims a header of 1125899906842624 bytes; expected"),
        (pack({"w": F32}, bytes(8), length=1000), "claims a header of 1000 bytes; expected at most"),
        (pack({"w": F32}, bytes(8), length=(1 << 64) - 1), "claims a header of 18446744073709551615 bytes"),
        (pack({"w": F32}, bytes(8), length=20), "the header of generator.safetensors is not valid JSON"),
        (pack(b"x" * (9 << 20)), "claims a header of 9437184 bytes; expected at most 8388608"),
        (pack({"w": F32}, bytes(8), length=0), "not a JSON object"),
        (pack(b"[]"), "not a JSON object"),
        (pack(b" {}"), "not a JSON object"),
        (pack(b'{"w": NaN}'), "not valid JSON"),
        (pack(b'{"w": ' + json.dumps(F32).encode() + b', "w": ' + json.dumps(F32).encode() + b"}", bytes(8)),
         "'w' appears twice"),
        (pack({"__metadata__": 3, "w": F32}, bytes(8)), "__metadata__ is 3"),
        (pack({"__metadata__": {"a": 3}, "w": F32}, bytes(8)), "__metadata__ is {'a': 3}"),
        (pack({"w": 3}), "tensor 'w' is 3; expected dtype, shape and data_offsets"),
        (pack({"w": {"dtype": "F32"}}), "tensor 'w' is {'dtype': 'F32'}; expected"),
        (pack({"w": F32 | {"x": 1}}, bytes(8)), "tensor 'w' is .*expected dtype, shape and data_offsets"),
        (pack({"w": F32 | {"dtype": "F8_E4M3"}}, bytes(8)), "tensor 'w' has dtype 'F8_E4M3'"),
        (pack({"w": F32 | {"dtype": ["F32"]}}, bytes(8)), "tensor 'w' has dtype"),
        (pack({"w": F32 | {"shape": [-2]}}, bytes(8)), "tensor 'w' has shape .-2.; expected positive"),
        (pack({"w": F32 | {"shape": [2, 0]}}, bytes(8)), "tensor 'w' has shape .2, 0."),
        (pack({"w": F32 | {"shape": [2.0]}}, bytes(8)), "tensor 'w' has shape"),
        (pack({"w": F32 | {"shape": [True, 2]}}, bytes(8)), "tensor 'w' has shape"),
        (pack({"w": F32 | {"shape": 2}}, bytes(8)), "tensor 'w' has shape 2"),
        (pack({"w": F32 | {"shape": [1] * 99 + [2]}}, bytes(8)), "tensor 'w' has shape"),
        (pack({"w": F32 | {"shape": [3]}}, bytes(8)), r"8 bytes of data; F32 of shape \(3,\) needs 12"),
        (pack({"w": F32 | {"shape": [1 << 62, 1 << 62]}}, bytes(8)), "'w' has 8 bytes of data; F32 of shape"),
        (pack({"w": F32 | {"shape": [1 << 70]}}, bytes(8)), "does not fit into 64 bits"),
        (pack({"w": F32 | {"data_offsets": [8, 0]}}, bytes(8)), "tensor 'w' has data_offsets"),
        (pack({"w": F32 | {"data_offsets": [-8, 0]}}, bytes(8)), "tensor 'w' has data_offsets"),
        (pack({"w": F32 | {"data_offsets": [0]}}, bytes(8)), "tensor 'w' has data_offsets"),
        (pack({"w": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "tensor 'w' leaves a gap before it"),
        (pack({"w": F32, "v": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "tensor 'v' overlaps another"),
        (pack({"w": F32, "v": F32}, bytes(8)), "tensor 'w' overlaps another"),
        (pack({"w": F32 | {"shape": [1 << 38], "data_offsets": [0, 1 << 40]}}, bytes(8)),
         "its header describes 1099511627776 bytes of tensors, it has 8"),
        (pack({"w": F32}, bytes(9)), "its header describes 8 bytes of tensors, it has 9"),
        (pack({}), "no generator.safetensors"),
    ],
)  # fmt: skip
def test_lying_headers(folder: Path, no_mapping: None, data: bytes, message: str) -> None:
    replace_file(folder, "generator.safetensors", data)
    refused(folder, message)
    refused(folder, "generator.safetensors")


def test_a_sound_file_built_by_hand_is_accepted(folder: Path) -> None:
    replace_file(folder, "generator.safetensors", pack({"w": F32}, b"\0\0\x80\x3f" * 2))
    assert open_bundle(folder).load("generator", "cpu", torch.float32)["w"].tolist() == [1.0, 1.0]


def test_names_do_not_reach_the_terminal_raw_or_long(folder: Path) -> None:
    for name in ("\x1b[2J", "w" * 1_000_000):
        replace_file(folder, "generator.safetensors", pack({name: F32 | {"shape": [3]}}, bytes(8)))
        with pytest.raises(BundleError) as caught:
            open_bundle(folder)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


# Shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index["weight_map"].update(scale=3), "has no weight_map"),
        (
            lambda index: index["weight_map"].update(new=index["weight_map"]["scale"]),
            "'new' is in none of the files",
        ),
        (
            lambda index: index["weight_map"].update(scale="../x.safetensors"),
            "names the file '../x.safetensors'",
        ),
        (lambda index: index["weight_map"].update(scale="."), "names the file '.'"),
        (lambda index: index["weight_map"].update(scale=""), "names the file ''"),
        (lambda index: index["weight_map"].pop("scale"), "belongs to no component|'scale' is not where"),
    ],
)
def test_index_that_disagrees(
    tmp_path: Path, no_mapping: None, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = tmp_path / "b"
    write_bundle(folder, make_manifest(), make_tensors(), shard_bytes=1)
    name = "generator.safetensors.index.json"
    index = json.loads((folder / name).read_bytes())
    change(index)
    replace_file(folder, name, json.dumps(index).encode())
    refused(folder, message)


def test_shards_without_index_or_beside_a_whole(tmp_path: Path, no_mapping: None) -> None:
    folder = tmp_path / "b"
    write_bundle(folder, make_manifest(), make_tensors(), shard_bytes=1)
    replace_file(folder, "generator.safetensors", pack({"w": F32}, bytes(8)))
    refused(folder, "'generator.safetensors', which belongs to no component")
    edit_manifest(folder, lambda m: m.update(files=[e for e in m["files"] if ".index." not in e["path"]]))
    refused(folder, "00001-of-.*belongs to no component")


def test_a_tensor_in_two_shards(tmp_path: Path, no_mapping: None) -> None:
    folder = tmp_path / "b"
    write_bundle(folder, make_manifest(), make_tensors(), shard_bytes=1)
    both = pack({"scale": F32, "blocks.0.bias": F32 | {"data_offsets": [8, 16]}}, bytes(16))
    shard = json.loads((folder / "generator.safetensors.index.json").read_bytes())["weight_map"]["scale"]
    replace_file(folder, shard, both)
    refused(folder, f"{shard}: tensor 'blocks.0.bias' is not where generator.safetensors.index.json says")


# Against the model, and the values


def test_missing_surplus_and_misshapen_tensors(folder: Path, no_mapping: None) -> None:
    bundle = open_bundle(folder)
    shapes = {"blocks.0.weight": (5, 3), "blocks.0.bias": (3,), "head": (4, 4)}
    with pytest.raises(BundleError) as caught:
        bundle.expect("generator", shapes)
    message = str(caught.value)
    assert "generator.safetensors does not fit manifest.json" in message and str(folder) in message
    for fault in (
        "missing tensor 'head' (4, 4)",
        "tensor 'blocks.0.weight' has shape (3, 5), expected (5, 3)",
        "surplus tensor 'scale' ()",
    ):
        assert fault in message
    assert "blocks.0.bias" not in message
    with pytest.raises(BundleError, match="missing tensor 'l0' .* and 7 more"):
        bundle.expect("generator", {f"l{i}": (1,) for i in range(9)})


def test_misshapen_tensor_in_a_shard(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", make_manifest(), make_tensors(), shard_bytes=1)
    shapes = {"blocks.0.weight": (3, 5), "blocks.0.bias": (4,), "scale": ()}
    with pytest.raises(
        BundleError, match=r"'blocks.0.bias' \(in generator-00001-of-00003.safetensors\) has shape"
    ):
        bundle.expect("generator", shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_found_anywhere(folder: Path, dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(1237).to(dtype)
    for place in {0, 1236, *torch.randint(0, 1237, (6,)).tolist()}:
        damaged = values.clone()
        damaged[place] = bad
        code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        header = {"deep.w": {"dtype": code, "shape": [1237], "data_offsets": [0, damaged.nbytes]}}
        data = damaged.view(torch.uint8).numpy().tobytes()
        replace_file(folder, "generator.safetensors", pack(header, data))
        with pytest.raises(BundleError, match="generator.safetensors: tensor 'deep.w' holds NaN or Inf"):
            open_bundle(folder).load("generator", "cpu", torch.float32)


def test_values_the_dtype_cannot_hold(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["generator"]["scale"] = torch.tensor(1e6)
    bundle = write_bundle(tmp_path / "b", make_manifest(), tensors)
    with pytest.raises(BundleError, match=r"tensor 'scale' does not fit into torch\.float16"):
        bundle.load("generator", "cpu", torch.float16)


def test_a_file_changed_after_opening(folder: Path) -> None:
    bundle = open_bundle(folder)
    replace_file(folder, "generator.safetensors", pack({"scale": F32}, bytes(8)))
    with pytest.raises(BundleError, match="generator.safetensors"):
        bundle.load("generator", "cpu", torch.float32)
    (folder / "generator.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="generator.safetensors cannot be mapped"):
        bundle.load("generator", "cpu", torch.float32)
    (folder / "generator.safetensors").unlink()
    with pytest.raises(BundleError, match="generator.safetensors"):
        bundle.load("generator", "cpu", torch.float32)


# Assets


def asset(folder: Path, data: bytes = b"{}") -> Path:
    """The bundle again, with a tokenizer."""
    write_bundle(folder, make_manifest(), make_tensors(), overwrite=True, assets={"tokenizer": data})
    return folder / "tokenizer" / "tokenizer.json"


def test_an_asset_that_is_not_what_it_was(folder: Path, no_mapping: None) -> None:
    file = asset(folder)
    file.write_bytes(b"[]")
    refused(folder, "tokenizer/tokenizer.json does not match its SHA-256", verify=(True,))
    file.write_bytes(b"{} ")
    refused(folder, "tokenizer/tokenizer.json is 3 bytes long, manifest.json says 2")
    file.unlink()
    refused(folder, "tokenizer/tokenizer.json is missing")


def test_an_asset_that_changes_after_opening(folder: Path) -> None:
    file = asset(folder)
    bundle = open_bundle(folder)
    file.write_bytes(b"[]")
    with pytest.raises(BundleError, match="tokenizer.json changed since the bundle was opened"):
        bundle.read_asset("tokenizer")
    file.unlink()
    with pytest.raises(BundleError, match="tokenizer.json is missing"):
        bundle.read_asset("tokenizer")


def test_a_bundle_without_the_asset(folder: Path) -> None:
    with pytest.raises(BundleError, match="has no tokenizer/tokenizer.json; export it again"):
        open_bundle(folder).read_asset("tokenizer")
    with pytest.raises(BundleError, match="unknown asset 'vocab'; a bundle has tokenizer"):
        write_bundle(folder, make_manifest(), make_tensors(), overwrite=True, assets={"vocab": b""})


def test_an_asset_without_end(folder: Path) -> None:
    file = asset(folder)
    with open(file, "ab") as stream:
        stream.truncate(1 << 40)

    def change(manifest: dict[str, Any]) -> None:
        next(e for e in manifest["files"] if e["path"] == "tokenizer/tokenizer.json")["bytes"] = 1 << 40

    edit_manifest(folder, change)
    refused(folder, "tokenizer/tokenizer.json has 1099511627776 bytes; expected 67108864 at most")


@pytest.mark.parametrize("boundary", [None, 0.5])
def test_one_expert_too_many_or_too_few(folder: Path, boundary: float | None) -> None:
    tensors = make_tensors()
    if boundary is None:
        tensors["generator_2"] = tensors["generator"]
    with pytest.raises(BundleError, match=r"disagree on whether there are two experts \(boundary and generator_2\)"):
        write_bundle(folder, make_manifest(boundary=boundary), tensors, overwrite=True)
