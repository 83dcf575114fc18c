"""Names and sizes of published checkpoints, against the classes that have them."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny import make_model, randomise

from dsa_rt.convert.names import (
    config_from_diffusers,
    config_of,
    diffusers_name,
    from_diffusers,
    from_original,
    patch_rows,
    to_diffusers,
    wan_name,
)
from dsa_rt.errors import BundleError
from dsa_rt.models.config import WanConfig


def theirs(image_dim: int | None = None, layers: int = 11) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=3, out_channels=3, text_dim=20, freq_dim=32,
        ffn_dim=80, num_layers=layers, image_dim=image_dim, added_kv_proj_dim=None if image_dim is None else 48,
    )  # fmt: skip
    randomise(model, 1)
    return model


@pytest.mark.parametrize("image_dim", [None, 10])
def test_every_name_is_translated(image_dim: int | None) -> None:
    """Eleven layers, so that block numbers have two digits; names and shapes are exactly those of our model."""
    state, ours = theirs(image_dim).state_dict(), make_model(layers=11, image_dim=image_dim).state_dict()
    converted = from_diffusers(state)
    assert {name: t.shape for name, t in converted.items()} == {name: t.shape for name, t in ours.items()}
    back = to_diffusers(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert all(diffusers_name(wan_name(name)) == name for name in state)


@pytest.mark.parametrize("image_dim", [None, 10])
def test_original_checkpoints_differ_in_the_patch_convolution_alone(image_dim: int | None) -> None:
    ours = make_model(3, layers=11, image_dim=image_dim).state_dict()
    convolution = to_diffusers(ours)["patch_embedding.weight"]
    assert convolution.shape == (48, 3, 1, 2, 2)
    read = from_original(ours | {"patch_embedding.weight": convolution})
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], ours[name]) for name in ours)


def test_a_norm_that_nothing_reads_is_left_out() -> None:
    """Early diffusers files of Wan 2.1 image-to-video hold one in every block."""
    state = theirs(10, layers=1).state_dict()
    extra = {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    assert from_diffusers(state | extra).keys() == from_diffusers(state).keys()
    with pytest.raises(BundleError, match="blocks.0.attn1.norm_added_q.weight"):
        from_diffusers({"blocks.0.attn1.norm_added_q.weight": torch.ones(48)})


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
        ("condition_embedder.image_embedder.norm1.bias", "img_emb.proj.0.bias"),
        ("condition_embedder.image_embedder.ff.net.0.proj.weight", "img_emb.proj.1.weight"),
        ("condition_embedder.image_embedder.ff.net.2.weight", "img_emb.proj.3.weight"),
        ("condition_embedder.image_embedder.norm2.weight", "img_emb.proj.4.weight"),
        ("blocks.39.attn2.add_k_proj.weight", "blocks.39.cross_attn.k_img.weight"),
        ("blocks.39.attn2.add_v_proj.bias", "blocks.39.cross_attn.v_img.bias"),
        ("blocks.39.attn2.norm_added_k.weight", "blocks.39.cross_attn.norm_k_img.weight"),
    ],
)
def test_names_of_the_original_layout(name: str, ours: str) -> None:
    assert wan_name(name) == ours
    assert diffusers_name(ours) == name


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn1.add_k_proj.weight",
        "condition_embedder.image_embedder.norm3.weight",
        "vace_blocks.0.proj_out.weight",
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
    with pytest.raises(BundleError, match=f"tensor {name!r} is not part of a Wan transformer"):
        wan_name(name)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn1.to_q.weight", "model.head.head.weight", "modulation", "head.modulation.weight", "head.head"],
)
def test_names_that_the_original_code_has_not(name: str) -> None:
    with pytest.raises(BundleError, match=f"tensor {name!r} is not part of a Wan transformer"):
        from_original({name: torch.zeros(1)})


def test_first_and_last_frame_models_are_refused() -> None:
    embedding = torch.zeros(1, 514, 10)
    with pytest.raises(BundleError, match="'img_emb.emb_pos' belongs to a first-and-last-frame Wan model"):
        from_original({"img_emb.emb_pos": embedding})
    with pytest.raises(BundleError, match="image_embedder.pos_embed' belongs to a first-and-last-frame Wan model"):
        from_diffusers({"condition_embedder.image_embedder.pos_embed": embedding})
    with pytest.raises(BundleError, match="pos_embed_seq_len is 514; only None is supported"):
        config_from_diffusers(dict(theirs(10, layers=1).config) | {"pos_embed_seq_len": 514})


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


CONFIGS = [
    WanConfig(48, 80, 2, 11, 5, 2, 20, 7, freq_dim=32, image_dim=10),
    WanConfig(48, 72, 4, 1, 3, 4, 19, 7, freq_dim=30, form="causal"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_from_shapes(config: WanConfig) -> None:
    changes = config.to_dict() | {"patch": config.patch}
    shapes = {name: tuple(tensor.shape) for name, tensor in make_model(**changes).state_dict().items()}
    hints = {"head_dim": config.head_dim, "text_length": 7, "form": config.form}
    assert config_of(shapes, **hints) == config  # type: ignore[arg-type]
    shapes["patch_embedding.weight"] = (48, config.in_channels, 1, 2, 2)
    assert config_of(shapes, **hints) == config  # type: ignore[arg-type]


def test_sizes_from_shapes_with_another_patch() -> None:
    """The convolution of a checkpoint tells it."""
    model = make_model(patch=(1, 3, 2), out_channels=5)
    shapes = {name: tensor.shape for name, tensor in to_diffusers(model.state_dict(), (1, 3, 2)).items()}
    shapes = {wan_name(name): shape for name, shape in shapes.items()}
    assert config_of(shapes, head_dim=24, text_length=7, form="causal") == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.head.weight": None}, "no tensor 'head.head.weight'"),
        ({"img_emb.proj.1.weight": None}, "no tensor 'img_emb.proj.1.weight'"),
        ({"patch_embedding.weight": None}, "no tensor 'patch_embedding.weight'"),
        ({"blocks.0.ffn.0.weight": (80,)}, r"'blocks.0.ffn.0.weight' has shape \[80\]; expected 2 dimensions"),
        ({"patch_embedding.weight": (48, 3, 4)}, r"'patch_embedding.weight' has shape \[48, 3, 4\]"),
        ({"patch_embedding.weight": (48, 13)}, "'patch_embedding.weight' has a side of 13, .* multiple of 4"),
        ({"patch_embedding.weight": (50, 12)}, "is 50 wide, which heads of 24 do not divide"),
        ({"head.head.weight": (13, 48)}, "'head.head.weight' has a side of 13"),
        ({"blocks.3.modulation": (1, 6, 48)}, "no tensors of 'blocks.2.'"),
        ({"patch_embedding.weight": (48, 3, 2, 2, 2), "head.head.weight": (24, 48)}, r"patch is \(2, 2, 2\)"),
    ],
)  # fmt: skip
def test_odd_shapes_are_named(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_model(image_dim=10).state_dict().items()}
    changed = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(BundleError, match=message):
        config_of(changed, head_dim=24)


@pytest.mark.parametrize("image_dim", [None, 10])
def test_sizes_from_the_configuration_of_diffusers(image_dim: int | None) -> None:
    model = theirs(image_dim, layers=2)
    expected = WanConfig(48, 80, 2, 2, 3, 3, 20, 512, freq_dim=32, image_dim=image_dim)
    assert config_from_diffusers(model.config) == expected
    shapes = {wan_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    assert config_of(shapes, head_dim=24) == expected
    without = dict(model.config) | {"out_channels": None, "eps": 1e-5, "_diffusers_version": "0.33.0", "new_key": None}
    assert config_from_diffusers(without, text_length=7).eps == 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
        ({"num_layers": None}, "num_layers is None; expected a whole number"),
        ({"num_layers": "30"}, "num_layers is '30'"),
        ({"num_layers": 0}, "layers is 0"),
        ({"out_channels": 1.5}, "out_channels is 1.5"),
        ({"cross_attn_norm": False}, "cross_attn_norm is False; only True is supported"),
        ({"qk_norm": None}, "qk_norm is None; only 'rms_norm_across_heads' is supported"),
        ({"image_dim": 10}, "image_dim is 10 and added_kv_proj_dim is None"),
        ({"image_dim": 10, "added_kv_proj_dim": 40}, "added_kv_proj_dim is 40; expected .* 48"),
        ({"added_kv_proj_dim": 48}, "image_dim is None and added_kv_proj_dim is 48"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"patch_size": [2, 2, 2]}, r"patch is \(2, 2, 2\)"),
        ({"vace_layers": [0, 5]}, "vace_layers is"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=f"transformer/config.json.*{message}"):
        config_from_diffusers(dict(theirs(layers=1).config) | change)
