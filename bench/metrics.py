"""Distances between clips and rank correlation, in plain torch and numpy."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def mean_squared_error(a: Tensor, b: Tensor) -> float:
    """Of uint8 frames of one shape, over frames, pixels and colours, in squared grey levels of 0 to 255."""
    return float((a.float() - b.float()).square().mean())


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in decibels, peak 255; infinite for equal clips."""
    return math.inf if mse == 0 else 10 * math.log10(PEAK**2 / mse)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two clips, uint8 [T, H, W, 3]: 1 for equal ones.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): on luma
    (Rec. 601), in gaussian windows of 11 x 11 pixels with sigma 1.5 that lie inside the frame, K1 = 0.01, K2
    = 0.03, L = 255; mean over windows and frames. Frames have at least 11 pixels a side.
    """
    luma = torch.tensor([0.299, 0.587, 0.114])
    x, y = a.float() @ luma, b.float() @ luma
    vertical, horizontal = (_gaussian_rows(size) for size in x.shape[1:])
    maps = torch.stack((x, y, x * x, y * y, x * y))
    mean_x, mean_y, xx, yy, xy = vertical @ maps @ horizontal.T
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances = xx - mean_x.square() + yy - mean_y.square()
    return float((likeness * (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)).mean())


def _gaussian_rows(size: int) -> Tensor:
    """[size - 10, size]: row i holds the window's weights over pixels i to i + 10."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    rows = torch.zeros(size - SSIM_WINDOW + 1, size)
    for i, row in enumerate(rows):
        row[i : i + SSIM_WINDOW] = weights / weights.sum()
    return rows


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value, from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse.ravel()]


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Rank correlation of two samples [n]; None where one of them is constant or n < 3."""
    if len(a) < 3 or len(a) != len(b):
        return None
    x, y = ranks(np.asarray(a, np.float64)), ranks(np.asarray(b, np.float64))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else None
