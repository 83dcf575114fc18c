"""The codec's recipe on a tiny world: windows, loss gradient, learning, resuming and normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_rt.codec.conv import ConvCodecConfig
from dsa_rt.errors import OptionError
from dsa_rt.train.codec import (
    ClipPool,
    CodecTraining,
    _PixelLoss,
    load_codec,
    measure_latents,
    psnr,
    save_codec,
    train_codec,
)

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
    """A grey that is another one in each clip."""
    return np.full((17, 16, 16, 3), np.random.default_rng(seed).integers(40, 215), np.uint8)


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


def test_it_learns_resumes_and_writes_what_it_returns(tmp_path: Path) -> None:
    def train(folder: str, steps: int, **more: object):
        return train_codec(
            tmp_path / folder,
            steps=steps,
            config=SIZES,
            recipe=RECIPE,
            render=shaded_clip,
            stats_clips=6,
            **more,
        )  # type: ignore[arg-type]

    clips = torch.stack([torch.from_numpy(shaded_clip(seed)) for seed in range(1000, 1008)])
    untrained = psnr(train("short", 1), clips).mean()
    codec = train("long", 60)
    assert psnr(codec, clips).mean() > untrained + 3

    raw = codec.latent_std.clone()
    latents = torch.cat([codec.encode(clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1) for clip in clips])
    assert latents.std() == pytest.approx(1, abs=0.6) and raw.min() > 0

    read = load_codec(tmp_path / "long")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name

    lines = [json.loads(line) for line in (tmp_path / "long" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 20, 40]
    assert lines[-1]["l1"] < lines[0]["l1"]

    done = train("long", 60)  # nothing left to do: the same weights
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), done.parameters(), strict=True))
    train("long", 80)
    lines = [json.loads(line) for line in (tmp_path / "long" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 20, 40, 60]
    assert json.loads((tmp_path / "long" / "result.json").read_text())["steps"] == 80
    train("long", 1, resume=False)
    assert len((tmp_path / "long" / "losses.jsonl").read_text().splitlines()) == 1


def test_other_sizes_cannot_be_resumed(tmp_path: Path) -> None:
    train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    with pytest.raises(OptionError, match="trained with sizes.*resume=False"):
        train_codec(tmp_path, steps=2, recipe=RECIPE, render=shaded_clip, stats_clips=2)


def test_measured_latents_have_zero_mean_and_unit_deviation(tmp_path: Path) -> None:
    codec = train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    clips = torch.randint(0, 255, (5, 9, 16, 16, 3), dtype=torch.uint8)
    codec.latent_mean.fill_(7)
    codec.latent_std.fill_(0.1)
    measure_latents(codec, clips)
    latents = torch.cat([codec.encode(clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1) for clip in clips])
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=1e-4, rtol=0)


def test_bf16_file_is_the_rounded_codec(tmp_path: Path) -> None:
    codec = train_codec(tmp_path, steps=1, config=SIZES, recipe=RECIPE, render=shaded_clip, stats_clips=2)
    save_codec(codec, tmp_path / "small", torch.bfloat16)
    read = load_codec(tmp_path / "small")
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), read.state_dict()[name]), name
