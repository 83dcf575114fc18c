"""The original Wan layout: one file or shards, with config.json or without; two experts; other programs' prefixes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published import CHANNELS, original_config, original_state, transformer, write_json
from safetensors.torch import save_file
from torch import Tensor

import dsa_rt
from dsa_rt.bundle import Bundle, open_bundle
from dsa_rt.convert import Choices, convert
from dsa_rt.convert.names import from_original
from dsa_rt.models.config import WanConfig

from .conftest import Published

WIDE = {"heads": 1, "head_dim": 128}  # without config.json heads are taken to be 128 wide


def write_shards(folder: Path, state: dict[str, Tensor], count: int, index: bool) -> list[Path]:
    folder.mkdir(parents=True)
    names = sorted(state)
    files, weight_map = [], {}
    for number in range(count):
        file = folder / f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in names[number::count]}, file)
        weight_map |= dict.fromkeys(names[number::count], file.name)
        files.append(file)
    if index:
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    return files


def check(bundle: Bundle, state: dict[str, Tensor], component: str = "generator") -> None:
    loaded, expected = bundle.load(component, "cpu", torch.float32), from_original(state)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("config", [True, False])
def test_shards(tmp_path: Path, index: bool, config: bool) -> None:
    model = transformer(1, **({} if config else WIDE), layers=3)
    state = original_state(model)
    write_shards(tmp_path / "wan", state, 4, index)
    if config:
        write_json(tmp_path / "wan" / "config.json", original_config(model, "t2v"))
    bundle = convert(tmp_path / "wan", tmp_path / "b", choices=Choices(steps=3))
    check(bundle, state)
    found = bundle.config("architecture", WanConfig)
    assert (found.heads, found.layers, found.text_length) == (2 if config else 1, 3, 512)
    assert bundle.manifest.schedule.shift == 5.0 and bundle.manifest.latent.channels == CHANNELS


def test_makes_the_video_of_the_diffusers_export(published: Published, tmp_path: Path) -> None:
    """The same weights in the original layout, with the encoder and the codec of the pipeline: the same frames."""
    model = transformer()
    write_shards(tmp_path / "wan", original_state(model), 2, index=True)
    write_json(tmp_path / "wan" / "config.json", original_config(model, "t2v"))
    choices = Choices(steps=5, shift=3.0, height=32, width=48, frames=5)
    convert(tmp_path / "wan", tmp_path / "original", components=[published("t2v")], choices=choices)
    convert(published("t2v"), tmp_path / "diffusers", choices=choices)
    policy = "hsa:groups=0.5@5+0.5@1,window=0.6,selection=random"
    one, other = (
        dsa_rt.load(tmp_path / name, dtype="fp32").compile(policy=policy)("a red ball", seed=2)
        for name in ("original", "diffusers")
    )
    assert one.frames.shape == (5, 32, 48, 3) and torch.equal(one.frames, other.frames)
    assert one.frames.float().std() > 10 and one.latents.std() > 0.3


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.", "diffusion_model.", "module.model."])
def test_one_file(tmp_path: Path, prefix: str) -> None:
    state = original_state(transformer(2, **WIDE))
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "wan.safetensors")
    bundle = convert(tmp_path / "wan.safetensors", tmp_path / "b")
    check(bundle, state)
    assert bundle.manifest.name == "wan" and bundle.manifest.chunk_frames is None


def test_what_lies_beside_a_file(published: Published, tmp_path: Path) -> None:
    """Another model's configuration and encoders that nobody named do not count; the file's own configuration does."""
    shutil.copytree(published("t2v"), tmp_path / "p")
    model = transformer(3, **WIDE)
    save_file(original_state(model), tmp_path / "p" / "wan.safetensors")
    write_json(tmp_path / "p" / "config.json", {"model_type": "bert", "num_heads": 3, "num_attention_heads": 3})
    bundle = convert(tmp_path / "p" / "wan.safetensors", tmp_path / "b")
    assert bundle.manifest.text_encoder is None and bundle.config("architecture", WanConfig).heads == 1
    write_json(tmp_path / "p" / "config.json", original_config(model, "t2v") | {"num_heads": 2})
    bundle = convert(tmp_path / "p" / "wan.safetensors", tmp_path / "c")
    assert bundle.config("architecture", WanConfig).heads == 2


def test_one_file_by_names_of_diffusers(tmp_path: Path) -> None:
    model = transformer(3, **WIDE)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "wan.safetensors")
    check(convert(tmp_path / "wan.safetensors", tmp_path / "b"), original_state(model))


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("t2v", {}, "none"),
        ("i2v", {"in_channels": 2 * CHANNELS + 4}, "concat"),
        ("i2v", {"in_channels": 2 * CHANNELS + 4, "image_dim": 24, "added_kv_proj_dim": 48}, "concat"),
        ("ti2v", {}, "first-frame"),
    ],
)
def test_how_an_image_enters(tmp_path: Path, kind: str, sizes: dict[str, Any], expected: str) -> None:
    model = transformer(4, **sizes)
    state = original_state(model)
    (tmp_path / "wan").mkdir()
    save_file(state, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "wan" / "config.json", original_config(model, kind))
    bundle = convert(tmp_path / "wan", tmp_path / "b")
    check(bundle, state)
    assert bundle.manifest.image_conditioning == expected
    assert bundle.config("architecture", WanConfig).image_dim == sizes.get("image_dim")
    assert bundle.manifest.latent.spatial == (16 if kind == "ti2v" else 8)


def test_ti2v_is_known_by_its_channels(tmp_path: Path) -> None:
    state = original_state(transformer(4, in_channels=48, out_channels=48, **WIDE))
    save_file(state, tmp_path / "wan.safetensors")
    manifest = convert(tmp_path / "wan.safetensors", tmp_path / "b").manifest
    assert manifest.image_conditioning == "first-frame" and manifest.fps == 24.0


@pytest.mark.parametrize(("kind", "boundary"), [("t2v", 0.875), ("i2v", 0.9)])
def test_two_experts(tmp_path: Path, kind: str, boundary: float) -> None:
    sizes = {} if kind == "t2v" else {"in_channels": 2 * CHANNELS + 4}
    states = []
    for number, name in enumerate(("high_noise_model", "low_noise_model")):
        model = transformer(5 + number, **sizes)
        states.append(original_state(model))
        write_shards(tmp_path / "wan" / name, states[-1], 2, index=True)
        write_json(tmp_path / "wan" / name / "config.json", original_config(model, kind))
    bundle = convert(tmp_path / "wan", tmp_path / "b")
    assert bundle.manifest.boundary == boundary
    check(bundle, states[0])
    check(bundle, states[1], "generator_2")
    assert open_bundle(tmp_path / "b").manifest == bundle.manifest


def test_eps_and_text_length_are_read(tmp_path: Path) -> None:
    model = transformer(8)
    (tmp_path / "wan").mkdir()
    save_file(original_state(model), tmp_path / "wan" / "m.safetensors")
    config = original_config(model, "t2v") | {"eps": 1e-5, "text_len": 77}
    (tmp_path / "wan" / "config.json").write_text(json.dumps(config))
    found = convert(tmp_path / "wan", tmp_path / "b").config("architecture", WanConfig)
    assert (found.eps, found.text_length) == (1e-5, 77)
