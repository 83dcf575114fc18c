"""Parts of a model on their way into a bundle: which tensor comes from where, and what happens to it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_rt.bundle.strict import MAX_JSON_BYTES, load_json, parse, short
from dsa_rt.bundle.tensors import TensorEntry, check_writable, is_finite
from dsa_rt.convert.names import diffusers_name, patch_rows, wan_name
from dsa_rt.convert.sources import Source, open_safetensors
from dsa_rt.errors import BundleError
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "model.")
_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Move:
    """One tensor: ``key`` of ``source`` becomes what ``entry`` says, by ``change`` and a cast."""

    source: Source
    key: str
    entry: TensorEntry
    change: Callable[[Tensor], Tensor] | None = None

    def read(self) -> Tensor:
        """The tensor as the bundle has it; BundleError for values that no reader would accept."""
        found = self.source.read(self.key)
        where = f"{self.source.entries[self.key].file}: tensor {short(self.key)}"
        moved = (self.change(found) if self.change is not None else found).to(self.entry.dtype)
        if tuple(moved.shape) != self.entry.shape:
            raise BundleError(f"{where} has another shape than its file's header says; download it again")
        if moved.dtype != found.dtype and moved.is_floating_point() and not is_finite(moved) and is_finite(found):
            raise BundleError(f"{where} does not fit into {_DTYPES[moved.dtype]}; choose a wider --dtype")
        check_writable(self.key, moved, self.source.entries[self.key].file)
        return moved


Part = dict[str, Move]  # a component's tensors by their names in the bundle


def strip(names: Sequence[str]) -> dict[str, str]:
    """Names without what training wrappers and other programs put in front: stripped -> as it was."""
    found: dict[str, str] = {}
    for name in names:
        plain = _WRAPPERS.sub("", name)
        for prefix in _PREFIXES:
            plain = plain.removeprefix(prefix)
        if plain in found:
            raise BundleError(f"tensors {short(found[plain])} and {short(name)} are both {short(plain)}; leave one")
        found[plain] = name
    return found


def is_diffusers(names: Mapping[str, str]) -> bool:
    """Whether a Wan transformer's stripped names are those of diffusers; BundleError when it is no Wan transformer."""
    if _described(names, _DERIVED):
        raise BundleError(foreign(names))
    if any(re.match(r"blocks\.\d+\.self_attn\.", name) for name in names):
        return False
    if any(re.match(r"blocks\.\d+\.attn1\.", name) for name in names):
        return True
    raise BundleError(foreign(names))


_DERIVED = (
    (r"lora", "a LoRA adapter: merge it into its model first"),
    (r"vace_", "a Wan VACE model, which is not supported"),
    (r"face_adapter|motion_encoder", "a Wan Animate model, which is not supported"),
    (r"audio_encoder|audio_injector", "a Wan S2V model, which is not supported"),
)
_FAMILIES = (
    (r"decoder\.middle\.0\.residual", "Wan's video codec in its original layout: give its diffusers folder (vae/) to "
                                      "--components"),
    (r"token_embedding\.weight|encoder\.block\.0\.layer", "a text encoder: give its folder to --components"),
    (r"decoder\.(conv_in|up_blocks)", "a video codec: give its folder to --components"),
    (r"audio_.*(attn|proj)|av_ca_", "an LTX-2 transformer, which this version does not read"),
    (r"patchify_proj|transformer_blocks\.0\.(attn1|scale_shift_table)", "an LTX-Video or similar transformer, which is "
                                                                        "not supported"),
    (r"double_blocks|single_transformer_blocks", "a HunyuanVideo or FLUX transformer, which is not supported"),
    (r"joint_blocks", "a Stable Diffusion 3 or Mochi transformer, which is not supported"),
    (r"input_blocks|down_blocks", "a U-Net, which is not supported"),
)  # fmt: skip


def foreign(names: Mapping[str, str]) -> str:
    """Says what tensors that are no Wan transformer probably are."""
    if family := _described(names, _DERIVED + _FAMILIES):
        return f"this is {family}; expected the transformer of a Wan model"
    shown = ", ".join(short(name) for name in sorted(names)[:4]) or "none at all"
    return f"these are not the tensors of a Wan transformer: {shown}; expected 'blocks.0.self_attn.q.weight' and others"


def _described(names: Mapping[str, str], families: Sequence[tuple[str, str]]) -> str | None:
    return next((text for pattern, text in families if any(re.search(pattern, name) for name in names)), None)


