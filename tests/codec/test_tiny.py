"""The tiny decoder: the published layout against a transcription that sees the whole clip, and as a bundle's codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from published import CHANNELS, original_state, pipeline, scramble, transformer
from safetensors.torch import save_file
from torch import Tensor

import dsa_rt
from dsa_rt.codec import VideoCodec
from dsa_rt.codec.tiny import TinyCodec, TinyConfig, load_tiny
from dsa_rt.convert import convert
from dsa_rt.errors import BundleError, OptionError, ShapeError

WIDTHS = (12, 10, 8, 6)


def make(z: int = CHANNELS, patch: int = 1, seed: int = 1) -> TinyCodec:
    codec = TinyCodec(TinyConfig(z, WIDTHS, patch))
    scramble(codec, seed)
    with torch.no_grad():
        codec.decoder[22].weight.mul_(0.04)  # pictures around the middle of [0, 1]
        codec.decoder[22].bias.add_(0.5)
    return codec.requires_grad_(False).eval()


def plain(state: dict[str, Tensor], latents: Tensor, growth: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """The published network over all frames of one clip at once. latents [z, f, h, w] -> [3, frames, H, W]."""
    weight = {name.removeprefix("decoder."): tensor for name, tensor in state.items()}

    def conv(x: Tensor, name: str, pad: int = 1) -> Tensor:
        return F.conv2d(x, weight[f"{name}.weight"], weight.get(f"{name}.bias"), padding=pad)

    x = torch.tanh(latents.transpose(0, 1) / 3) * 3  # frames first
    x = conv(x, "1").relu()
    for stage, first in enumerate((3, 9, 15)):
        for block in range(first, first + 3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            inner = conv(torch.cat([x, before], 1), f"{block}.conv.0").relu()
            x = (conv(conv(inner, f"{block}.conv.2").relu(), f"{block}.conv.4") + x).relu()
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        grown = conv(x, f"{first + 4}.conv", pad=0)
        x = torch.stack(grown.chunk(growth[stage], 1), 1).flatten(0, 1)
        x = conv(x, str(first + 5))
    x = conv(x.relu(), "22")
    patch = round((x.shape[1] / 3) ** 0.5)
    frames = torch.stack([F.pixel_shuffle(frame, patch) for frame in x])
    return (frames[3:] * 2 - 1).clamp(-1, 1).transpose(0, 1)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("portions", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_stream_equals_the_whole_clip(patch: int, portions: list[int]) -> None:
    codec = make(patch=patch)
    latents = 2 * torch.randn(2, CHANNELS, 5, 3, 2)
    stream = codec.stream_decoder(2)
    parts = [stream.decode(part) for part in latents.split(portions, 2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(portions)]
    video = torch.cat(parts, 2)
    assert video.shape == (2, 3, 17, 24 * patch, 16 * patch) and torch.equal(video, codec.decode(latents))
    for clip, found in zip(latents, video, strict=True):
        expected = plain(codec.state_dict(), clip)
        assert expected.std() > 0.1 and (expected.abs() < 1).float().mean() > 0.5
        assert (found - expected).abs().max() <= 1e-5


def test_the_published_names() -> None:
    """Of taew2_1: names and shapes, widths 256, 128, 64, 64."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TinyCodec(TinyConfig(16)).state_dict().items()}
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["decoder.1.bias"] == (256,)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3) and shapes["decoder.5.conv.4.bias"] == (256,)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1) and shapes["decoder.8.weight"] == (128, 256, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1) and shapes["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert shapes["decoder.20.weight"] == (64, 64, 3, 3) and shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert len(shapes) == 2 + 9 * 6 + 3 * 2 + 2 and "decoder.8.bias" not in shapes


def published_state(codec: TinyCodec) -> dict[str, Tensor]:
    """With the encoder that lies beside the decoder in published files."""
    encoder = {"encoder.0.weight": torch.randn(8, 3, 3, 3), "encoder.2.conv.weight": torch.ones(8, 16, 1, 1)}
    return codec.state_dict() | encoder


def test_load_in_place_of_the_codec(tmp_path: Path) -> None:
    """The file, or its folder; the bundle's own codec is then neither needed nor loaded."""
    pipeline("t2v").save_pretrained(tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "b")
    codec = make()
    (tmp_path / "tiny").mkdir()
    save_file(published_state(codec), tmp_path / "tiny" / "taew2_1.safetensors")
    latents = torch.randn(1, CHANNELS, 2, 4, 6)
    for place in (tmp_path / "tiny", tmp_path / "tiny" / "taew2_1.safetensors"):
        runtime = dsa_rt.load(tmp_path / "b", dtype="fp32", decoder=place)
        assert torch.equal(runtime.codec.decode(latents), codec.decode(latents))
    video = runtime.compile(height=32, width=48, frames=5, steps=1)("a red ball", seed=1)
    decoded = codec.decode(video.latents[None])[0].float().add(1).mul(127.5).round().byte().permute(1, 2, 3, 0)
    assert torch.equal(video.frames, decoded)
    with pytest.raises(OptionError, match="the tiny decoder cannot encode"):
        runtime.codec.encode(torch.zeros(1, 3, 1, 8, 8))


def test_image_to_video_keeps_its_encoder(tmp_path: Path) -> None:
    pipeline("i2v").save_pretrained(tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "b")
    codec = make()
    save_file(codec.state_dict(), tmp_path / "tiny.safetensors")
    whole = dsa_rt.load(tmp_path / "b", dtype="fp32")
    mixed = dsa_rt.load(tmp_path / "b", dtype="fp32", decoder=tmp_path / "tiny.safetensors")
    video, latents = torch.rand(1, 3, 5, 16, 16), torch.randn(1, CHANNELS, 2, 2, 2)
    assert torch.equal(mixed.codec.encode(video), whole.codec.encode(video))
    assert torch.equal(mixed.codec.decode(latents), codec.decode(latents))
    assert torch.equal(mixed.codec.stream_decoder().decode(latents), codec.decode(latents))
    assert isinstance(mixed.codec, VideoCodec) and mixed.codec.latent_shape(5, 16, 16) == (CHANNELS, 2, 2, 2)
    with pytest.raises(OptionError, match="cannot encode the first frame of image-to-video"):
        convert(tmp_path / "p", tmp_path / "c", decoder=tmp_path / "tiny.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_as_a_bundles_codec(tmp_path: Path, suffix: str) -> None:
    codec = make()
    pipeline("t2v").save_pretrained(tmp_path / "p")
    file = tmp_path / f"taew2_1.{suffix}"
    state = published_state(codec)
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    bundle = convert(tmp_path / "p", tmp_path / "b", decoder=file)
    assert bundle.manifest.codec is not None and bundle.manifest.codec.kind == "taehv"
    runtime = dsa_rt.load(tmp_path / "b", dtype="fp32")
    latents = torch.randn(1, CHANNELS, 3, 2, 2)
    assert torch.equal(runtime.codec.decode(latents), codec.decode(latents))


def test_files_that_grow_more_in_time_are_cut(tmp_path: Path) -> None:
    """Their last frames are those that a model of fewer frames has."""
    codec = make()
    state = dict(codec.state_dict())
    other = torch.randn(2, *state["decoder.7.conv.weight"].shape)
    state["decoder.7.conv.weight"] = torch.cat([other[0], state["decoder.7.conv.weight"]])
    save_file(state, tmp_path / "tiny.safetensors")
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "wan.safetensors")
    latents = torch.randn(1, CHANNELS, 2, 2, 2)
    found = load_tiny(tmp_path / "tiny.safetensors", torch.device("cpu"), torch.float32)
    assert torch.equal(found.decode(latents), codec.decode(latents))
    bundle = convert(tmp_path / "wan.safetensors", tmp_path / "b", decoder=tmp_path / "tiny.safetensors")
    loaded = bundle.load("codec", "cpu", torch.float32)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in codec.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.8.weight"), "has no tensor 'decoder.8.weight'.*TAEHV"),
        (lambda s: s.pop("decoder.3.conv.0.bias"), "(lacks|no tensor) 'decoder.3.conv.0.bias'"),
        (lambda s: s.update({"decoder.30.weight": torch.ones(1)}), "surplus tensor 'decoder.30.weight'"),
        (lambda s: s.update({"decoder.9.conv.2.weight": torch.ones(3, 3, 3, 3)}),
         r"'decoder.9.conv.2.weight' (has|of) shape \(3, 3, 3, 3\), expected \(10, 10, 3, 3\)"),
        (lambda s: s.update({"decoder.22.weight": torch.ones(5, 6, 3, 3)}), "makes 5 channels"),
    ],
)
def test_other_files(tmp_path: Path, change: Any, message: str) -> None:
    state = dict(make().state_dict())
    change(state)
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(BundleError, match=message):
        load_tiny(tmp_path / "tiny.safetensors", torch.device("cpu"), torch.float32)
    save_file(original_state(transformer(1, 1, 128)), tmp_path / "wan.safetensors")
    with pytest.raises(BundleError, match=message):
        convert(tmp_path / "wan.safetensors", tmp_path / "b", decoder=tmp_path / "tiny.safetensors")
    assert not (tmp_path / "b").exists()


