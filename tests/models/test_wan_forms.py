"""The members of the Wan family against diffusers' class: their channels, CLIP rows and per-token timesteps.

Widths are small, channels and the layout of heads are the real ones.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny import make_model, randomise
from torch import Tensor

import dsa_rt
from dsa_rt.bundle.strict import parse
from dsa_rt.cache import TextKV
from dsa_rt.convert.names import config_from_diffusers, from_diffusers
from dsa_rt.errors import BundleError, OptionError, ShapeError
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens

WIDTH, TEXT_DIM, IMAGE_DIM = 128, 24, 20
# name: channels in, channels out, CLIP width
FORMS = {
    "t2v": (16, 16, None),  # Wan 2.1 and Wan 2.2 A14B
    "wan2.1-i2v": (36, 16, IMAGE_DIM),
    "wan2.2-a14b-i2v": (36, 16, None),
    "wan2.2-ti2v": (48, 48, None),
}


def pair(form: str, heads: int) -> tuple[WanTransformer3DModel, WanModel]:
    """diffusers' model and ours, of their configuration, with the same random weights."""
    inside, outside, image_dim = FORMS[form]
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=WIDTH // heads, in_channels=inside, out_channels=outside,
        text_dim=TEXT_DIM, freq_dim=64, ffn_dim=200, num_layers=2, image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else WIDTH,
    ).eval()  # fmt: skip
    randomise(theirs, heads)
    ours = WanModel(config_from_diffusers(theirs.config))
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    return theirs, ours.requires_grad_(False).eval()


def prompts(batch: int) -> Tensor:
    """Text rows of prompts of several lengths, padded with zeros to 512 as Wan does; the last prompt is empty: one row.

    512 is not free: diffusers takes all rows before the last 512 for image rows.
    """
    text = torch.zeros(batch, 512, TEXT_DIM)
    for sample, length in enumerate([41, 512, 7][: batch - 1]):
        text[sample, :length] = torch.randn(length, TEXT_DIM)
    text[-1, :1] = torch.randn(1, TEXT_DIM)
    return text


def compare(form: str, shape: tuple[int, int, int], heads: int, batch: int, per_token: bool = False) -> None:
    theirs, ours = pair(form, heads)
    frames, height, width = shape
    config = ours.config
    grid = TokenGrid.for_latents(height, width, config.patch)
    latents, text = torch.randn(batch, config.in_channels, frames, height, width), prompts(batch)
    image = None
    if config.image_dim is not None:
        image = 3 * torch.randn(batch, 17, config.image_dim) + 1
        image[:, ::4] *= 1e-3  # small enough for the eps of the norm to matter
    count = frames * grid.tokens
    active = frame_tokens(grid, range(frames), config.head_dim, per_frame=False)
    if per_token:
        timesteps = 1000 * torch.rand(batch, count)
        active = replace(active, modulation_rows=torch.arange(count))
    else:
        timesteps = 1000 * torch.rand(batch, 1)
    with torch.no_grad():
        expected = theirs(
            latents, timesteps if per_token else timesteps[:, 0], text, encoder_hidden_states_image=image,
            return_dict=False,
        )[0]  # fmt: skip
        velocity = ours(grid.patchify(latents), active, timesteps, ours.embed_text(text, image)).velocity
    assert velocity.shape == (batch, count, config.velocity_dim)
    assert expected.std() > 0.3  # or 1e-4 would mean nothing
    assert (grid.unpatchify(velocity) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "heads", "batch"), [((3, 6, 10), 1, 2), ((1, 10, 2), 4, 3)])
def test_forward_equals_diffusers(form: str, shape: tuple[int, int, int], heads: int, batch: int) -> None:
    compare(form, shape, heads, batch)


@pytest.mark.parametrize("form", ["wan2.2-ti2v", "wan2.1-i2v"])
def test_a_timestep_for_every_token_equals_diffusers(form: str) -> None:
    compare(form, (3, 6, 10), 1, 2, per_token=True)


def test_clean_first_frame_equals_diffusers() -> None:
    """TI2V 5B: two modulation rows, timestep 0 for the first frame's tokens, in an order of the caller's."""
    theirs, ours = pair("wan2.2-ti2v", 1)
    grid, frames = TokenGrid(3, 5), 5
    latents, text = torch.randn(1, 48, frames, 6, 10), prompts(1)
    first = torch.arange(frames * grid.tokens) < grid.tokens
    active = frame_tokens(grid, range(frames), 128, per_frame=False)
    order = torch.randperm(len(first))
    shuffled = ActiveSet(order, active.cos[order], active.sin[order], torch.where(first[order], 0, 1))
    timesteps = torch.tensor([[0.0, 731.5]])
    with torch.no_grad():
        expected = theirs(latents, torch.where(first, 0, 731.5)[None], text, return_dict=False)[0]
        rows = ours(grid.patchify(latents)[:, order], shuffled, timesteps, ours.embed_text(text)).velocity
    velocity = torch.full_like(rows, torch.nan)
    velocity[:, order] = rows
    assert (grid.unpatchify(velocity) - expected).abs().max() <= 1e-4


