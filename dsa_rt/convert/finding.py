"""What a published checkpoint is: its generators, and what its files say of how they are run.

Three forms: a folder of diffusers (``model_index.json``), the original Wan layout (safetensors, perhaps with
``config.json``; Wan 2.2 A14B as ``high_noise_model`` and ``low_noise_model``), and a torch file of Self-Forcing and its
kin (a dict with ``generator_ema`` and ``generator``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dsa_rt.bundle.strict import short
from dsa_rt.convert import parts
from dsa_rt.convert.names import config_from_diffusers, config_of, diffusers_name, wan_name
from dsa_rt.convert.sources import TORCH_SUFFIXES, Source, open_safetensors, open_torch, torch_source
from dsa_rt.errors import BundleError, OptionError
from dsa_rt.models.config import WanConfig

TEXT_LENGTH = 512  # rows of a prompt in all published Wan models; no file says so but the original config.json
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
_EXPERTS = ("high_noise_model", "low_noise_model")
_CONFIG = {"dim": "dim", "ffn_dim": "ffn_dim", "num_layers": "layers", "in_dim": "in_channels",
           "out_dim": "out_channels", "freq_dim": "freq_dim", "text_dim": "text_dim"}  # fmt: skip
_HEAD = "confidence_head."

Conditioning = Literal["none", "concat", "first-frame"]


@dataclass(frozen=True)
class Found:
    """A checkpoint. generators: one, or two experts, the one for high noise first. head: a confidence head's tensors.

    folders: where encoders and codec may lie. shift, boundary: as the files say, None where they do not. weights: which
    of a torch file's generators it is. first_frame: whether a first frame goes in place of noisy tokens (TI2V).
    """

    config: WanConfig
    generators: tuple[parts.Part, ...]
    folders: tuple[Path, ...] = ()
    shift: float | None = None
    boundary: float | None = None
    first_frame: bool = False
    head: tuple[Source, Mapping[str, str]] | None = None
    weights: str | None = None

    @property
    def image_conditioning(self) -> Conditioning:
        return "first-frame" if self.first_frame else "none" if self._plain else "concat"

    @property
    def _plain(self) -> bool:
        return self.config.in_channels == self.config.out_channels


def find(source: Path, weights: str | None = None, form: str | None = None) -> Found:
    """Opens a checkpoint and checks that its generators are whole; reads no tensor. BundleError says what it is not.

    weights: "ema" or "raw", which of a torch file's generators to take; None prefers "ema". form: "causal" or
    "bidirectional", how the generator was trained, which no file says; None: causal from a torch file, else not.
    """
    if not source.exists():
        raise BundleError(f"there is no checkpoint '{source}'; check the path")
    if source.is_file() and source.suffix in TORCH_SUFFIXES:
        return _torch(source, weights, form or "causal")
    form = form or "bidirectional"
    if weights is not None:
        raise OptionError(f"--weights {weights} chooses between the generators of a torch file; '{source}' is none")
    if source.is_file():
        if source.suffix != ".safetensors":
            expected = ", ".join(TORCH_SUFFIXES)
            raise BundleError(f"'{source}' is neither a folder nor a .safetensors or torch file ({expected})")
        return _original(source, form)
    if (source / "model_index.json").is_file():
        return _pipeline(source, form)
    if any((source / name).is_dir() for name in _EXPERTS):
        return _experts(source, form)
    return _original(source, form)


def _pipeline(folder: Path, form: str) -> Found:
    index = parts.read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        made_of = _class(index, "transformer") or _class(index, "unet")
        raise BundleError(
            f"'{folder}' is a {kind} (its generator is a {made_of}); dsa-rt export reads {' and '.join(PIPELINES)}"
        )
    names = [name for name in ("transformer", "transformer_2") if _class(index, name)]
    if names != ["transformer", "transformer_2"][: len(names)] or not names:
        raise BundleError(f"'{folder}': model_index.json has no transformer; expected one, or two experts")
    boundary = index.get("boundary_ratio")
    if (len(names) == 2) != isinstance(boundary, float):
        raise BundleError(
            f"'{folder}': model_index.json has {len(names)} transformers and boundary_ratio {boundary!r}; expected a "
            "number with two experts, and null with one"
        )
    found = [_transformer(folder / name, form) for name in names]
    _same(found, names)
    return replace(
        found[0], generators=tuple(one.generators[0] for one in found), folders=(folder,),
        shift=_scheduler_shift(folder / "scheduler" / "scheduler_config.json"), boundary=boundary,
        first_frame=found[0].first_frame or index.get("expand_timesteps") is True,
    )  # fmt: skip


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a pipeline's part; None where it has none."""
    value = index.get(name)
    return value[1] if isinstance(value, list) and len(value) == 2 else None


