"""Noise levels against the table of Self-Forcing and against numpy in fp64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from dsa_rt.errors import OptionError
from dsa_rt.schedule import (
    TRAIN_TIMESTEPS,
    add_noise,
    euler_sigmas,
    few_step_sigmas,
    sample_sigmas,
    shift_sigma,
    to_x0,
)


def self_forcing_table(shift: float) -> np.ndarray:
    """sigma = linspace(1, 0, 1001)[:-1], warped: the 1000 levels its timesteps point into."""
    sigma = np.linspace(1.0, 0.0, 1001, dtype=np.float64)[:-1]
    return shift * sigma / (1 + (shift - 1) * sigma)


def test_few_step_levels_are_self_forcings() -> None:
    levels = few_step_sigmas((1000.0, 750.0, 500.0, 250.0), 5.0)
    assert levels == pytest.approx([1, 0.9375, 5 / 6, 0.625], abs=1e-15)
    assert [TRAIN_TIMESTEPS * s for s in levels] == pytest.approx([1000, 937.5, 833.33, 625], abs=5e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_few_step_levels_are_the_tables(shift: float) -> None:
    table = self_forcing_table(shift)
    steps = np.sort(np.random.default_rng(int(shift)).choice(np.arange(1, 1001), 9, replace=False))[::-1]
    levels = few_step_sigmas([float(step) for step in steps], shift)
    np.testing.assert_allclose(levels, table[1000 - steps], rtol=0, atol=1e-14)
    # Self-Forcing looks a level up by the nearest timestep: it finds the same one.
    nearest = [np.abs(1000 * table - 1000 * level).argmin() for level in levels]
    assert (np.array(nearest) == 1000 - steps).all()


def test_shift_in_float64() -> None:
    sigma = np.linspace(0, 1, 1001)
    ours = [shift_sigma(float(s), 5.0) for s in sigma]
    np.testing.assert_allclose(ours, _warp(sigma, 5.0), rtol=0, atol=1e-14)
    assert ours[0] == 0 and ours[-1] == 1


def _warp(sigma: np.ndarray, shift: float) -> np.ndarray:
    """The same curve from its meaning: odds of noise to signal are multiplied by the shift."""
    with np.errstate(divide="ignore"):
        odds = shift * sigma / (1 - sigma)
    return np.where(np.isinf(odds), 1.0, odds / (1 + np.where(np.isinf(odds), 0.0, odds)))


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 1.0), (40, 5.0), (50, 3.0)])
def test_euler_grid(steps: int, shift: float) -> None:
    grid = euler_sigmas(steps, shift)
    np.testing.assert_allclose(grid, _warp(np.linspace(1, 0, steps + 1), shift), rtol=0, atol=1e-14)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert all(a > b for a, b in pairwise(grid))


def test_noise_and_velocity_are_inverse() -> None:
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    for sigma in (1.0, 0.9375, 0.1, 0.0):
        x = add_noise(x0, noise, sigma)
        torch.testing.assert_close(x, x0 + sigma * (noise - x0))
        torch.testing.assert_close(to_x0(x, noise - x0, sigma), x0)
    levels = torch.tensor([0.25, 0.75], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(add_noise(x0, noise, levels)[1], 0.25 * x0[1] + 0.75 * noise[1])


def test_training_levels_follow_the_warped_uniform() -> None:
    levels = sample_sigmas(20_000, 5.0, torch.Generator().manual_seed(1)).double().numpy()
    assert levels.min() >= 0 and levels.max() <= 1
    parts = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(levels, parts), _warp(parts, 5.0), atol=0.02)


@pytest.mark.parametrize(
    "timesteps", [(), (500.0, 500.0), (250.0, 500.0), (1000.5, 3.0), (500.0, 0.0), (500.0, -1.0), (float("nan"),)]
)
def test_timesteps_that_do_not_fall(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="falling values"):
        few_step_sigmas(timesteps, 5.0)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps(steps: int) -> None:
    with pytest.raises(OptionError, match=f"steps is {steps}"):
        euler_sigmas(steps, 5.0)
