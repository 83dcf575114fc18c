"""Sizes of the published Wan models, for benchmarks on random weights; checkpoints bring their own.

| name | parameters | |
|---|---|---|
| wan2.1-t2v-1.3b | 1.419e9 | |
| wan2.1-t2v-14b | 14.288e9 | |
| wan2.1-i2v-14b | 16.395e9 | 16 noise, 4 mask and 16 condition channels; 257 CLIP rows in a second cross-attention |
| wan2.2-a14b-t2v | 14.288e9 | each of two experts, switched at timestep 875 |
| wan2.2-a14b-i2v | 14.289e9 | each of two experts, switched at timestep 900; channels as above, no CLIP rows |
| wan2.2-ti2v-5b | 5.000e9 | 48 channels at 1/16 of the resolution; first-frame tokens have timestep 0 |

Sources: the report on Wan 2.1 (arXiv 2503.20314) and the configurations published beside the weights. All take 512 rows
of UMT5-XXL, of width 4096.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from dsa_rt.models.config import WanConfig

_SMALL = WanConfig(
    dim=1536, ffn_dim=8960, heads=12, layers=30, in_channels=16, out_channels=16, text_dim=4096, text_length=512
)
_LARGE = replace(_SMALL, dim=5120, ffn_dim=13824, heads=40, layers=40)

WAN_SIZES: Mapping[str, WanConfig] = MappingProxyType(
    {
        "wan2.1-t2v-1.3b": _SMALL,
        "wan2.1-t2v-14b": _LARGE,
        "wan2.1-i2v-14b": replace(_LARGE, in_channels=36, image_dim=1280),
        "wan2.2-a14b-t2v": _LARGE,
        "wan2.2-a14b-i2v": replace(_LARGE, in_channels=36),
        "wan2.2-ti2v-5b": replace(_SMALL, dim=3072, ffn_dim=14336, heads=24, in_channels=48, out_channels=48),
    }
)