def test_image_rows_are_a_second_attention() -> None:
    """Both matter; neither the order of the image rows nor doubling them changes anything, as in one more softmax."""
    model = make_model(4, image_dim=IMAGE_DIM)
    active = frame_tokens(TokenGrid(2, 3), range(2), 24, per_frame=True)
    rows, timesteps = torch.randn(2, 12, 12), torch.full((2, 2), 400.0)
    text, image = torch.randn(2, 7, 20), torch.randn(2, 5, IMAGE_DIM)

    def velocity(text: Tensor, image: Tensor) -> Tensor:
        return model(rows, active, timesteps, model.embed_text(text, image)).velocity

    kept = velocity(text, image)
    assert (velocity(text, image.flip(1)) - kept).abs().max() < 1e-5
    assert (velocity(text, image.repeat(1, 2, 1)) - kept).abs().max() < 1e-5
    assert (velocity(text, image + torch.randn(5, IMAGE_DIM)) - kept).abs().max() > 1e-2
    assert (velocity(torch.randn(2, 7, 20), image) - kept).abs().max() > 1e-2


def test_embedded_image_rows() -> None:
    """K/V of every layer, in the dtype of the model; none where the generator takes none."""
    model = make_model(4, image_dim=IMAGE_DIM).to(torch.bfloat16)
    context = model.embed_text(torch.randn(2, 7, 20), torch.randn(2, 5, IMAGE_DIM))
    assert context.image_layers is not None
    for pairs, count in ((context.layers, 7), (context.image_layers, 5)):
        assert len(pairs) == 2
        assert all(t.shape == (2, count, 2, 24) and t.dtype == torch.bfloat16 for pair in pairs for t in pair)
    assert make_model().embed_text(torch.randn(2, 7, 20)).image_layers is None
    assert TextKV([]).image_layers is None


def test_gradients_reach_the_image_parameters() -> None:
    model = make_model(4, image_dim=IMAGE_DIM).requires_grad_(True)
    active = frame_tokens(TokenGrid(2, 3), range(1), 24, per_frame=False)
    context = model.embed_text(torch.randn(1, 7, 20), torch.randn(1, 5, IMAGE_DIM))
    model(torch.randn(1, 6, 12), active, torch.full((1, 1), 400.0), context).velocity.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_image_rows_that_do_not_fit() -> None:
    text = torch.randn(2, 7, 20)
    with pytest.raises(OptionError, match="no image embedder"):
        make_model().embed_text(text, torch.randn(2, 5, IMAGE_DIM))
    model = make_model(image_dim=IMAGE_DIM)
    with pytest.raises(OptionError, match=r"give image \[B, I, 20\], for the empty prompt too"):
        model.embed_text(text)
    for shape in ((2, 5, 21), (1, 5, IMAGE_DIM), (5, IMAGE_DIM), (2, 0, IMAGE_DIM)):
        with pytest.raises(ShapeError, match=r"image rows have shape \[.*expected \[2, 1 or more, 20\]"):
            model.embed_text(text, torch.randn(shape))


@pytest.mark.parametrize("value", [0, -3, 1.5, "1280", True])
def test_wrong_image_dim(value: object) -> None:
    with pytest.raises(OptionError, match="image_dim is"):
        make_model(image_dim=value)


def test_configurations_in_manifests() -> None:
    """Bundles written before there was an image_dim go on loading, and those without one say nothing of it."""
    manifests = list(Path(dsa_rt.__file__).parent.glob("demo/bundles/*/manifest.json"))
    assert manifests
    for path in manifests:
        written = json.loads(path.read_text())["architecture"]
        assert written.pop("kind") == "wan" and "image_dim" not in written
        config = parse(WanConfig, written, "architecture")
        assert config.image_dim is None and config.to_dict() == written
    config = make_model(image_dim=IMAGE_DIM).config
    assert parse(WanConfig, json.loads(json.dumps(config.to_dict())), "architecture") == config
    written = make_model().config.to_dict()
    assert parse(WanConfig, written | {"image_dim": None}, "architecture").to_dict() == written
    del written["eps"]
    with pytest.raises(BundleError, match="missing keys 'eps'"):
        parse(WanConfig, written, "architecture")
