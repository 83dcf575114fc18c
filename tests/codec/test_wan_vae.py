"""Wan's video codecs against diffusers' own decode and encode, in any portioning."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from published import video_codec
from torch import Tensor

from dsa_rt.bundle.strict import parse
from dsa_rt.codec import VideoCodec
from dsa_rt.codec.wan_vae import WanVaeCodec, WanVaeConfig
from dsa_rt.errors import BundleError, OptionError, ShapeError


def pair(ti2v: bool, seed: int = 1) -> tuple[WanVaeCodec, Any]:
    """Ours and diffusers', with the same random weights."""
    theirs = video_codec(seed, ti2v)
    values = WanVaeConfig.from_diffusers(dict(theirs.config))
    ours = WanVaeCodec(parse(WanVaeConfig, values, "config"))
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False).eval(), theirs


def statistics(theirs: Any) -> tuple[Tensor, Tensor]:
    mean, std = theirs.config.latents_mean, theirs.config.latents_std
    return torch.tensor(mean).view(1, -1, 1, 1, 1), torch.tensor(std).view(1, -1, 1, 1, 1)


@torch.no_grad()
def decoded(theirs: Any, latents: Tensor) -> Tensor:
    """As WanPipeline decodes."""
    mean, std = statistics(theirs)
    return theirs.decode(latents / (1 / std) + mean, return_dict=False)[0]


