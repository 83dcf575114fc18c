"""The table of sizes against the configurations published with the weights and against diffusers' full-size classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from dsa_rt.convert.names import config_from_diffusers, config_of, from_diffusers, wan_name
from dsa_rt.models.sizes import WAN_SIZES
from dsa_rt.models.wan import WanModel

# transformer/config.json of the published pipelines, without what is alike in all of them
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "wan2.1-i2v-14b": {
        "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 36, "image_dim": 1280,
        "added_kv_proj_dim": 5120,
    },
    "wan2.2-a14b-t2v": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "wan2.2-a14b-i2v": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 36},
    "wan2.2-ti2v-5b": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
    },
}  # fmt: skip
COMMON = {
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "eps": 1e-6,
    "patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
}  # fmt: skip
PARAMETERS = {  # as the model cards count them, in 1e9
    "wan2.1-t2v-1.3b": 1.42, "wan2.1-t2v-14b": 14.3, "wan2.1-i2v-14b": 16.4, "wan2.2-a14b-t2v": 14.3,
    "wan2.2-a14b-i2v": 14.3, "wan2.2-ti2v-5b": 5.0,
}  # fmt: skip


def test_sizes_are_the_published_ones() -> None:
    assert WAN_SIZES.keys() == PUBLISHED.keys()
    for name, config in PUBLISHED.items():
        assert WAN_SIZES[name] == config_from_diffusers(COMMON | config), name


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b", "wan2.2-a14b-i2v"])
def test_full_size_models_take_the_tensors_of_diffusers(name: str) -> None:
    """Without memory: names, shapes and counts of both classes, and the sizes read back from the shapes."""
    with torch.device("meta"):
        theirs, ours = WanTransformer3DModel(**(COMMON | PUBLISHED[name])), WanModel(WAN_SIZES[name])
    state = theirs.state_dict()
    expected = {key: tensor.shape for key, tensor in from_diffusers(state).items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected
    assert config_of({wan_name(key): tensor.shape for key, tensor in state.items()}) == WAN_SIZES[name]
    count = sum(tensor.numel() for tensor in ours.parameters())
    assert abs(count / 1e9 - PARAMETERS[name]) < 0.02
