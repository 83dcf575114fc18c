"""The image encoder of Wan 2.1 image-to-video: transformers' CLIP vision model, read before its last layer.

Pictures are prepared as CLIP's own image processor does with PIL: resized by their shorter side, cut to a square from
the middle, scaled and normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dsa_rt.bundle import Bundle
from dsa_rt.codec import require
from dsa_rt.errors import BundleError, OptionError, ShapeError

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
          "patch_size")  # fmt: skip


@dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of the model by transformers' names, and of its image processor.

    shortest_edge: pixels that the shorter side is resized to; None resizes to crop x crop at once. resample: PIL's
    number of the filter. crop: pixels of the square that is cut out.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    shortest_edge: int | None
    crop: int
    resample: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not 1 <= getattr(self, name) <= 1 << 16:
                raise OptionError(f"image encoder {name} is {getattr(self, name)}; expected 1 to {1 << 16}")
        if self.num_channels != 3 or self.crop != self.image_size:
            raise OptionError(
                f"image encoder takes {self.num_channels} channels at {self.image_size} pixels and its pictures are "
                f"cut to {self.crop}; expected 3 channels and the same size"
            )
        if self.num_hidden_layers < 2 or self.hidden_size % self.num_attention_heads:
            raise OptionError(
                f"image encoder has {self.num_hidden_layers} layers of width {self.hidden_size} with "
                f"{self.num_attention_heads} heads; expected 2 layers or more and heads that divide the width"
            )
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise OptionError(f"image encoder hidden_act is {self.hidden_act!r}; expected 'gelu' or 'quick_gelu'")
        if self.shortest_edge is not None and self.shortest_edge < self.crop:
            raise OptionError(f"image encoder shortest_edge is {self.shortest_edge}, below its crop of {self.crop}")
        if self.resample not in range(6) or min(self.image_std) <= 0:
            raise OptionError("image encoder resample or image_std is out of range; expected a PIL filter, 0 to 5")

    @classmethod
    def from_transformers(cls, model: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
        """What ``image_encoder/config.json`` and ``image_processor/preprocessor_config.json`` say, to be parsed."""
        sizes = {"num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | {
            key: model[key] for key in (*_SIZES, "hidden_act", "layer_norm_eps") if key in model
        }
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if processor.get(key, True) is not True:
                raise BundleError(f"preprocessor_config.json: {key} is {processor[key]!r}; only true is supported")
        edge, crop = processor.get("size", 224), processor.get("crop_size", 224)
        if isinstance(crop, dict):
            crop = crop.get("height") if crop.get("height") == crop.get("width") else None
        if isinstance(edge, dict):
            square = edge.get("height") == edge.get("width") == crop
            edge = None if "shortest_edge" not in edge and square else edge.get("shortest_edge", "not a square")
        return sizes | {
            "shortest_edge": edge, "crop": crop, "resample": processor.get("resample", 3),
            "image_mean": processor.get("image_mean"), "image_std": processor.get("image_std"),
        }  # fmt: skip


class ClipVisionEncoder(nn.Module):
    """Pictures -> rows [B, 1 + patches, hidden_size] of the last but one layer.

    Implements :class:`dsa_rt.codec.ImageEncoder`. Parameters have transformers' names behind "model.".
    """

    kind = "clip-vision"

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        transformers = require("transformers", "the image encoder of Wan 2.1 image-to-video (CLIP)")
        sizes = {name: getattr(config, name) for name in (*_SIZES, "hidden_act", "layer_norm_eps")}
        self.model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
        # Not among the weights, so that it is needed for real on the meta device too.
        rows = torch.arange((config.image_size // config.patch_size) ** 2 + 1, device="cpu")[None]
        self.model.embeddings.register_buffer("position_ids", rows, persistent=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.config) | {
            "image_mean": list(self.config.image_mean), "image_std": list(self.config.image_std),
        }  # fmt: skip

    @property
    def dim(self) -> int:
        return self.config.hidden_size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, height, width, 3] uint8 -> rows [B, 1 + patches, hidden_size]; :class:`ShapeError`."""
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or 0 in images.shape:
            raise ShapeError(
                f"pictures must be [batch, height, width, 3] uint8; got {list(images.shape)} {images.dtype}"
            )
        weight = next(self.model.parameters())
        pixels = torch.stack([self._prepared(image) for image in images.cpu()])
        out = self.model(pixels.to(weight.device, weight.dtype), output_hidden_states=True)
        rows: Tensor = out.hidden_states[-2]
        return rows

    def _prepared(self, image: Tensor) -> Tensor:
        """[height, width, 3] uint8 -> [3, crop, crop] fp32."""
        config, picture = self.config, Image.fromarray(image.numpy())
        wide, high = picture.size
        size = (config.crop, config.crop)
        if config.shortest_edge is not None:
            edge, short = config.shortest_edge, min(wide, high)
            size = (int(edge * wide / short), int(edge * high / short))
        resized = picture.resize(size, Image.Resampling(config.resample))
        left, top = (size[0] - config.crop) // 2, (size[1] - config.crop) // 2
        cut = np.asarray(resized.crop((left, top, left + config.crop, top + config.crop)), dtype=np.float32)
        mean, std = (np.asarray(values, dtype=np.float32) for values in (config.image_mean, config.image_std))
        return torch.from_numpy((cut / 255 - mean) / std).permute(2, 0, 1)


def from_bundle(bundle: Bundle) -> ClipVisionEncoder:
    """The encoder that a bundle describes, its weights still to be loaded."""
    config = bundle.config("image_encoder", ClipVisionConfig)
    with torch.device("meta"):
        return ClipVisionEncoder(config)