@pytest.mark.parametrize("ti2v", [False, True])
@pytest.mark.parametrize("portions", [[5], [1, 1, 1, 1, 1], [2, 3], [1, 4], [3, 1, 1]])
def test_stream_equals_the_whole_decode(ti2v: bool, portions: list[int]) -> None:
    ours, theirs = pair(ti2v)
    latents = torch.randn(2, ours.latent_channels, 5, 2, 3)
    expected = decoded(theirs, latents)
    stream = ours.stream_decoder(2)
    parts = [stream.decode(part) for part in latents.split(portions, 2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(portions)]
    video = torch.cat(parts, 2)
    assert video.shape == expected.shape == (2, 3, 17, 2 * ours.spatial_factor, 3 * ours.spatial_factor)
    assert expected.std() > 0.2 and (expected.abs() < 1).float().mean() > 0.5
    assert (video - expected).abs().max() <= 1e-5
    assert torch.equal(video, ours.decode(latents))


@pytest.mark.parametrize("ti2v", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_equals_the_mean_of_the_posterior(ti2v: bool, frames: int) -> None:
    ours, theirs = pair(ti2v, seed=frames)
    video = torch.rand(2, 3, frames, 2 * ours.spatial_factor, ours.spatial_factor) * 2 - 1
    mean, std = statistics(theirs)
    with torch.no_grad():
        expected = (theirs.encode(video).latent_dist.mode() - mean) * (1 / std)
    latents = ours.encode(video)
    assert latents.shape == (2, *ours.latent_shape(frames, *video.shape[3:]))
    assert expected.std() > 0.1 and (latents - expected).abs().max() <= 1e-5


def test_clips_side_by_side_are_those_alone() -> None:
    ours, _ = pair(False)
    latents = torch.randn(3, 4, 2, 2, 2)
    together = ours.decode(latents)
    for alone, clip in zip(together, latents, strict=True):
        assert (ours.decode(clip[None])[0] - alone).abs().max() <= 1e-5


def test_streams_do_not_meet() -> None:
    """Two clips, alternating, and two more in threads: caches belong to the stream."""
    ours, _ = pair(False)
    clips = [torch.randn(1, 4, 3, 2, 2) for _ in range(4)]
    expected = [ours.decode(clip) for clip in clips]
    streams = [ours.stream_decoder() for _ in clips]
    found = [torch.cat(parts, 2) for parts in zip(
        *([stream.decode(clip[:, :, i : i + 1]) for stream, clip in zip(streams[:2], clips[:2], strict=True)]
          for i in range(3)), strict=True)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    results: dict[int, Tensor] = {}
    work = [threading.Thread(target=lambda n=n: results.update({n: ours.decode(clips[n])})) for n in (2, 3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in (2, 3))


@pytest.mark.parametrize("ti2v", [False, True])
def test_bf16(ti2v: bool) -> None:
    """The arithmetic of diffusers' module in bf16; only the normalisation is finer."""
    ours, theirs = pair(ti2v)
    latents = torch.randn(1, ours.latent_channels, 2, 2, 2)
    exact = decoded(theirs, latents)
    mean, std = statistics(theirs)
    with torch.no_grad():
        rough = theirs.bfloat16().decode((latents * std + mean).bfloat16(), return_dict=False)[0]
    video = ours.bfloat16().decode(latents)
    assert video.dtype == torch.bfloat16
    assert (video - exact).abs().mean() <= 1.2 * (rough - exact).abs().mean() + 1e-3
    assert ours.encode(exact).dtype == torch.bfloat16


def test_is_a_codec_and_describes_itself() -> None:
    for ti2v in (False, True):
        ours, theirs = pair(ti2v)
        assert isinstance(ours, VideoCodec) and ours.kind == "wan-vae"
        assert set(ours.state_dict()) == set(theirs.state_dict())
        again = WanVaeCodec(parse(WanVaeConfig, ours.to_dict(), "config"))
        assert again.config == ours.config
        assert (ours.temporal_factor, ours.spatial_factor) == (4, 16 if ti2v else 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 1, 2, 2), r"latents must be \[batch, 4, latent frames"), ((4, 1, 2, 2), "latents must be"),
        ((1, 4, 0, 2, 2), "none of them"),
    ],
)  # fmt: skip
def test_latents_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    ours, _ = pair(False)
    for call in (ours.decode, ours.stream_decoder().decode):
        with pytest.raises(ShapeError, match=message):
            call(torch.zeros(shape))


def test_other_sizes_on_the_way() -> None:
    ours, _ = pair(False)
    stream = ours.stream_decoder(2)
    stream.decode(torch.zeros(2, 4, 1, 2, 2))
    for shape in ((1, 4, 1, 2, 2), (2, 4, 1, 2, 3)):
        with pytest.raises(ShapeError, match=r"this stream decodes latents \[2, 4, any, 2, 2\]"):
            stream.decode(torch.zeros(shape))
    with pytest.raises(ShapeError, match="batch of at least 1"):
        ours.stream_decoder(0)
    for shape, message in [((1, 3, 2, 8, 8), "2 frames do not fit"), ((1, 3, 1, 8, 9), "width 9 is not divisible by 8"),
                           ((1, 1, 1, 8, 8), "frames must be")]:  # fmt: skip
        with pytest.raises(ShapeError, match=message):
            ours.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperal_downsample": (True,)}, "temperal_downsample has 1 entries; expected one less than dim_mult, 3"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "latents_std has a value that is not above 0"),
        ({"latents_mean": (0.0,)}, "latents_mean has 1 values for 4 channels"),
        ({"dim_mult": ()}, "dim_mult is"),
        ({"patch_size": 0}, "patch_size is 0; expected 1 to 16"),
        ({"patch_size": 2}, "in_channels is 3, but its other sizes make it 12"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal is 8, but its other sizes make it 4"),
        ({"num_res_blocks": 10**6}, "num_res_blocks is 1000000; expected 1 to 64"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    values = WanVaeConfig.from_diffusers(dict(video_codec().config))
    values |= {key: list(value) if isinstance(value, tuple) else value for key, value in change.items()}
    with pytest.raises(BundleError, match=message):
        parse(WanVaeConfig, values, "config")


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    config = pair(False)[0].config
    for name in [name for name in sys.modules if name.startswith("diffusers")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"codec of Wan needs the package diffusers .*pip install 'dsa-rt\[hf\]'"):
        WanVaeCodec(config)


@pytest.mark.parametrize("ti2v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_bytes_is_what_decoding_holds(ti2v: bool, dtype: torch.dtype) -> None:
    """Counted on the published depth; a constant amount, however long the clip."""
    config = replace(pair(ti2v)[0].config, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
    codec = WanVaeCodec(config).to(dtype).requires_grad_(False).eval()
    stream, size = codec.stream_decoder(), codec.spatial_factor
    held = []
    with LiveBytes() as live:
        for _ in range(4):
            live.peak = 0
            stream.decode(torch.zeros(1, codec.latent_channels, 1, 3, 4))
            held.append((live.peak, live.now))
    expected = codec.decode_bytes(3 * size, 4 * size)
    assert held[2] == held[3] and held[3][0] <= expected <= 1.2 * held[3][0], (held, expected)
