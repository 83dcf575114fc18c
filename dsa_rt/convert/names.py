"""What Wan's parameters are called in published checkpoints and here, and the sizes that a checkpoint tells.

Our names are those of the original Wan code. In diffusers all differ; the affine norm before cross-attention is
``norm3`` here and ``norm2`` there (the other two have no parameters). Both embed patches by a convolution, the models
here by the equal linear layer over rows. Not supported, and refused by name: first-and-last-frame models (a position
embedding on the image rows), VACE, Animate and S2V (blocks of their own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dsa_rt.errors import BundleError, OptionError
from dsa_rt.models.config import WanConfig

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}

# diffusers -> original. Modules keep the ends ".weight" and ".bias"; modulation tables are parameters themselves.
MODEL = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
BLOCK = {
    **{f"attn1.{theirs}": f"self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in (_ATTENTION | _IMAGE_ATTENTION).items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_TABLES = {"scale_shift_table", "modulation", "head.modulation"}
_TO_DIFFUSERS = {ours: theirs for theirs, ours in MODEL.items()}
_BLOCK_TO_DIFFUSERS = {ours: theirs for theirs, ours in BLOCK.items()}

# In image-to-video files of early diffusers versions, and never read by any.
_UNREAD = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")


def wan_name(name: str) -> str:
    """Our name of a parameter of diffusers' ``WanTransformer3DModel``; :class:`BundleError` for one it has not."""
    return _renamed(name, MODEL, BLOCK, "diffusers' WanTransformer3DModel")


def diffusers_name(name: str) -> str:
    """Inverse of :func:`wan_name`; :class:`BundleError` for a name that the original Wan code has not."""
    return _renamed(name, _TO_DIFFUSERS, _BLOCK_TO_DIFFUSERS, "the original Wan code")


def _renamed(name: str, model: Mapping[str, str], inner: Mapping[str, str], source: str) -> str:
    block = re.match(r"blocks\.\d+\.", name)
    prefix, table = (block[0], inner) if block else ("", model)
    inside = name.removeprefix(prefix)
    module = re.sub(r"\.(weight|bias)\Z", "", inside)
    if module not in table or (module == inside) != (module in _TABLES):
        if name in ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"):
            raise BundleError(
                f"tensor {name!r} belongs to a first-and-last-frame Wan model, which is not supported; expected a "
                "text-to-video or image-to-video checkpoint"
            )
        raise BundleError(
            f"tensor {name!r} is not part of a Wan transformer; expected the parameters of {source}, text-to-video or "
            "image-to-video"
        )
    return prefix + table[module] + inside.removeprefix(module)


def patch_rows(weight: Tensor) -> Tensor:
    """The patch convolution [dim, channels, pt, ph, pw] as linear weight [dim, pt * ph * pw * channels], the
    element order of a row."""
    if weight.ndim != 5:
        raise BundleError(
            f"patch_embedding.weight has shape {list(weight.shape)}; expected a convolution [dim, channels, pt, ph, pw]"
        )
    return weight.permute(0, 2, 3, 4, 1).flatten(1).contiguous()


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of diffusers' ``WanTransformer3DModel`` -> that of :class:`dsa_rt.models.wan.WanModel`.

    dtype and device stay; tensors other than the patch embedding are shared. Whether all are there and have the
    right shapes is checked where they are loaded.
    """
    return _as_rows({wan_name(name): tensor for name, tensor in state.items() if not _UNREAD.fullmatch(name)})


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the original Wan code -> that of :class:`dsa_rt.models.wan.WanModel`: the names stay.

    As :func:`from_diffusers` otherwise. Prefixes of training wrappers ("model.") are to be removed before.
    """
    for name in state:
        diffusers_name(name)
    return _as_rows(dict(state))


def to_diffusers(state: Mapping[str, Tensor], patch: Sequence[int] = (1, 2, 2)) -> dict[str, Tensor]:
    """Inverse of :func:`from_diffusers`. patch: the model's (WanConfig.patch)."""
    renamed = {diffusers_name(name): tensor for name, tensor in state.items()}
    if "patch_embedding.weight" in renamed:
        rows = renamed["patch_embedding.weight"].unflatten(1, (*patch, -1))
        renamed["patch_embedding.weight"] = rows.permute(0, 4, 1, 2, 3).contiguous()
    return renamed


def _as_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "patch_embedding.weight" in state:
        state["patch_embedding.weight"] = patch_rows(state["patch_embedding.weight"])
    return state


