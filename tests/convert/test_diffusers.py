"""Whole diffusers pipelines of every Wan kind, through export and load, against the pipelines themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import CHANNELS, pipeline
from torch import nn

import dsa_rt
from dsa_rt import reference
from dsa_rt.bundle import open_bundle
from dsa_rt.codec.tiny import TinyDecoded
from dsa_rt.convert import Choices, convert
from dsa_rt.convert.names import from_diffusers
from dsa_rt.generate import Generate
from dsa_rt.plan import TokenGrid

from .conftest import Published

PROMPTS = ["A red  ball &amp;amp; cat\n", "", "on grass\u00a0and"]


def same(module: nn.Module, theirs: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    expected, state = from_diffusers(theirs.state_dict()), module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(dtype)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("t2v", {"image_conditioning": "none", "boundary": None, "shift": 3.0, "size": (480, 832, 81), "fps": 16.0}),
        ("i2v", {"image_conditioning": "concat", "boundary": None, "shift": 3.0}),
        ("t2v-a14b", {"image_conditioning": "none", "boundary": 0.875, "shift": 12.0}),
        ("i2v-a14b", {"image_conditioning": "concat", "boundary": 0.875}),
        ("ti2v", {"image_conditioning": "first-frame", "boundary": None, "size": (704, 1280, 121), "fps": 24.0}),
    ],
)
def test_pipelines(published: Published, tmp_path: Path, kind: str, expected: dict[str, Any]) -> None:
    theirs = pipeline(kind)
    bundle = convert(published(kind), tmp_path / "b")
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    manifest = runtime.manifest
    size = manifest.size
    found = {"image_conditioning": manifest.image_conditioning, "boundary": manifest.boundary, "fps": manifest.fps,
             "shift": manifest.schedule.shift, "size": (size.height, size.width, size.frames)}  # fmt: skip
    assert found | expected == found
    assert manifest == bundle.manifest and manifest.name == kind and manifest.schedule.steps == 50
    assert manifest.guidance == 5.0 and manifest.chunk_frames is None
    same(runtime.model, theirs.transformer)
    assert (runtime.model_2 is not None) == kind.endswith("a14b")
    if runtime.model_2 is not None:
        same(runtime.model_2, theirs.transformer_2)
    with torch.no_grad():
        rows = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    ours = runtime.text_encoder.encode(PROMPTS)
    assert ours.shape == (3, 512, 20) and torch.equal(ours, rows) and (ours[1] != 0).any(-1).sum() == 1
    assert manifest.latent.channels == theirs.vae.config.z_dim
    assert manifest.latent.spatial == theirs.vae.config.scale_factor_spatial
    check_decode(runtime.codec, theirs.vae)
    assert (runtime.image_encoder is not None) == (kind == "i2v")
    if runtime.image_encoder is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (45, 71, 3), dtype=np.uint8)
        with torch.no_grad():
            expected_rows = theirs.encode_image(Image.fromarray(pixels), "cpu")
        rows = runtime.image_encoder.encode(torch.from_numpy(pixels)[None])
        assert rows.shape == (1, 17, 24) and (rows - expected_rows).abs().max() <= 1e-5


def check_decode(codec: Any, vae: Any) -> None:
    """Normalised latents decoded as the pipelines do it."""
    latents = torch.randn(1, vae.config.z_dim, 2, 2, 3)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = vae.decode(latents * std + mean).sample
    assert expected.std() > 0.2 and (codec.decode(latents) - expected).abs().max() <= 1e-5


def test_text_to_video_runs(published: Published, tmp_path: Path) -> None:
    convert(published("t2v"), tmp_path / "b")
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    generate = runtime.compile(height=32, width=48, frames=5, steps=2)
    red, blue = generate("a red ball", seed=3), generate("a blue cat", seed=3)
    assert red.frames.shape == (5, 32, 48, 3) and red.latents.shape == (CHANNELS, 2, 4, 6)
    assert not torch.equal(red.latents, blue.latents) and torch.equal(red.frames, generate("a red ball", seed=3).frames)
    assert torch.equal(torch.cat([c.frames for c in generate.stream("a red ball", seed=3)]), red.frames)


def test_prompts_that_are_too_long(published: Published, tmp_path: Path) -> None:
    """Refused with their number of tokens and the limit, before anything of a list is made; nothing is cut off."""
    convert(published("t2v"), tmp_path / "b")
    generate = dsa_rt.load(tmp_path / "b", dtype="fp32").compile(height=16, width=16, frames=5, steps=1)
    fits, long, seen = "cat " * 511, "cat " * 512, []
    assert generate(fits).frames.shape == (5, 16, 16, 3)
    for ask in (lambda: generate(long), lambda: generate("cat", negative_prompt=long),
                lambda: generate(["cat", long], on_event=seen.append)):  # fmt: skip
        with pytest.raises(dsa_rt.PromptError, match=r"'cat .* has 513 tokens; this text encoder reads 512: shorten"):
            ask()
    assert not seen


@pytest.mark.parametrize("kind", ["t2v-a14b", "ti2v"])
def test_other_kinds_run_from_text(published: Published, tmp_path: Path, kind: str) -> None:
    convert(published(kind), tmp_path / "b")
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    video = runtime.compile(height=32, width=64, frames=5, steps=4)("a red ball", seed=3)
    assert video.frames.shape == (5, 32, 64, 3)
    if runtime.model_2 is not None:  # the second expert counts
        one = dataclasses.replace(runtime, model_2=runtime.model)
        other = one.compile(height=32, width=64, frames=5, steps=4)("a red ball", seed=3)
        assert (other.latents - video.latents).abs().max() > 1e-2


@pytest.mark.parametrize("scales", [(4.0, 2.5), (4.0, None), (3.0, 1.0)])
def test_two_experts_have_scales_of_their_own(
    published: Published, tmp_path: Path, scales: tuple[float, float | None]
) -> None:
    """The whole run against WanPipeline's with guidance_scale_2, on the same noise and noise levels."""
    theirs = pipeline("t2v-a14b")
    theirs.set_progress_bar_config(disable=True)
    convert(published("t2v-a14b"), tmp_path / "b")
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    size = {"height": 32, "width": 64}
    generate = runtime.compile(**size, frames=5, steps=4, guidance_scale=scales[0], guidance_scale_2=scales[1])
    rows = reference.philox_normal(torch.tensor([3]), torch.arange(16), 4 * CHANNELS, 0)
    expected = theirs(
        "a red ball", "a blue cat", **size, num_frames=5, num_inference_steps=4, guidance_scale=scales[0],
        guidance_scale_2=scales[1], latents=TokenGrid(2, 4).unpatchify(rows), output_type="latent",
    ).frames[0]  # fmt: skip
    sigmas = tuple(theirs.scheduler.sigmas.tolist())  # diffusers' Euler grid ends elsewhere than ours
    assert sigmas[1] > 0.875 > sigmas[2]
    generate = Generate(runtime, dataclasses.replace(generate.settings, sigmas=sigmas))
    video = generate("a red ball", seed=3, negative_prompt="a blue cat")
    assert expected.std() > 0.1 and (video.latents - expected).abs().max() <= 1e-4
    second = scales[0] if scales[1] is None else scales[1]
    assert video.stats.settings["guidance_2"] == second and video.stats.chunks[0].calls_per_pass == 2
    alone = runtime.compile(**size, frames=5, steps=4, guidance_scale=1, guidance_scale_2=2.5)
    assert alone.settings.guided and not runtime.compile(**size, frames=5, steps=4, guidance_scale=1).settings.guided
    with pytest.raises(dsa_rt.OptionError, match=r"guidance_scale_2 is -1; expected a number from 0 to 100"):
        runtime.compile(**size, guidance_scale_2=-1)