def generator(source: Source, config: WanConfig, names: Mapping[str, str], diffusers: bool) -> Part:
    """The tensors of a Wan transformer; BundleError unless they are exactly those of ``config``.

    names: stripped -> in the source. diffusers: whether they are diffusers' or the original ones.
    """
    part: Part = {}
    for name, key in names.items():
        if re.fullmatch(r"blocks\.\d+\.attn2\.norm_added_q\.weight", name):
            continue  # in files of early diffusers versions, never read by any
        if diffusers:
            ours = wan_name(name)
        else:
            diffusers_name(name)  # refuses what the original code has not
            ours = name
        entry = source.entries[key]
        if ours == "patch_embedding.weight" and len(entry.shape) == 5:
            dim, channels, *patch = entry.shape
            rows = replace(entry, shape=(dim, channels * patch[0] * patch[1] * patch[2]))
            part[ours] = Move(source, key, rows, patch_rows)
        else:
            part[ours] = Move(source, key, entry)
    with torch.device("meta"):
        model = WanModel(config)
    return matched(part, model, "the generator", source)


def confidence_head(
    source: Source, names: Mapping[str, str], model: WanConfig, taps: Sequence[int]
) -> tuple[Part, ConfidenceConfig]:
    """The tensors of a generator's confidence head by :mod:`dsa_rt.models.confidence`'s names, and its configuration.

    BundleError where it does not fit the generator, OptionError for taps that do not rise.
    """
    part = {name: Move(source, key, source.entries[key]) for name, key in names.items()}
    blocks = {name.split(".")[1] for name in part if name.startswith("blocks.")}
    if "blocks.0.ffn.0.weight" not in part or len(blocks) != len(taps):
        raise BundleError(
            f"{source.files[0]}: the confidence head reads {len(blocks)} blocks of the generator; say which they are "
            f"with --taps (0-based; now {', '.join(map(str, taps)) or 'none'})"
        )
    ffn_dim, dim = part["blocks.0.ffn.0.weight"].entry.shape
    config = ConfidenceConfig(dim, model.heads, ffn_dim, tuple(taps))
    if dim != model.dim or config.taps[-1] >= model.layers:
        raise BundleError(
            f"{source.files[0]}: a confidence head of width {dim} that reads blocks {', '.join(map(str, taps))} does "
            f"not fit a generator of width {model.dim} with blocks 0 to {model.layers - 1}; choose other --taps, or "
            "the head of this generator"
        )
    with torch.device("meta"):
        head = ConfidenceHead(config)
    return matched(part, head, "the confidence head", source), config


def matched(part: Part, module: nn.Module, what: str, source: Source) -> Part:
    """The part, in the module's order; BundleError where names or shapes are not the module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    faults = [f"no tensor {short(name)}" for name in expected if name not in part]
    faults += [f"a surplus tensor {short(move.key)}" for name, move in part.items() if name not in expected]
    faults += [
        f"tensor {short(part[name].key)} of shape {part[name].entry.shape}, expected {shape}"
        for name, shape in expected.items()
        if name in part and part[name].entry.shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more faults" if len(faults) > 5 else ""
        raise BundleError(
            f"{what} in '{source.files[0].parent}' has {'; '.join(faults[:5])}{more}: its files are not all there, or "
            "do not fit its config.json"
        )
    return {name: part[name] for name in expected}


def with_dtype(part: Part, dtype: torch.dtype | None, what: str) -> Part:
    """The part in the floating-point dtype that is given; with None every tensor keeps its own.

    That is one dtype for all, or a half one beside less in fp32: diffusers and transformers keep norms, modulation and
    the time embedding wide in a model that is otherwise half. BundleError for any other mixture.
    """
    found: dict[torch.dtype, list[Move]] = defaultdict(list)
    for move in part.values():
        if move.entry.dtype.is_floating_point:
            found[move.entry.dtype].append(move)
    if odd := next((kind for kind in found if kind not in _DTYPES), None):
        raise BundleError(
            f"{what} has tensors in {odd} (such as {short(found[odd][0].key)}), whose scales this version does not "
            "read; get the checkpoint in bf16, fp16 or fp32"
        )
    if dtype is None:
        sizes = {kind: sum(move.entry.numel for move in moves) for kind, moves in found.items()}
        most = max(sizes, key=sizes.__getitem__)
        if len(sizes) > 1 and (most.itemsize != 2 or sizes.keys() != {most, torch.float32}):
            counts = [f"{len(m)} in {_DTYPES[kind]} (such as {short(m[0].key)})" for kind, m in found.items()]
            raise BundleError(f"{what} mixes dtypes: {', '.join(counts)}; choose one with --dtype")
        return part
    return {
        name: replace(move, entry=replace(move.entry, dtype=dtype)) if move.entry.dtype.is_floating_point else move
        for name, move in part.items()
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; BundleError for anything else."""
    try:
        with open(file, "rb") as stream:
            value = load_json(stream.read(MAX_JSON_BYTES + 1), str(file))
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file} is not a JSON object; download it again")
    return value