def test_bad_values_and_places(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    state = dict(make().state_dict())
    state["decoder.1.bias"][0] = torch.nan
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(BundleError, match=r"tensor 'decoder.1.bias' holds NaN or Inf"):
        load_tiny(tmp_path / "tiny.safetensors", cpu, torch.float32)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "tiny.safetensors").read_bytes()[:-9])
    torch.save(state, tmp_path / "taew2_1.pth")
    for name, message in [("none", "there is no tiny decoder"), (".", "has 2 .safetensors files"),
                          ("taew2_1.pth", "pickled weights are not opened at run time; dsa-rt export --decoder"),
                          ("cut.safetensors", "its header describes")]:  # fmt: skip
        with pytest.raises(BundleError, match=message):
            load_tiny(tmp_path / name, cpu, torch.float32)


def test_a_decoder_of_another_model(tmp_path: Path) -> None:
    pipeline("t2v").save_pretrained(tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "b")
    save_file(make(z=6).state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(BundleError, match="latent channels is 4 but decoder channels is 6"):
        dsa_rt.load(tmp_path / "b", decoder=tmp_path / "tiny.safetensors")
    save_file(make(patch=2).state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(BundleError, match="latent spatial is 8 but decoder spatial factor is 16"):
        dsa_rt.load(tmp_path / "b", decoder=tmp_path / "tiny.safetensors")


def test_sizes_on_the_way() -> None:
    stream = make().stream_decoder()
    stream.decode(torch.zeros(1, CHANNELS, 1, 2, 2))
    with pytest.raises(ShapeError, match="this stream decodes latents"):
        stream.decode(torch.zeros(1, CHANNELS, 1, 3, 2))
    with pytest.raises(OptionError, match="z is 0"):
        TinyConfig(0)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_bytes_is_what_decoding_holds(patch: int, dtype: torch.dtype) -> None:
    """Counted on the published ratios of widths; a constant amount, however long the clip."""
    codec = TinyCodec(TinyConfig(CHANNELS, (64, 32, 16, 16), patch)).to(dtype).requires_grad_(False).eval()
    stream, held = codec.stream_decoder(), []
    with LiveBytes() as live:
        for _ in range(3):
            live.peak = 0
            stream.decode(torch.zeros(1, CHANNELS, 1, 5, 4))
            held.append((live.peak, live.now))
    expected = codec.decode_bytes(40 * patch, 32 * patch)
    assert held[1] == held[2] and held[2][0] <= expected <= 1.2 * held[2][0], (held, expected)
