"""Torch files as Self-Forcing and its kin publish them, with and without a confidence head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import original_state, transformer
from tiny import randomise
from torch import Tensor

import dsa_rt
from dsa_rt.bundle import Bundle
from dsa_rt.convert import Choices, convert
from dsa_rt.convert.names import from_original
from dsa_rt.errors import BundleError, OptionError
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig

from .conftest import Published

WIDE = {"heads": 1, "head_dim": 128}


def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of two generators of the same sizes."""
    first, second = (original_state(transformer(seed, layers=3, **WIDE)) for seed in (11, 12))
    return first, second


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP saves them."""
    dressed = {}
    for name, tensor in state.items():
        inner = name.replace("blocks.", "blocks._fsdp_wrapped_module.")
        inner = inner.replace(".ffn", "._checkpoint_wrapped_module.ffn")
        dressed[f"model._fsdp_wrapped_module.{inner}"] = tensor
    return dressed


def check(bundle: Bundle, state: dict[str, Tensor]) -> None:
    loaded, expected = bundle.load("generator", "cpu", torch.float32), from_original(state)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], t) for k, t in expected.items())


def make_head(taps: tuple[int, ...], seed: int = 13) -> ConfidenceHead:
    head = ConfidenceHead(ConfidenceConfig(128, 1, 40, taps))
    randomise(head, seed)
    return head


@pytest.mark.parametrize(("weights", "expected"), [(None, 1), ("ema", 1), ("raw", 0)])
def test_which_generator(tmp_path: Path, weights: str | None, expected: int) -> None:
    both = states()
    critic = {"model.x": torch.zeros(2)}
    content = {"generator": under("model.", both[0]), "generator_ema": under("model.", both[1]), "critic": critic}
    torch.save(content, tmp_path / "dmd.pt")
    bundle = convert(tmp_path / "dmd.pt", tmp_path / "b", weights=weights)
    check(bundle, both[expected])
    manifest = bundle.manifest
    assert manifest.training["weights"] == ("generator_ema" if expected else "generator")
    assert (manifest.chunk_frames, manifest.guidance, manifest.window, manifest.sink) == (3, 1.0, None, None)
    assert manifest.schedule.steps == (1000.0, 750.0, 500.0, 250.0) and manifest.schedule.shift == 5.0
    assert bundle.config("architecture", WanConfig).form == "causal"


@pytest.mark.parametrize("place", ["generator", "generator_ema", "model", "state_dict", None])
@pytest.mark.parametrize("dress", ["plain", "fsdp"])
def test_where_the_tensors_are(tmp_path: Path, place: str | None, dress: str) -> None:
    state = states()[0]
    dressed = wrapped(state) if dress == "fsdp" else state
    torch.save(dressed if place is None else {place: dressed, "step": 7, "note": "x"}, tmp_path / "model.pt")
    check(convert(tmp_path / "model.pt", tmp_path / "b"), state)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"generator": under("model.", states()[0])}, tmp_path / "a.pt")
    with pytest.raises(BundleError, match=r"a.pt' has no 'generator_ema'; it has 'generator': choose other --weights"):
        convert(tmp_path / "a.pt", tmp_path / "b", weights="ema")
    torch.save(states()[0], tmp_path / "a.pt")
    with pytest.raises(BundleError, match="neither 'generator' nor 'generator_ema'"):
        convert(tmp_path / "a.pt", tmp_path / "b", weights="raw")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_confidence_head(tmp_path: Path, place: str) -> None:
    state, head = states()[0], make_head((0, 2))
    content: dict[str, Any] = {"generator": under("model.", state)}
    if place == "inside":
        content["generator"] |= under("model.confidence_head.", head.state_dict())
    else:
        content["confidence_head"] = dict(head.state_dict())
    torch.save(content, tmp_path / "dsa.pt")
    bundle = convert(tmp_path / "dsa.pt", tmp_path / "b", choices=Choices(taps=(0, 2)))
    check(bundle, state)
    assert bundle.config("confidence_head", ConfidenceConfig) == head.config
    loaded = bundle.load("confidence_head", "cpu", torch.float32)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in head.state_dict().items())
    with pytest.raises(BundleError, match="reads 2 blocks of the generator; say which they are with --taps"):
        convert(tmp_path / "dsa.pt", tmp_path / "c")


@pytest.mark.parametrize(("taps", "width"), [((0, 3), 128), ((0, 2), 256)])
def test_a_head_of_another_generator(tmp_path: Path, taps: tuple[int, ...], width: int) -> None:
    head = ConfidenceHead(ConfidenceConfig(width, 1, 64, (0, 2)))
    torch.save({"generator": states()[0], "confidence_head": head.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(BundleError, match=rf"width {width} that reads blocks .* of width 128 with blocks 0 to 2"):
        convert(tmp_path / "a.pt", tmp_path / "b", choices=Choices(taps=taps))
    assert not list(tmp_path.glob("b*"))


def test_taps_without_a_head(tmp_path: Path) -> None:
    torch.save(states()[0], tmp_path / "a.pt")
    with pytest.raises(OptionError, match="--taps was given, but .* has no confidence head"):
        convert(tmp_path / "a.pt", tmp_path / "b", choices=Choices(taps=(0,)))


def test_streams_with_encoder_and_codec_of_a_pipeline(published: Published, tmp_path: Path) -> None:
    """From the torch file to frames: chunks of three latent frames, with the head's decisions."""
    state, head = states()[0], make_head((1,))
    content = {"generator_ema": under("model.", state) | under("model.confidence_head.", head.state_dict())}
    torch.save(content, tmp_path / "sf.pt")
    choices = Choices(taps=(1,), steps=(1000.0, 500.0), window=4)
    convert(tmp_path / "sf.pt", tmp_path / "b", components=[published("t2v")], choices=choices)
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    generate = runtime.compile(height=16, width=16, frames=21, policy="dsa-paper")
    chunks = list(generate.stream("a red ball", seed=1))
    assert [len(chunk.frames) for chunk in chunks] == [9, 12]
    assert all(0 < c < 1 for chunk in chunks for c in chunk.confidences if c is not None)
    whole = generate("a red ball", seed=1)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), whole.frames)
    decoded = runtime.codec.decode(whole.latents[None])[0]
    frames = decoded.float().add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert torch.equal(frames, whole.frames)
