"""The codec's recipe on a tiny world: windows, loss gradient, learning, resuming and normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dsa_rt.train.codec as training
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.errors import OptionError
from dsa_rt.train.codec import (
    ClipPool,
    CodecTraining,
    _PixelLoss,
    load_codec,
    measure_latents,
    psnr,
    save_codec,
    start_at_principal_components,
    train_codec,
)

from .test_conv import random_codec

SIZES = ConvCodecConfig(
    z=4,
    width=8,
    width_latent=8,
    encoder_blocks=1,
    encoder_blocks_latent=1,
    decoder_blocks_latent=1,
    decoder_blocks=1,
)
RECIPE = CodecTraining(batch=4, window=3, pool=6, learning_rate=5e-3, warmup_steps=5)


def numbered_clip(seed: int) -> np.ndarray:
    """Every pixel of frame t of clip ``seed`` is t: windows can be read back."""
    return np.broadcast_to(np.arange(33, dtype=np.uint8)[:, None, None, None], (33, 16, 16, 3)).copy()


def shaded_clip(seed: int) -> np.ndarray:
    """A grey that is another one in each clip, with a little noise."""
    rng = np.random.default_rng(seed)
    return (rng.integers(40, 215) + rng.integers(-3, 4, (17, 16, 16, 3))).astype(np.uint8)


def as_frames(clips: torch.Tensor) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] -> [N, 3, T, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def test_windows_are_first_frames_or_whole_groups() -> None:
    recipe = CodecTraining(batch=64, window=3, pool=2)
    frames, weight = ClipPool(numbered_clip, recipe, torch.device("cpu"), 0).windows(np.random.default_rng(0))
    assert frames.shape == (64, 3, 12, 16, 16)
    starts = set()
    for window, carries in zip(frames[:, 0, :, 0, 0], weight[:, 0, :, 0, 0], strict=True):
        numbers = ((window + 1) * 127.5).round().int().tolist()
        starts.add(numbers[0])
        if numbers[0] == 0:
            assert numbers == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
            assert carries.tolist() == [0, 0, 0] + [1] * 9
        else:
            assert numbers[0] % 4 == 1
            assert numbers == list(range(numbers[0], numbers[0] + 12))
            assert carries.tolist() == [0] * 4 + [1] * 8
    assert {0, 1, 21} <= starts and max(starts) == 21


def test_pixel_loss_has_the_gradient_of_its_definition() -> None:
    torch.manual_seed(0)
    error = torch.randn(2, 3, 5, 6, 7, dtype=torch.double, requires_grad=True)
    total, l1, mse, difference = _PixelLoss.apply(error, 0.7)
    (got,) = torch.autograd.grad(3 * total, error)
    parts = (
        error.abs().mean(),
        error.square().mean(),
        torch.stack([error.diff(dim=dim).abs().sum() for dim in (2, 3, 4)]).sum() / error.numel(),
    )
    expected = parts[0] + parts[1] + 0.7 * parts[2]
    torch.testing.assert_close((total, l1, mse, difference), (expected, *parts))
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, error)[0])


@pytest.mark.parametrize("budget", [{}, {"minutes": 1.0, "steps": 3}])
def test_one_budget_is_needed(budget: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="minutes or steps"):
        train_codec(tmp_path, **budget)  # type: ignore[arg-type]


def test_it_starts_at_the_principal_components() -> None:
    def grey_noise(seed: int) -> np.ndarray:
        grey = np.random.default_rng(seed).integers(0, 256, (9, 16, 24, 1), np.uint8)
        return np.repeat(grey, 3, axis=3)

    codec = ConvCodec(SIZES)
    start_at_principal_components(codec, grey_noise, clips=8)
    clips = torch.stack([torch.from_numpy(grey_noise(seed)) for seed in range(8)])
    groups = as_frames(clips)[:, :, [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]
    with torch.no_grad():
        raw = codec.encode_groups(groups)
        decoded = codec.decode_groups(raw)

    def cells(video: torch.Tensor) -> np.ndarray:  # one row of 768 numbers per 8x8 pixels of four frames
        rows = [
            video[n, :, t : t + 4, y : y + 8, x : x + 8].flatten().numpy()
            for n in range(8)
            for t in (0, 4, 8)
            for y in (0, 8)
            for x in (0, 8, 16)
        ]
        return np.stack(rows).astype(np.float64)

    data = cells(groups)
    _, _, directions = np.linalg.svd(data, full_matrices=False)
    projected = data @ directions[:4].T @ directions[:4]
    np.testing.assert_allclose(cells(decoded), projected, atol=2e-3)
    second_moment = torch.einsum("nathw,nbthw->ab", raw, raw) / (raw.numel() / 4)
    torch.testing.assert_close(second_moment, torch.eye(4), atol=1e-3, rtol=0)


def test_it_learns_resumes_and_writes_what_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Principal components solve a world this simple; from random weights there is something to learn.
    monkeypatch.setattr(training, "start_at_principal_components", lambda *arguments: None)

    def train(folder: str, steps: int, resume: bool = True) -> ConvCodec:
        out = tmp_path / folder
        return train_codec(
            out, steps=steps, resume=resume, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=6
        )

    def lines() -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / "long" / "losses.jsonl").read_text().splitlines()]

    clips = torch.stack([torch.from_numpy(shaded_clip(seed)) for seed in range(1000, 1008)])
    untrained = psnr(train("short", 1), clips).mean()
    codec = train("long", 60)
    assert psnr(codec, clips).mean() > untrained + 3
    assert codec.encode(as_frames(clips)).std() == pytest.approx(1, abs=0.5)

    read = load_codec(tmp_path / "long")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name

    assert [line["step"] for line in lines()] == [0, 20, 40]
    assert lines()[-1]["l1"] < lines()[0]["l1"]

    done = train("long", 60)  # nothing left to do: the same weights
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), done.parameters(), strict=True))
    train("long", 80)
    assert [line["step"] for line in lines()] == [0, 20, 40, 60]
    assert json.loads((tmp_path / "long" / "result.json").read_text())["steps"] == 80
    train("long", 1, resume=False)
    assert [line["step"] for line in lines()] == [0]


def test_psnr_is_its_definition() -> None:
    codec = random_codec(11)
    clip = torch.randint(0, 256, (1, 5, 16, 16, 3), dtype=torch.uint8)
    decoded = codec.decode(codec.encode(as_frames(clip)))
    levels = (decoded[0].permute(1, 2, 3, 0).numpy().astype(np.float64) + 1) * 127.5
    expected = 10 * np.log10(255**2 / np.mean((levels - clip[0].numpy()) ** 2))
    assert float(psnr(codec, clip)[0]) == pytest.approx(expected, abs=1e-3)


def test_a_decoder_can_be_trained_alone(tmp_path: Path) -> None:
    codec = train_codec(tmp_path / "a", steps=2, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=3)
    after = train_codec(
        tmp_path / "b", steps=3, recipe=RECIPE, render=shaded_clip, stats_clips=3, decoder_of=tmp_path / "a"
    )
    clips = as_frames(torch.stack([torch.from_numpy(shaded_clip(seed)) for seed in range(3)]))
    latents = codec.encode(clips)
    assert torch.equal(latents, after.encode(clips))
    assert not torch.equal(codec.decode(latents), after.decode(latents))
    read = load_codec(tmp_path / "b")
    assert torch.equal(read.decode(latents), after.decode(latents))


def test_other_sizes_cannot_be_resumed(tmp_path: Path) -> None:
    train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    with pytest.raises(OptionError, match=r"trained with sizes.*resume=False"):
        train_codec(tmp_path, steps=2, recipe=RECIPE, render=shaded_clip, stats_clips=2)


def test_measured_latents_have_zero_mean_and_unit_deviation(tmp_path: Path) -> None:
    codec = train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    clips = torch.randint(0, 255, (5, 9, 16, 16, 3), dtype=torch.uint8)
    codec.latent_mean.fill_(7)
    codec.latent_std.fill_(0.1)
    measure_latents(codec, clips)
    latents = codec.encode(as_frames(clips))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=1e-4, rtol=0)


def test_bf16_file_is_the_rounded_codec(tmp_path: Path) -> None:
    codec = train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    save_codec(codec, tmp_path / "small", torch.bfloat16)
    read = load_codec(tmp_path / "small")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), read.state_dict()[name]), name
