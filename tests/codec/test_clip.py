"""Wan 2.1's image encoder against diffusers' pipeline and CLIP's image processor, on small random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import image_encoder, image_processor
from torch import Tensor

from dsa_rt.bundle.strict import parse
from dsa_rt.codec import ImageEncoder
from dsa_rt.codec.clip import ClipVisionConfig, ClipVisionEncoder
from dsa_rt.errors import BundleError, OptionError, ShapeError

PROCESSOR = json.loads(image_processor().to_json_string())


def pair(layers: int = 3) -> tuple[ClipVisionEncoder, Any]:
    theirs = image_encoder(layers=layers)
    values = ClipVisionConfig.from_transformers(theirs.config.to_dict(), PROCESSOR)
    ours = ClipVisionEncoder(parse(ClipVisionConfig, values, "config"))
    ours.model.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False).eval(), theirs


def picture(height: int, width: int) -> Tensor:
    """Smooth with noise, as pictures are."""
    smooth = np.add.outer(np.linspace(0, 200, height), np.linspace(0, 50, width))[..., None] * np.array([1, 0.7, 0.4])
    return torch.from_numpy((smooth + np.random.default_rng(height).uniform(0, 5, smooth.shape)).astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (45, 71), (100, 33), (9, 20), (480, 832)])
@pytest.mark.parametrize("layers", [2, 4])
def test_rows_equal_the_pipelines(height: int, width: int, layers: int) -> None:
    """The pipeline prepares a PIL image, and takes the last but one hidden states."""
    ours, theirs = pair(layers)
    image = picture(height, width)
    prepared = image_processor()(images=Image.fromarray(image.numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**prepared, output_hidden_states=True).hidden_states[-2]
        last = theirs(**prepared).last_hidden_state
    rows = ours.encode(image[None])
    assert rows.shape == (1, 17, 24) and (rows - expected).abs().max() <= 1e-5
    assert (rows - last).abs().max() > 1e-2


def test_several_and_bf16() -> None:
    ours, _ = pair()
    images = torch.stack([picture(40, 50), picture(40, 50).flip(0)])
    together = ours.encode(images)
    assert (ours.encode(images[1:])[0] - together[1]).abs().max() <= 1e-6
    assert (ours.bfloat16().encode(images) - together).abs().max() < 0.1 * together.abs().max()


def test_a_square_size_is_resized_at_once() -> None:
    """Some processors resize to the square itself, which stretches."""
    values = ClipVisionConfig.from_transformers(
        image_encoder().config.to_dict(), PROCESSOR | {"size": {"height": 28, "width": 28}}
    )
    ours, image = ClipVisionEncoder(parse(ClipVisionConfig, values, "config")), picture(30, 60)
    prepared = ours._prepared(image)
    resized = np.asarray(Image.fromarray(image.numpy()).resize((28, 28), Image.Resampling.BICUBIC))
    expected = (resized / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    assert np.abs(prepared.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_is_an_image_encoder() -> None:
    ours, _ = pair()
    assert isinstance(ours, ImageEncoder) and (ours.kind, ours.dim) == ("clip-vision", 24)
    assert parse(ClipVisionConfig, ours.to_dict(), "config") == ours.config


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, 3), torch.zeros(8, 8, 3).byte()]
)
def test_pictures_that_do_not_fit(images: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"pictures must be \[batch, height, width, 3\] uint8"):
        pair()[0].encode(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "do_normalize is False"), ({"crop_size": {"height": 20, "width": 28}}, "crop"),
        ({"crop_size": 20}, "cut to 20; expected 3 channels and the same size"),
        ({"size": {"shortest_edge": 20}}, "shortest_edge is 20, below its crop of 28"),
        ({"size": {"height": 30, "width": 28}}, "shortest_edge"), ({"image_mean": None}, "image_mean"),
        ({"resample": 9}, "expected a PIL filter"), ({"image_std": [1, 0, 1]}, "image_std is out of range"),
    ],
)  # fmt: skip
def test_processors_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        values = ClipVisionConfig.from_transformers(image_encoder().config.to_dict(), PROCESSOR | change)
        parse(ClipVisionConfig, values, "config")


def test_configurations_that_do_not_fit() -> None:
    config = pair()[0].config
    for change, message in [
        ({"hidden_act": "x"}, "hidden_act is 'x'"), ({"num_hidden_layers": 1}, "1 layers of"),
        ({"hidden_size": 25}, "heads that divide"), ({"patch_size": 0}, "patch_size is 0"),
    ]:  # fmt: skip
        with pytest.raises(OptionError, match=message):
            replace(config, **change)