def _scheduler_shift(file: Path) -> float | None:
    """The shift of a flow-matching scheduler's configuration; None where there is none, or it varies with the size."""
    if not file.is_file():
        return None
    config = parts.read_json(file)
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise BundleError(
            f"{file}: prediction_type is {config['prediction_type']!r}; expected 'flow_prediction', which all Wan "
            "models have"
        )
    shift = config.get("flow_shift", config.get("shift"))
    if config.get("use_dynamic_shifting") or not isinstance(shift, float | int):
        return None
    return float(shift)


def _experts(folder: Path, form: str) -> Found:
    found = []
    for name in _EXPERTS:
        if not (folder / name).is_dir():
            raise BundleError(f"'{folder}' has no {name}; the two experts belong together, download both")
        found.append(_transformer(folder / name, form))
    _same(found, _EXPERTS)
    return replace(
        found[0], generators=tuple(one.generators[0] for one in found), folders=(folder,),
        boundary=0.875 if found[0].image_conditioning == "none" else 0.9,  # as the original code has them
    )  # fmt: skip


def _same(found: Sequence[Found], names: Sequence[str]) -> None:
    if any(one.config != found[0].config for one in found):
        raise BundleError(f"{' and '.join(names)} have other sizes; expected two experts of one model")


def _original(path: Path, form: str) -> Found:
    found = _transformer(path, form)
    return replace(found, folders=(path,) if path.is_dir() else ())  # beside a file lies what it may


def _transformer(path: Path, form: str) -> Found:
    """A folder or file with the weights of one transformer, and the config.json beside them."""
    if not path.exists():
        raise BundleError(f"'{path}' is missing; download it and try again")
    source = open_safetensors(path)
    names = parts.strip(list(source.entries))
    file = (path if path.is_dir() else path.parent) / "config.json"
    given = parts.read_json(file) if file.is_file() else None
    if given is not None and path.is_file() and given.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
        given = None  # of something else in the same folder
    return _generator(source, names, given, str(file), form)


def _generator(
    source: Source, names: Mapping[str, str], given: dict[str, Any] | None, where: str, form: str
) -> Found:
    """Works out sizes from a configuration, else from shapes, and checks that all tensors are there."""
    diffusers = parts.is_diffusers(names)
    first_frame = False
    if given is not None and "num_attention_heads" in given:
        config = config_from_diffusers(given, text_length=TEXT_LENGTH, form=form)
    else:
        translate = wan_name if diffusers else diffusers_name
        known = {name: key for name, key in names.items() if not name.endswith("norm_added_q.weight")}
        shapes = {translate(name) if diffusers else name: source.entries[key].shape for name, key in known.items()}
        for name in known:
            translate(name)
        if given is not None and "num_heads" in given:
            config, first_frame = _from_original(given, shapes, where, form)
        else:
            config = config_of(shapes, text_length=TEXT_LENGTH, form=form)
    first_frame = first_frame or config.in_channels == config.out_channels == 48  # TI2V 5B, which nothing else tells
    extra = config.in_channels - config.out_channels
    if extra not in (0, config.out_channels + 4):
        raise BundleError(
            f"'{source.files[0]}' takes {config.in_channels} channels and makes {config.out_channels}; expected as "
            "many (text-to-video), or noise, 4 of a mask and a condition's (image-to-video)"
        )
    part = parts.generator(source, config, names, diffusers)
    return Found(config, (part,), first_frame=first_frame)


