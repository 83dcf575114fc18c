"""The convolutional codec with random weights: causality, streaming, shapes and normalisation."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor

from dsa_rt.codec import StreamDecoder, TextEncoder, VideoCodec
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.errors import ShapeError

TINY = ConvCodecConfig(
    z=5,
    width=8,
    width_latent=12,
    encoder_blocks=2,
    encoder_blocks_latent=1,
    decoder_blocks_latent=2,
    decoder_blocks=2,
)


def random_codec(seed: int = 0, dtype: torch.dtype = torch.float32) -> ConvCodec:
    """A codec whose every tensor is random: a fresh one starts its branches at zero, which hides errors."""
    torch.manual_seed(seed)
    codec = ConvCodec(TINY)
    for parameter in codec.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    codec.latent_mean.normal_()
    codec.latent_std.uniform_(0.5, 2)
    return codec.to(dtype).eval()


def random_video(batch: int, frames: int, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portions", [(7,), (1, 6), (3, 3, 1), (1,) * 7, (2, 5)])
def test_portions_do_not_change_a_bit(portions: tuple[int, ...], dtype: torch.dtype) -> None:
    codec = random_codec(1, dtype)
    latents = torch.randn(2, 5, 7, 3, 4)
    whole = codec.decode(latents)
    stream = codec.stream_decoder(2)
    parts = [stream.decode(part) for part in latents.split(portions, dim=2)]
    lengths = [4 * count for count in portions]
    lengths[0] -= 3
    assert [part.shape[2] for part in parts] == lengths
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert whole.shape == (2, 3, 25, 24, 32) and whole.dtype == dtype


def test_streams_side_by_side_do_not_see_each_other() -> None:
    codec = random_codec(2)
    one, two = torch.randn(2, 1, 5, 4, 2, 3)
    streams = codec.stream_decoder(), codec.stream_decoder()
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in range(4):
        for latents, stream, part in zip((one, two), streams, parts, strict=True):
            part.append(stream.decode(latents[:, :, index : index + 1]))
    assert torch.equal(torch.cat(parts[0], dim=2), codec.decode(one))
    assert torch.equal(torch.cat(parts[1], dim=2), codec.decode(two))


def test_streaming_equals_the_form_that_is_trained() -> None:
    codec = random_codec(3)
    latents = torch.randn(2, 5, 4, 3, 4)
    raw = latents * codec.latent_std.view(1, -1, 1, 1, 1) + codec.latent_mean.view(1, -1, 1, 1, 1)
    with torch.no_grad():
        grouped = codec.decode_groups(raw)
    assert grouped.abs().max() > 1  # the clamp is part of what is compared
    torch.testing.assert_close(codec.decode(latents), grouped[:, :, 3:].clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_decoding_is_causal_and_remembers() -> None:
    codec = random_codec(4)
    latents = torch.randn(1, 5, 6, 3, 4)
    changed = latents.clone()
    changed[:, :, 3] = torch.randn(1, 5, 3, 4)
    before, after = codec.decode(latents), codec.decode(changed)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:13], after[:, :, 9:13])
    assert not torch.equal(before[:, :, 13:17], after[:, :, 13:17])


def test_encoding_is_causal_and_remembers() -> None:
    codec = random_codec(5)
    video = random_video(1, 21)
    changed = video.clone()
    changed[:, :, 9:] = random_video(1, 12)
    before, after = codec.encode(video), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])
    changed = video.clone()
    changed[:, :, 0] = random_video(1, 1)[:, :, 0]
    assert not torch.equal(codec.encode(video)[:, :, 1], codec.encode(changed)[:, :, 1])


def test_a_clip_can_be_cut_short() -> None:
    codec = random_codec(6)
    video = random_video(2, 13)
    torch.testing.assert_close(
        codec.encode(video[:, :, :5]), codec.encode(video)[:, :, :2], atol=1e-5, rtol=1e-5
    )
    assert codec.encode(video[:, :, :1]).shape == (2, 5, 1, 3, 4)


def test_latents_are_normalised_with_the_buffers() -> None:
    codec = random_codec(7)
    video = random_video(1, 9)
    mean, std = codec.latent_mean.clone(), codec.latent_std.clone()
    normalised = codec.encode(video)
    decoded = codec.decode(normalised)
    codec.latent_mean.zero_()
    codec.latent_std.fill_(1)
    raw = codec.encode(video)
    for channel in range(5):
        expected = (raw[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(normalised[:, channel], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(raw), decoded, atol=1e-4, rtol=1e-4)


def test_weights_and_sizes_round_trip() -> None:
    codec = random_codec(8)
    other = ConvCodec.from_dict(codec.to_dict())
    other.load_state_dict(codec.state_dict())
    latents = torch.randn(1, 5, 2, 3, 4)
    assert torch.equal(codec.decode(latents), other.decode(latents))


def test_the_protocols_are_kept() -> None:
    codec = random_codec(9)
    text = GrammarTextEncoder(GrammarTextConfig(words=7, length=5, dim=8, heads=2, layers=1))
    assert isinstance(text, TextEncoder) and not isinstance(text, VideoCodec)
    assert isinstance(codec, VideoCodec)
    assert isinstance(codec.stream_decoder(), StreamDecoder)
    assert codec.latent_shape(81, 96, 128) == (5, 21, 12, 16)
    assert (codec.latent_channels, codec.temporal_factor, codec.spatial_factor) == (5, 4, 8)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 6, 24, 32), ["6 frames", "5 or 9"]),
        ((1, 3, 4, 24, 32), ["4 frames", "1 or 5"]),
        ((1, 3, 0, 24, 32), ["0 frames", "as 1 "]),
        ((1, 3, 5, 100, 32), ["height 100", "96 or 104"]),
        ((1, 3, 5, 24, 30), ["width 30", "24 or 32"]),
        ((1, 3, 5, 4, 32), ["height 4", "; 8 would"]),
        ((1, 4, 5, 24, 32), ["[1, 4, 5, 24, 32]", "[batch, 3,"]),
        ((3, 5, 24, 32), ["[3, 5, 24, 32]"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(shape: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        random_codec().encode(torch.zeros(shape))
    for word in words:
        assert word in str(caught.value)


def test_integer_frames_are_refused() -> None:
    with pytest.raises(ShapeError, match="uint8"):
        random_codec().encode(torch.zeros(1, 3, 5, 24, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 3, 4), (5, 2, 3, 4), (1, 5, 0, 3, 4), (2, 5, 1, 3, 4), (1, 5, 1, 4, 4)]
)
def test_a_stream_refuses_other_latents(shape: tuple[int, ...]) -> None:
    stream = random_codec().stream_decoder(1)
    stream.decode(torch.randn(1, 5, 2, 3, 4))
    with pytest.raises(ShapeError) as caught:
        stream.decode(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)


def test_a_refused_portion_does_not_disturb_the_stream() -> None:
    codec = random_codec(10)
    latents = torch.randn(1, 5, 4, 3, 4)
    stream = codec.stream_decoder()
    first = stream.decode(latents[:, :, :2])
    with pytest.raises(ShapeError):
        stream.decode(torch.randn(1, 5, 1, 9, 9))
    assert torch.equal(torch.cat([first, stream.decode(latents[:, :, 2:])], dim=2), codec.decode(latents))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        random_codec().stream_decoder(0)


@pytest.mark.parametrize("config", [TINY, ConvCodecConfig(), ConvCodecConfig(z=4, width=8, width_latent=8)])
def test_decode_bytes_is_what_decoding_holds(config: ConvCodecConfig) -> None:
    codec = ConvCodec(config).requires_grad_(False).eval()
    stream, held = codec.stream_decoder(), []
    with LiveBytes() as live:
        for _ in range(3):
            live.peak = 0
            stream.decode(torch.zeros(1, config.z, 1, 3, 4))
            held.append((live.peak, live.now))
    expected = codec.decode_bytes(24, 32)
    assert held[1] == held[2] and held[2][0] <= expected <= 2 * held[2][0], (held, expected)
