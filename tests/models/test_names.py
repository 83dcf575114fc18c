"""Names of published checkpoints, against the classes that have them."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny import make_model, randomise

from dsa_rt.convert.names import from_diffusers, patch_rows, wan_name
from dsa_rt.errors import BundleError


def theirs() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=3, out_channels=3, text_dim=20, freq_dim=32,
        ffn_dim=80, num_layers=11,
    )  # fmt: skip
    randomise(model, 1)
    return model


def test_every_name_is_translated() -> None:
    """Eleven layers, so that block numbers have two digits; names and shapes are exactly those of our model."""
    state, ours = theirs().state_dict(), make_model(layers=11).state_dict()
    converted = from_diffusers(state)
    assert {name: t.shape for name, t in converted.items()} == {name: t.shape for name, t in ours.items()}


def test_the_swapped_norms() -> None:
    assert wan_name("blocks.10.norm2.weight") == "blocks.10.norm3.weight"
    for name in ("blocks.0.norm3.weight", "blocks.0.norm1.weight"):  # they have no parameters
        with pytest.raises(BundleError, match=name):
            wan_name(name)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("blocks.7.attn1.to_out.0.bias", "blocks.7.self_attn.o.bias"),
        ("blocks.7.attn2.norm_k.weight", "blocks.7.cross_attn.norm_k.weight"),
        ("blocks.29.ffn.net.0.proj.weight", "blocks.29.ffn.0.weight"),
        ("blocks.0.scale_shift_table", "blocks.0.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.bias", "head.head.bias"),
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
        ("condition_embedder.text_embedder.linear_2.bias", "text_embedding.2.bias"),
    ],
)
def test_names_of_the_original_layout(name: str, ours: str) -> None:
    assert wan_name(name) == ours


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn2.add_k_proj.weight",
        "condition_embedder.image_embedder.norm1.weight",
        "blocks.x.norm2.weight",
        "blocks.0.attn1.to_q.scale",
        "scale_shift_table.weight",
        "proj_out",
        "blocks.0.self_attn.q.weight",
        "",
        "weight",
        "proj_out.weight.bias",
        "proj_out.bias.weight",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match="not part of a text-to-video Wan transformer"):
        wan_name(name)


def test_patch_convolution_as_a_linear_layer() -> None:
    convolution = torch.nn.Conv3d(3, 5, (1, 2, 3), stride=(1, 2, 3))
    latents = torch.randn(2, 3, 4, 6, 9)
    expected = convolution(latents).flatten(2).transpose(1, 2)
    rows = []
    for f in range(4):
        for r in range(3):
            for c in range(3):
                window = latents[:, :, f, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3]  # [B, channel, row, column]
                rows.append(window.permute(0, 2, 3, 1).flatten(1))
    linear = torch.stack(rows, 1) @ patch_rows(convolution.weight).T + convolution.bias
    torch.testing.assert_close(linear, expected, rtol=0, atol=1e-5)


def test_a_patch_embedding_that_is_no_convolution() -> None:
    with pytest.raises(BundleError, match=r"patch_embedding.weight has shape \[48, 12\]"):
        from_diffusers({"patch_embedding.weight": torch.zeros(48, 12)})


def test_dtype_stays_and_nothing_is_copied() -> None:
    state = {name: tensor.bfloat16() for name, tensor in theirs().state_dict().items()}
    converted = from_diffusers(state)
    assert all(tensor.dtype == torch.bfloat16 for tensor in converted.values())
    assert converted["head.head.weight"].data_ptr() == state["proj_out.weight"].data_ptr()
