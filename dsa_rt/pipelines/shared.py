"""The Wan model of this package over the parameters of diffusers' transformer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_rt.convert.names import config_from_diffusers, from_diffusers
from dsa_rt.errors import BundleError, OptionError
from dsa_rt.models.wan import WanModel


class SharedWan(WanModel):
    """No second copy of the weights: the parameters are diffusers' own objects, the small patch embedding excepted.

    They also keep their dtypes. diffusers loads a bf16 model with the time embedder, the norms and the modulation
    tables in fp32 (``_keep_in_fp32_modules``); all but the two places below compute these in fp32 anyway.
    """

    def __init__(self, name: str, theirs: Any) -> None:
        try:
            config = config_from_diffusers(theirs.config)
        except BundleError as error:
            raise OptionError(f"pipe.{name} is not supported: {error}") from error
        with torch.device("meta"):
            super().__init__(config)
            if config.image_dim is not None:
                norms = self.img_emb.proj
                norms[0], norms[4] = _WideNorm(config.image_dim), _WideNorm(config.dim)
        self.name = name
        self.eval()

    @torch.no_grad()
    def share(self, theirs: Any) -> None:
        """Take the parameters of diffusers' transformer as and where they are now; :class:`OptionError` for others than
        Wan's."""
        try:
            found = from_diffusers(dict(theirs.named_parameters()))
        except BundleError as error:
            raise OptionError(
                f"pipe.{self.name}: {error}. With LoRA layers, call pipe.fuse_lora() and pipe.unload_lora_weights() "
                f"first; with fused projections, pipe.{self.name}.unfuse_qkv_projections()"
            ) from error
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        for name in sorted(shapes.keys() | found.keys()):
            if name not in shapes or name not in found or shapes[name] != found[name].shape:
                have, want = (list(t[name]) if name in t else "none" for t in (_shapes(found), shapes))
                raise OptionError(
                    f"pipe.{self.name}: parameter {name!r} (its original name) has shape {have}; its configuration "
                    f"says {want}"
                )
        for name, tensor in found.items():
            module, _, leaf = name.rpartition(".")
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.get_submodule(module).register_parameter(leaf, parameter)

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`WanModel`, with a time embedder that may be wider than the rest."""
        half = self.config.freq_dim // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
        angle = timesteps.float()[..., None] * frequency
        waves = torch.cat((angle.cos(), angle.sin()), -1).to(cast(nn.Linear, self.time_embedding[0]).weight.dtype)
        embedding = self.time_embedding(waves).to(self.dtype)
        return embedding.float(), self.time_projection(embedding).float().unflatten(-1, (6, -1))


class _WideNorm(nn.LayerNorm):
    """LayerNorm in fp32, whatever the dtypes of rows and parameters; the dtype of the rows comes back."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, self.eps).to(x.dtype)


def _shapes(found: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in found.items()}