def config_of(
    shapes: Mapping[str, Sequence[int]],
    *,
    head_dim: int = 128,
    text_length: int = 512,
    form: str = "bidirectional",
) -> WanConfig:
    """Sizes of the model that has these tensors, by the original names.

    head_dim and text_length leave no trace in the tensors: those given are of every published Wan. The patch embedding
    may be the convolution of a checkpoint or the linear layer of :class:`dsa_rt.models.wan.WanModel`; the latter's
    patch is taken to be (1, 2, 2). Only tensors that tell a size are looked at; the rest is checked where they are
    loaded. :class:`BundleError` names the tensor that is missing or odd.
    """
    embedding = _shape(shapes, "patch_embedding.weight")
    if len(embedding) == 5:
        dim, in_channels, *patch = embedding
    else:
        dim, width = _shape(shapes, "patch_embedding.weight", 2)
        patch = [1, 2, 2]
        in_channels = _divided("patch_embedding.weight", width, math.prod(patch))
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    absent = sorted(set(range(len(numbers))) - numbers)
    if absent:
        raise BundleError(
            f"the checkpoint has no tensors of 'blocks.{absent[0]}.' but of later ones; one of its files is missing"
        )
    if head_dim < 1 or dim % head_dim:
        raise BundleError(
            f"the checkpoint is {dim} wide, which heads of {head_dim} do not divide; heads are {head_dim} wide unless "
            "a config.json in the folder of the safetensors file says otherwise"
        )
    images = any(name.startswith("img_emb.") for name in shapes)
    return _config(
        "the checkpoint",
        dim=dim,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        heads=dim // head_dim,
        layers=len(numbers),
        in_channels=in_channels,
        out_channels=_divided("head.head.weight", _shape(shapes, "head.head.weight", 2)[0], math.prod(patch)),
        text_dim=_shape(shapes, "text_embedding.0.weight", 2)[1],
        text_length=text_length,
        patch=tuple(patch),
        freq_dim=_shape(shapes, "time_embedding.0.weight", 2)[1],
        form=form,
        image_dim=_shape(shapes, "img_emb.proj.1.weight", 2)[1] if images else None,
    )


def _shape(shapes: Mapping[str, Sequence[int]], name: str, dims: int | None = None) -> Sequence[int]:
    if name not in shapes:
        raise BundleError(f"the checkpoint has no tensor {name!r}; expected a Wan transformer by its original names")
    if dims is not None and len(shapes[name]) != dims:
        raise BundleError(f"tensor {name!r} has shape {list(shapes[name])}; expected {dims} dimensions")
    return shapes[name]


def _divided(name: str, size: int, part: int) -> int:
    if part < 1 or size % part:
        raise BundleError(f"tensor {name!r} has a side of {size}, which is not a multiple of {part}")
    return size // part


_SIZES = ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "in_channels", "text_dim", "freq_dim")
_FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}
_OTHER = {"patch_size", "out_channels", "eps", "image_dim", "added_kv_proj_dim", "rope_max_seq_len"}


def config_from_diffusers(
    config: Mapping[str, Any], *, text_length: int = 512, form: str = "bidirectional"
) -> WanConfig:
    """Sizes from the ``transformer/config.json`` of a diffusers pipeline; :class:`BundleError` for what we lack."""
    where = "transformer/config.json"
    kind = config.get("_class_name", "WanTransformer3DModel")
    if kind != "WanTransformer3DModel":
        raise BundleError(f"{where} is of a {kind!r}; expected a WanTransformer3DModel")
    for key in _SIZES:
        if type(config.get(key)) is not int:
            raise BundleError(f"{where}: {key} is {config.get(key)!r}; expected a whole number")
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            hint = " (first-and-last-frame models have another)" if key == "pos_embed_seq_len" else ""
            raise BundleError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported{hint}")
    for key, value in config.items():
        if not (key.startswith("_") or key in {*_SIZES, *_FIXED, *_OTHER} or value is None):
            raise BundleError(f"{where}: {key} is {value!r}; this version of dsa_rt does not know what it means")
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    image_dim, added = config.get("image_dim"), config.get("added_kv_proj_dim")
    if added != (None if image_dim is None else dim):
        raise BundleError(
            f"{where}: image_dim is {image_dim!r} and added_kv_proj_dim is {added!r}; expected null for both or the "
            f"model's width, {dim}, for the latter"
        )
    patch = config.get("patch_size")
    if not isinstance(patch, list | tuple):
        raise BundleError(f"{where}: patch_size is {patch!r}; expected a list of 3")
    return _config(
        where,
        dim=dim,
        ffn_dim=config["ffn_dim"],
        heads=config["num_attention_heads"],
        layers=config["num_layers"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"] if config.get("out_channels") is None else config["out_channels"],
        text_dim=config["text_dim"],
        text_length=text_length,
        patch=tuple(patch),
        freq_dim=config["freq_dim"],
        eps=config.get("eps", 1e-6),
        form=form,
        image_dim=image_dim,
    )


def _config(where: str, **sizes: Any) -> WanConfig:
    try:
        return WanConfig(**sizes)
    except OptionError as error:
        raise BundleError(f"{where}: {error}") from error