def _from_original(
    given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str, form: str
) -> tuple[WanConfig, bool]:
    """The original config.json, held against the shapes; and whether it is a TI2V model."""
    kind = given.get("model_type", "t2v")
    if kind not in ("t2v", "i2v", "ti2v"):
        raise BundleError(f"{where}: model_type is {kind!r}; expected 't2v', 'i2v' or 'ti2v'")
    for key, only in (("qk_norm", True), ("cross_attn_norm", True), ("window_size", [-1, -1])):
        if given.get(key, only) != only:
            raise BundleError(f"{where}: {key} is {given[key]!r}; only {only!r} is supported")
    heads, dim = given.get("num_heads"), given.get("dim")
    if type(heads) is not int or type(dim) is not int or heads < 1 or dim % heads:
        raise BundleError(f"{where}: dim is {dim!r} and num_heads {heads!r}; expected whole numbers that divide")
    config = config_of(
        shapes, head_dim=dim // heads, text_length=given.get("text_len", TEXT_LENGTH), form=form
    )
    for key, ours in _CONFIG.items():
        if given.get(key, getattr(config, ours)) != getattr(config, ours):
            raise BundleError(
                f"{where}: {key} is {given[key]!r}, but the tensors beside it have {getattr(config, ours)}; they do "
                "not belong together, or a file is missing"
            )
    return replace(config, eps=float(given.get("eps", config.eps))), kind == "ti2v"


# Torch files --------------------------------------------------------------------------------------------------------


def _torch(file: Path, weights: str | None, form: str) -> Found:
    """Self-Forcing's and its kin's: {"generator_ema": …, "generator": …}; or the tensors alone, or under "model" or
    "state_dict". A confidence head is in "confidence_head", or beside the generator under that prefix."""
    content = open_torch(file)
    if not isinstance(content, dict):
        raise BundleError(f"'{file}' holds a {type(content).__name__}; expected a dict of tensors, or of such dicts")
    chosen = {"ema": "generator_ema", "raw": "generator"}
    key = None
    if any(name in content for name in chosen.values()):
        wanted = [chosen[weights]] if weights is not None else list(chosen.values())
        key = next((name for name in wanted if name in content), None)
        if key is None:
            raise BundleError(f"'{file}' has no {wanted[0]!r}; it has {_keys(content)}: choose other --weights")
    elif weights is not None:
        raise BundleError(f"'{file}' has neither 'generator' nor 'generator_ema', but {_keys(content)}")
    else:
        key = next((name for name in ("model", "state_dict") if isinstance(content.get(name), dict)), None)
    tensors = _tensors(content if key is None else content[key])
    if not tensors:
        raise BundleError(f"'{file}' has no tensors where its generator should be, but {_keys(content)}")
    head = {f"{_HEAD}{name}": tensor for name, tensor in _tensors(content.get(_HEAD.rstrip("."))).items()}
    source = torch_source(tensors | head, file)
    names = parts.strip(list(source.tensors))
    head_names = {name.removeprefix(_HEAD): key for name, key in names.items() if name.startswith(_HEAD)}
    names = {name: key for name, key in names.items() if not name.startswith(_HEAD)}
    found = _generator(source, names, None, str(file), form)
    return replace(found, head=(source, head_names) if head_names else None, weights=key)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a state dict; none of anything else."""
    if not isinstance(value, dict):
        return {}
    return {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _keys(content: Mapping[Any, Any]) -> str:
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    return ", ".join(short(key) for key in list(content)[:6]) + more or "nothing"