@pytest.mark.parametrize("kind", ["i2v", "i2v-a14b", "ti2v"])
def test_image_to_video_runs(published: Published, tmp_path: Path, kind: str) -> None:
    """With the encoders and the codec of the export; another image makes another video."""
    convert(published(kind), tmp_path / "b")
    generate = dsa_rt.load(tmp_path / "b", dtype="fp32").compile(height=32, width=64, frames=5, steps=2)
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    one, two = (generate("a red ball", seed=1, image=image) for image in images)
    assert one.frames.shape == (5, 32, 64, 3) and not torch.equal(one.latents, two.latents)
    assert torch.equal(generate("a red ball", seed=1, image=images[0]).latents, one.latents)


def test_parts_that_do_not_belong_together(published: Published, tmp_path: Path) -> None:
    """A manifest edited, or parts exchanged, after export."""
    convert(published("i2v"), tmp_path / "b")
    file = tmp_path / "b" / "manifest.json"
    value = json.loads(file.read_text())
    for change, message in [
        ({"image_encoder": None}, "generator image_dim is 24, but the bundle has no image_encoder"),
        ({"latent": value["latent"] | {"temporal": 2}}, "in_channels is 12 but latent plus condition channels is 10"),
        ({"latent": value["latent"] | {"spatial": 16}}, "latent spatial is 16 but codec spatial factor is 8"),
        ({"text_encoder": value["text_encoder"] | {"kind": "t5"}}, "text_encoder kind 't5' is unknown"),
    ]:
        file.write_text(json.dumps(value | change))
        with pytest.raises(dsa_rt.BundleError, match=message):
            dsa_rt.load(tmp_path / "b", dtype="fp32")


