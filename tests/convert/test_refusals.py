"""Every checkpoint that cannot be converted: one error that says what was found, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import CHANNELS, original_config, original_state, transformer, write_json
from safetensors.torch import load_file, save_file

from dsa_rt.convert import Choices, convert, writing
from dsa_rt.errors import BundleError, DsaRtError, OptionError, OutputError

from .conftest import Published


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """An original folder of three shards with index and config.json, for tests to damage."""
    model = transformer(1)
    state = original_state(model)
    folder = tmp_path / "wan"
    folder.mkdir()
    names, weight_map = sorted(state), {}
    for number in range(3):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[number::3]}, folder / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", original_config(model, "t2v"))
    return folder


@pytest.fixture
def pipe(published: Published, tmp_path: Path) -> Path:
    """A whole pipeline, for tests to damage."""
    return Path(shutil.copytree(published("t2v"), tmp_path / "pipe"))


def refused(kind: type[DsaRtError], message: str, source: Path, **options: Any) -> None:
    dest = source.parent / "dest"
    before = set(source.parent.iterdir())
    with pytest.raises(kind, match=message) as caught:
        convert(source, dest, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert set(source.parent.iterdir()) == before


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: member for key, member in value.items() if member is not ...}))


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


# Other families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"], "a LoRA adapter: merge it"),
        (["transformer_blocks.0.attn1.to_q.weight", "patchify_proj.weight"], "an LTX-Video or similar transformer"),
        (["transformer_blocks.0.audio_attn1.to_q.weight"], "an LTX-2 transformer"),
        (["double_blocks.0.img_attn.qkv.weight"], "a HunyuanVideo or FLUX transformer"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a U-Net"),
        (["decoder.middle.0.residual.0.gamma"], "Wan's video codec in its original layout"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "a video codec: give its folder to --components"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "a text encoder: give its folder to --components"),
        (["weight", "bias"], "not the tensors of a Wan transformer: 'bias', 'weight'; expected 'blocks.0.self_attn"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_other_families(tmp_path: Path, names: list[str], message: str, suffix: str) -> None:
    state = {name: torch.ones(2, 3) for name in names}
    file = tmp_path / f"x.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save({"generator": state}, file)
    refused(BundleError, message, file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vace_blocks.0.after_proj.bias", "this is a Wan VACE model, which is not supported"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "this is a Wan Animate model"),
        ("casual_audio_encoder.weights", "this is a Wan S2V model"),
        ("img_emb.emb_pos", "first-and-last-frame"),
        ("blocks.0.self_attn.q.scale", "'blocks.0.self_attn.q.scale' is not part"),
    ],
)
def test_other_wans(wan: Path, name: str, message: str) -> None:
    rewrite(wan / "diffusion_pytorch_model-00002-of-00003.safetensors", lambda s: s.update({name: torch.ones(2)}))
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(BundleError, message, wan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "LTXPipeline", "transformer": ["diffusers", "LTXVideoTransformer3DModel"]},
         r"is a LTXPipeline \(its generator is a LTXVideoTransformer3DModel\); dsa-rt export reads WanPipeline"),
        ({"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline"),
        ({"transformer": [None, None]}, "has no transformer"), ({"transformer": []}, "has no transformer"),
        ({"_class_name": None, "transformer": {"a": 1}}, "is a None"),
        ({"boundary_ratio": 0.9}, "has 1 transformers and boundary_ratio 0.9"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has 2 transformers and boundary_ratio None"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}, "transformer_2' is missing"),
    ],
)  # fmt: skip
def test_model_index(pipe: Path, change: dict[str, Any], message: str) -> None:
    edit(pipe / "model_index.json", **change)
    refused(BundleError, message, pipe)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer", {"num_layers": 3}, "generator in .* has no tensor 'blocks.2.modulation'.* and .* more faults"),
        ("transformer", {"num_layers": 1}, "a surplus tensor 'blocks.1."),
        ("transformer", {"ffn_dim": 57}, r"ffn.net.0.proj.weight' of shape \(56, 48\), expected \(57, 48\)"),
        ("transformer", {"_class_name": "LTXVideoTransformer3DModel"}, "is of a 'LTXVideoTransformer3DModel'"),
        ("vae", {"_class_name": "AutoencoderKLHunyuanVideo"}, "is of a 'AutoencoderKLHunyuanVideo'; expected Auto"),
        ("vae", {"z_dim": 5}, "latents_mean has 4 values for 5 channels"),
        ("vae", {"base_dim": 16}, "the video codec in .* has tensor 'encoder.conv_in.weight' of shape"),
        ("vae", {"clip_frames": True}, "unknown keys 'clip_frames'"),
        ("vae", {"scale_factor_spatial": 4}, "scale_factor_spatial is 4, but its other sizes make it 8"),
        ("vae", {"base_dim": 10**9}, "base_dim is 1000000000; expected 1 to 4096"),
        ("vae", {"num_res_blocks": "1"}, "num_res_blocks is '1'; expected a whole number"),
        ("text_encoder", {"model_type": "t5"}, "is of a 't5' model; expected umt5"),
        ("text_encoder", {"num_layers": 3}, "the text encoder in .* has no tensor 'encoder.block.2"),
        ("text_encoder", {"d_model": ...}, "missing keys 'd_model'"),
        ("text_encoder", {"vocab_size": 10}, "tokenizer.json has token 14, but the text encoder knows 10"),
    ],
)
def test_configurations(pipe: Path, file: str, change: dict[str, Any], message: str) -> None:
    edit(pipe / file / "config.json", **change)
    refused(BundleError, message, pipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vace"}, "model_type is 'vace'; expected 't2v', 'i2v' or 'ti2v'"),
        ({"num_layers": 40}, "num_layers is 40, but the tensors beside it have 2"),
        ({"num_heads": 7}, "dim is 48 and num_heads 7"),
        ({"qk_norm": False}, "qk_norm is False; only True"),
        ({"window_size": [8, 8]}, r"window_size is \[8, 8\]"),
        ({"in_dim": 9}, "in_dim is 9, but"),
    ],
)
def test_original_configurations(wan: Path, change: dict[str, Any], message: str) -> None:
    edit(wan / "config.json", **change)
    refused(BundleError, message, wan)


def test_channels_of_no_known_kind(tmp_path: Path) -> None:
    save_file(original_state(transformer(1, 1, 128, in_channels=CHANNELS + 3)), tmp_path / "x.safetensors")
    refused(BundleError, "takes 7 channels and makes 4", tmp_path / "x.safetensors")


def test_parts_of_other_models(published: Published, pipe: Path) -> None:
    shutil.rmtree(pipe / "vae")
    refused(BundleError, "video codec has 6 latent channels, but the generator makes 4", pipe,
            components=[published("ti2v")])  # fmt: skip
    edit(pipe / "model_index.json", _class_name="WanPipeline")
    save_file(
        {k: t.contiguous() for k, t in transformer(1, in_channels=CHANNELS).state_dict().items()},
        pipe / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    wide = transformer(1)
    wide.condition_embedder.text_embedder.linear_1 = torch.nn.Linear(24, 48)
    save_file(wide.state_dict(), pipe / "transformer" / "diffusion_pytorch_model.safetensors")
    edit(pipe / "transformer" / "config.json", text_dim=24)
    refused(BundleError, "makes rows of 20, but the generator reads rows of 24", pipe)


# Files --------------------------------------------------------------------------------------------------------------


def test_missing_shards_are_named(wan: Path) -> None:
    for number in (1, 3):
        (wan / f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors").unlink()
    message = "lacks 2 of 3 shards: diffusion_pytorch_model-00001-of-00003.safetensors, .*00003-of-00003"
    refused(BundleError, message, wan)
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(BundleError, message, wan)


def test_cut_and_damaged_files(wan: Path) -> None:
    file = wan / "diffusion_pytorch_model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    refused(BundleError, "00002-of-00003.safetensors: its header describes .* not whole: download it again", wan)
    file.write_bytes(b"\xff" * 8 + data)
    refused(BundleError, "claims a header of .*download it again", wan)
    file.write_bytes(b"")
    refused(BundleError, "too short for a safetensors header", wan)


def test_index_and_shards_that_disagree(wan: Path) -> None:
    index = wan / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))
    for value, message in [("../outside.safetensors", "names the file '../outside.safetensors'; expected"),
                           ("diffusion_pytorch_model-00003-of-00003.safetensors", f"has tensor '{name}', which it has "
                                                                                  "not")]:  # fmt: skip
        write_json(index, {"weight_map": weight_map | {name: value}})
        refused(BundleError, message, wan)
    for text, message in [("{", "not valid JSON"), ("[]", "no weight_map"), ('{"weight_map": {"a": 3}}', "no weight")]:
        index.write_text(text)
        refused(BundleError, message, wan)


def test_several_models_in_a_folder(wan: Path) -> None:
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file({"x": torch.ones(1)}, wan / "other.safetensors")
    refused(BundleError, "has several models: .*other.safetensors; leave one, or name a file", wan)


def test_doubled_tensor(wan: Path) -> None:
    (wan / "diffusion_pytorch_model.safetensors.index.json").unlink()
    first, second = (load_file(wan / f"diffusion_pytorch_model-0000{n}-of-00003.safetensors") for n in (1, 2))
    name = next(iter(first))
    save_file(second | {name: first[name]}, wan / "diffusion_pytorch_model-00002-of-00003.safetensors")
    refused(BundleError, f"tensor '{name}' is in .*00001-of-00003.safetensors and in .*00002-of", wan)


def test_doubled_after_stripping(tmp_path: Path) -> None:
    state = original_state(transformer(1, 1, 128))
    state |= {"model.head.head.bias": torch.ones(16)}
    save_file(state, tmp_path / "x.safetensors")
    refused(BundleError, "tensors '.*head.head.bias' and '.*head.head.bias' are both 'head.head.bias'",
            tmp_path / "x.safetensors")  # fmt: skip


def test_places_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "high_noise_model").mkdir()
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "half" / "high_noise_model" / "m.safetensors")
    for source, message in [
        ("none", "there is no checkpoint"), ("empty", "has no .safetensors file"),
        ("old", "it has pytorch_model.bin, which is pickled: get the safetensors version"),
        ("x.gguf", "neither a folder nor a .safetensors or torch file"),
        ("half", "has no low_noise_model; the two experts belong together"),
    ]:  # fmt: skip
        refused(BundleError, message, tmp_path / source)


class Harmful:
    """What a hostile torch file would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def test_torch_files_that_are_more_than_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": {"a": torch.ones(1)}, "args": Harmful()}, tmp_path / "x.pt")
    refused(BundleError, r"not tensors \('.+'\) and was not opened, .* with torch.save$", tmp_path / "x.pt")
    assert not Path("harmed").exists()
    for content, message in [([1], "holds a list; expected a dict"), ({"critic": {"a": torch.ones(1)}}, "no tensors"),
                             ({"generator": {}}, "no tensors where its generator should be, but 'generator'"),
                             ({"generator": 3, "x": 1}, "no tensors where its generator should be")]:  # fmt: skip
        torch.save(content, tmp_path / "x.pt")
        refused(BundleError, message, tmp_path / "x.pt")
    for data in (b"", b"not a torch file at all", (tmp_path / "x.pt").read_bytes()[:-30]):
        (tmp_path / "x.pt").write_bytes(data)
        refused(BundleError, "x.pt'", tmp_path / "x.pt")