@dataclass(frozen=True)
class Component:
    """A codec or encoder: its manifest entry, its tensors, and the files that go along unread (name -> path)."""

    kind: str
    config: dict[str, Any]
    part: Part
    assets: Mapping[str, Path]


def video_codec(folder: Path) -> Component:
    """``AutoencoderKLWan`` from its diffusers folder."""
    from dsa_rt.codec.wan_vae import WanVaeCodec, WanVaeConfig

    config = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderKLWan":
        raise BundleError(f"{folder / 'config.json'} is of a {config.get('_class_name')!r}; expected AutoencoderKLWan")
    values = WanVaeConfig.from_diffusers(config)
    source = open_safetensors(folder)
    with torch.device("meta"):
        module = WanVaeCodec(parse(WanVaeConfig, values, str(folder / "config.json")))
    part = {name: Move(source, name, entry) for name, entry in source.entries.items()}
    return Component(module.kind, module.to_dict(), matched(part, module, "the video codec", source), {})


def text_encoder(folder: Path, tokenizer: Path, length: int) -> Component:
    """UMT5's encoder from its folder (of a whole UMT5 too, whose decoder is left out) and its tokenizer.json."""
    from dsa_rt.codec.umt5 import Umt5Config, Umt5TextEncoder

    config = read_json(folder / "config.json")
    if config.get("model_type") != "umt5":
        raise BundleError(f"{folder / 'config.json'} is of a {config.get('model_type')!r} model; expected umt5")
    values = Umt5Config.from_transformers(config, length)
    source = open_safetensors(folder)
    with torch.device("meta"):
        module = Umt5TextEncoder(
            parse(Umt5Config, values, str(folder / "config.json")), tokenizer.read_bytes()
        )
    names = {name: name for name in source.entries if not name.startswith(("decoder.", "lm_head."))}
    if "shared.weight" in names:  # the embedding, which the encoder's own copy repeats where there is one
        del names["shared.weight"]
        names["encoder.embed_tokens.weight"] = "shared.weight"
    part = {name: Move(source, key, source.entries[key]) for name, key in names.items()}
    part = matched(part, module, "the text encoder", source)
    return Component(module.kind, module.to_dict(), part, {"tokenizer": tokenizer})


def image_encoder(folder: Path, processor: Path) -> Component:
    """CLIP's vision model from its folder (of a whole CLIP too) and its preprocessor_config.json."""
    from dsa_rt.codec.clip import ClipVisionConfig, ClipVisionEncoder

    config = read_json(folder / "config.json")
    config = config.get("vision_config", config)
    values = ClipVisionConfig.from_transformers(config, read_json(processor))
    source = open_safetensors(folder)
    with torch.device("meta"):
        module = ClipVisionEncoder(parse(ClipVisionConfig, values, f"{folder / 'config.json'} and {processor}"))
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    part = {
        f"model.{name.removeprefix('vision_model.')}": Move(source, name, entry)
        for name, entry in source.entries.items()
        if not name.startswith(others) and not name.endswith("position_ids")
    }
    return Component(module.kind, module.to_dict(), matched(part, module, "the image encoder", source), {})


def tiny_decoder(source: Source) -> Component:
    """A tiny decoder in the TAEHV layout; the encoder beside it is left out."""
    from dsa_rt.codec import tiny

    entries = {name: entry for name, entry in source.entries.items() if tiny.wanted(name)}
    config = tiny.config_of({name: entry.shape for name, entry in entries.items()}, str(source.files[0]))
    with torch.device("meta"):
        module = tiny.TinyCodec(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    part = {}
    for name, entry in entries.items():
        cut = tiny.rows(name, config)
        if cut is not None and len(entry.shape) == 4 and entry.shape[0] > cut:
            part[name] = Move(source, name, replace(entry, shape=shapes[name]), partial(_last, count=cut))
        else:
            part[name] = Move(source, name, entry)
    return Component(module.kind, module.to_dict(), matched(part, module, "the tiny decoder", source), {})


def _last(tensor: Tensor, count: int) -> Tensor:
    return tensor[-count:]