def test_fp16_keeps_the_text_encoder_in_bf16(published: Published, tmp_path: Path) -> None:
    convert(published("i2v"), tmp_path / "b")
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp16")
    assert runtime.image_encoder is not None
    dtypes = [next(part.parameters()).dtype for part in
              (runtime.model, runtime.codec, runtime.text_encoder, runtime.image_encoder)]  # fmt: skip
    assert dtypes == [torch.float16, torch.float16, torch.bfloat16, torch.float32]


def test_exported_again_from_memory(published: Published, tmp_path: Path) -> None:
    """As after training: a bundle of the same parts, written by dsa_rt.export."""
    convert(published("t2v"), tmp_path / "a")
    one = dsa_rt.load(tmp_path / "a", dtype="fp32")
    assert not isinstance(one.codec, TinyDecoded)
    dsa_rt.export(
        tmp_path / "b", name="again", model=one.model, codec=one.codec, text_encoder=one.text_encoder,
        schedule=one.manifest.schedule, size=one.manifest.size, guidance=5.0, dtype=torch.float32,
    )  # fmt: skip
    two = dsa_rt.load(tmp_path / "b", dtype="fp32")
    assert two.manifest.codec == one.manifest.codec and two.manifest.text_encoder == one.manifest.text_encoder
    first, second = (
        runtime.compile(height=16, width=32, frames=5, steps=1)("a red ball", seed=1) for runtime in (one, two)
    )
    assert torch.equal(first.frames, second.frames)


def test_shards_change_nothing(published: Published, tmp_path: Path) -> None:
    """Shards of the source, found by an index; the bundle's own shards hold the same tensors."""
    pipeline("t2v").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 2
    one = convert(published("t2v"), tmp_path / "one", choices=Choices(name="x"))
    convert(tmp_path / "sharded", tmp_path / "two", choices=Choices(name="x"))
    for file, data in contents(tmp_path / "one").items():
        assert file == "manifest.json" or data == contents(tmp_path / "two")[file], file
    convert(published("t2v"), tmp_path / "small", shard_bytes=30_000)
    small = open_bundle(tmp_path / "small")
    assert len([e for e in small.manifest.files if e.path.startswith("generator-")]) > 3
    for component in one.tensors:
        expected, found = (b.load(component, "cpu", torch.float32) for b in (one, small))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), component


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_is_that_of_all_weights(published: Published, tmp_path: Path, dtype: str) -> None:
    bundle = convert(published("t2v"), tmp_path / "b", dtype=dtype)
    number = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {entry.dtype for part in bundle.tensors.values() for entry in part.values()} == {number}
    same(dsa_rt.load(tmp_path / "b", dtype=dtype).model, pipeline("t2v").transformer, number)