def test_tensors_missing_in_a_torch_file(tmp_path: Path) -> None:
    state = original_state(transformer(1, 1, 128, layers=3))
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    torch.save(state, tmp_path / "x.pt")
    refused(BundleError, r"no tensors of 'blocks.1.' but of later ones", tmp_path / "x.pt")


# Values, dtypes and places ------------------------------------------------------------------------------------------


def test_a_mixture_of_dtypes_is_listed(wan: Path, pipe: Path) -> None:
    name = "blocks.1.norm3.bias"
    file = wan / json.loads((wan / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"][name]
    rewrite(file, lambda s: s.update({name: s[name].bfloat16()}))
    refused(BundleError, rf"generator of .* mixes dtypes: \d+ in fp32 \(such as .*1 in bf16 \(such as '{name}'\); "
            "choose one with --dtype", wan)  # fmt: skip
    bundle = convert(wan, wan.parent / "b", dtype="bf16")
    assert {entry.dtype for entry in bundle.tensors["generator"].values()} == {torch.bfloat16}
    name = "encoder.final_layer_norm.weight"
    rewrite(pipe / "text_encoder" / "model.safetensors", lambda s: s.update({name: s[name].half()}))
    refused(BundleError, "text_encoder of .* mixes dtypes: .* in fp32 .* 1 in fp16", pipe)


def test_two_half_dtypes(tmp_path: Path) -> None:
    """With or without fp32 beside them; and fp64 beside a half one."""
    state = {name: tensor.bfloat16() for name, tensor in original_state(transformer(1, 1, 128)).items()}
    file, odd, wide = tmp_path / "wan.safetensors", "blocks.1.ffn.0.bias", "blocks.0.norm3.bias"
    for changes, found in [({odd: torch.float16}, "1 in fp16"), ({wide: torch.float64}, "1 in fp64"),
                           ({odd: torch.float16, wide: torch.float32}, "1 in fp32 .* 1 in fp16")]:  # fmt: skip
        save_file(state | {name: state[name].to(dtype) for name, dtype in changes.items()}, file)
        refused(BundleError, f"mixes dtypes: .*{found} .*; choose one with --dtype", file)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values(wan: Path, bad: float) -> None:
    name = "blocks.0.ffn.2.weight"
    file = wan / json.loads((wan / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"][name]
    rewrite(file, lambda s: s[name].view(-1)[5].fill_(bad))
    refused(BundleError, f"tensor '{name}' holds NaN or Inf", wan)
    refused(BundleError, f"tensor '{name}' holds NaN or Inf", wan, dtype="bf16")


def test_values_that_a_dtype_cannot_hold(wan: Path) -> None:
    name = "blocks.0.ffn.2.weight"
    file = wan / json.loads((wan / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"][name]
    rewrite(file, lambda s: s[name].view(-1)[5].fill_(1e6))
    refused(BundleError, f"tensor '{name}' does not fit into fp16; choose a wider --dtype", wan, dtype="fp16")
    convert(wan, wan.parent / "b", dtype="bf16")


def test_fp8_is_refused(tmp_path: Path) -> None:
    state = original_state(transformer(1, 1, 128))
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "x.pt")
    refused(BundleError, "tensors in torch.float8_e4m3fn .*get the checkpoint in bf16", tmp_path / "x.pt")
    save_file(state, tmp_path / "x.safetensors")
    refused(BundleError, "has dtype 'F8_E4M3'", tmp_path / "x.safetensors")


def test_the_tokenizer(pipe: Path, tmp_path: Path) -> None:
    file = pipe / "tokenizer" / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    refused(BundleError, "tokenizer.json cannot be read", pipe)
    file.unlink()
    (pipe / "tokenizer" / "spiece.model").write_bytes(b"x")
    refused(BundleError, "but no tokenizer.json in .*save_pretrained", pipe)


def test_an_image_encoder_without_its_processor(published: Published, tmp_path: Path) -> None:
    source = Path(shutil.copytree(published("i2v"), tmp_path / "pipe"))
    edit(source / "image_processor" / "preprocessor_config.json", do_center_crop=False)
    refused(BundleError, "do_center_crop is False", source)
    (source / "image_processor" / "preprocessor_config.json").unlink()
    refused(BundleError, "no preprocessor_config.json", source)


def test_places_to_write_to(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = wan.parent / "dest"
    convert(wan, dest)
    manifest = (dest / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match=r"exists: choose another name, or .* overwrite=True \(--overwrite\)"):
        convert(wan, dest, choices=Choices(name="x"))
    assert (dest / "manifest.json").read_bytes() == manifest
    assert convert(wan, dest, choices=Choices(name="x"), overwrite=True).manifest.name == "x"
    shutil.rmtree(dest)
    (wan.parent / "dest.partial").mkdir()
    (wan.parent / "dest.partial" / "mine.txt").write_text("mine")
    refused(OutputError, "dest.partial' exists and is no unfinished export", wan)
    shutil.rmtree(wan.parent / "dest.partial")
    with pytest.raises(OutputError, match="there is no folder"):
        convert(wan, wan.parent / "not" / "there")
    usage = shutil.disk_usage(wan)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(OutputError, "needs 0.00 GB more, but 0.00 GB are free there; make room", wan)


def test_options(wan: Path) -> None:
    for options, message in [
        ({"dtype": "fp8"}, "dtype is 'fp8'; expected"), ({"weights": "best"}, "weights is 'best'"),
        ({"weights": "ema"}, "--weights ema chooses between the generators of a torch file"),
        ({"shard_bytes": 0}, "shard size is 0"),
        ({"choices": Choices(chunk_frames=3)}, "chunk_frames: only causal generators"),
        ({"choices": Choices(boundary=0.5)}, "a boundary belongs to two experts"),
        ({"choices": Choices(steps=(1000.0,))}, "a bidirectional generator needs a number of steps"),
        ({"choices": Choices(form="causal", steps=4)}, "a causal generator needs a list of timesteps"),
    ]:  # fmt: skip
        refused(OptionError, message, wan, **options)
    refused(BundleError, "is not a folder; --components names", wan, components=[wan / "config.json"])
    with pytest.raises(OptionError, match="form is 'causl'"):
        Choices(form="causl")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_heads_that_no_file_tells(tmp_path: Path, suffix: str) -> None:
    state, file = original_state(transformer(1, 3, 32)), tmp_path / f"wan.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    refused(BundleError, "is 96 wide, which heads of 128 do not divide; .* unless a config.json", file)
