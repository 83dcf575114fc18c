"""What Wan's parameters are called in diffusers, and what they are called here (the original Wan layout).

The affine norm before cross-attention is ``norm3`` here and ``norm2`` there; the other two have no parameters.
diffusers and the original checkpoints embed patches by a convolution, the models here by the equal linear layer over
rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dsa_rt.errors import BundleError

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}

# Modules keep the ends ".weight" and ".bias"; the tables of modulation are parameters themselves.
MODEL = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
BLOCK = {
    **{f"attn1.{theirs}": f"self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}


def wan_name(name: str) -> str:
    """Our name of a parameter of diffusers' ``WanTransformer3DModel``; :class:`BundleError` for one it has not."""
    block = re.match(r"blocks\.\d+\.", name)
    prefix, table = (block[0], BLOCK) if block else ("", MODEL)
    inside = name.removeprefix(prefix)
    module = re.sub(r"\.(weight|bias)\Z", "", inside)
    if module not in table or (module == inside) != (module == "scale_shift_table"):
        raise BundleError(
            f"tensor {name!r} is not part of a text-to-video Wan transformer; expected the parameters of diffusers' "
            "WanTransformer3DModel without image embedder"
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
    renamed = {wan_name(name): tensor for name, tensor in state.items()}
    if "patch_embedding.weight" in renamed:
        renamed["patch_embedding.weight"] = patch_rows(renamed["patch_embedding.weight"])
    return renamed