def keep_in_fp32(module: nn.Module, half: torch.dtype, parts: list[str]) -> None:
    for name, parameter in module.named_parameters():
        if not any(part in name for part in parts):
            parameter.data = parameter.data.to(half)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_with_parts_in_fp32(published: Published, tmp_path: Path, dtype: str) -> None:
    """As the libraries load half models and save them again: what they keep in fp32 stays so, bit for bit."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    theirs = pipeline("t2v")
    keep_in_fp32(theirs.transformer, half, theirs.transformer._keep_in_fp32_modules)
    keep_in_fp32(theirs.text_encoder, half, theirs.text_encoder._keep_in_fp32_modules if dtype == "fp16" else [])
    theirs.save_pretrained(tmp_path / "half")
    bundle = convert(tmp_path / "half", tmp_path / "b")
    for component, module in {"generator": theirs.transformer, "text_encoder": theirs.text_encoder}.items():
        expected = Counter(parameter.dtype for parameter in module.parameters())
        assert Counter(entry.dtype for entry in bundle.tensors[component].values()) == expected
        assert set(expected) == ({half} if (component, dtype) == ("text_encoder", "bf16") else {half, torch.float32})
    same(dsa_rt.load(tmp_path / "b", dtype="fp32").model, theirs.transformer)
    runtime = dsa_rt.load(tmp_path / "b", dtype="bf16")
    assert {tensor.dtype for tensor in runtime.model.state_dict().values()} == {torch.bfloat16}
    assert runtime.compile(height=16, width=32, frames=5, steps=1)("a red ball").frames.float().std() > 1
    asked = convert(tmp_path / "half", tmp_path / "c", dtype=dtype)
    assert {entry.dtype for part in asked.tensors.values() for entry in part.values()} == {half}


def test_parts_from_elsewhere(published: Published, tmp_path: Path) -> None:
    """A transformer's folder alone, with encoders and codec from other folders, together or each its own."""
    source = published("t2v")
    alone = convert(source / "transformer", tmp_path / "alone")
    assert alone.manifest.codec is None and alone.manifest.text_encoder is None
    with pytest.raises(dsa_rt.BundleError, match="exported without its codec.*--components"):
        dsa_rt.load(tmp_path / "alone")
    shutil.copytree(source / "text_encoder", tmp_path / "umt5")
    shutil.copy(source / "tokenizer" / "tokenizer.json", tmp_path / "umt5")
    convert(source / "transformer", tmp_path / "half", components=[tmp_path / "umt5"])
    with pytest.raises(dsa_rt.BundleError, match="exported without its codec"):
        dsa_rt.load(tmp_path / "half")
    both = convert(source / "transformer", tmp_path / "both", components=[tmp_path / "umt5", source / "vae"])
    whole = convert(source / "transformer", tmp_path / "whole", components=[source])
    assert both.manifest.files == whole.manifest.files
    assert dsa_rt.load(tmp_path / "both", dtype="fp32").text_encoder.dim == 20


def test_a_whole_umt5_gives_its_encoder(published: Published, tmp_path: Path) -> None:
    """As google/umt5-xxl is published: with the decoder, and the embedding under both of its names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(published("t2v"), tmp_path / "p")
    file = tmp_path / "p" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state |= {"encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.randn(40, 20),
              "decoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(18, 20)}  # fmt: skip
    save_file(state, file)
    expected = convert(published("t2v"), tmp_path / "a")
    found = convert(tmp_path / "p", tmp_path / "b")
    digest = {entry.path: entry.sha256 for entry in expected.manifest.files}
    assert {entry.path: entry.sha256 for entry in found.manifest.files} == digest


def test_the_name_of_a_folder(published: Published, tmp_path: Path) -> None:
    """Is the bundle's, dots and all; of a file without its suffix."""
    source = Path(shutil.copytree(published("t2v") / "transformer", tmp_path / "Wan2.1-T2V-1.3B"))
    assert convert(source, tmp_path / "a").manifest.name == "Wan2.1-T2V-1.3B"
    file = (source / "diffusion_pytorch_model.safetensors").rename(source / "wan2.1_t2v.safetensors")
    assert convert(file, tmp_path / "b").manifest.name == "wan2.1_t2v"


def test_choices(published: Published, tmp_path: Path) -> None:
    choices = Choices(
        name="mine", steps=7, shift=4.5, guidance=3.0, height=64, width=32, frames=9, fps=12.5, boundary=0.9
    )
    manifest = convert(published("t2v-a14b"), tmp_path / "b", choices=choices).manifest
    assert (manifest.name, manifest.schedule.steps, manifest.schedule.shift) == ("mine", 7, 4.5)
    assert (manifest.guidance, manifest.fps, manifest.boundary) == (3.0, 12.5, 0.9)
    assert (manifest.size.height, manifest.size.width, manifest.size.frames) == (64, 32, 9)


def test_progress_and_training_notes(published: Published, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    bundle = convert(published("t2v"), tmp_path / "b", progress=lambda *at: seen.append(at))
    total = sum(entry.nbytes for part in bundle.tensors.values() for entry in part.values())
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert bundle.manifest.training == {"converted_from": "t2v"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b"]
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert names == {"manifest.json", "generator.safetensors", "codec", "text_encoder", "tokenizer"}


def test_names_of_older_files(published: Published, tmp_path: Path) -> None:
    """norm_added_q is in files of early versions and read by none; VAE configurations had fewer keys."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(published("i2v"), tmp_path / "p")
    file = tmp_path / "p" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.randn(48)}
    save_file(state, file)
    file = tmp_path / "p" / "vae" / "config.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key in
           {"_class_name", "base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample",
            "dropout", "latents_mean", "latents_std"}}  # fmt: skip
    file.write_text(json.dumps(old | {"clip_output": False}))
    expected, found = convert(published("i2v"), tmp_path / "a"), convert(tmp_path / "p", tmp_path / "b")
    assert found.manifest.files == expected.manifest.files and found.manifest.codec == expected.manifest.codec
