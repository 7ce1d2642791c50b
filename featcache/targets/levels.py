"""A student learns from normalised levels, which are computed here with their statistics.

B batch, T tokens ([CLS] first, then P patches), D width, H heads, E projection width. y_k is the
teacher's residual stream after block k; only h_k and (mean, std) are stored, everything else is
derived (METHODS 10.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# CLIP's LayerNorm eps and layer_norm's default; models with another are rescaled by the stored std
EPS = 1e-5


def normalise(y: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise y (B, T, D) to h (B, T, D) = (y - mean) / std and stats (B, T, 2) = (mean, std),
    both at least float32.

    std is sqrt(biased variance + EPS), EPS included, so y = h * std + mean. (MaskAlign's `whiten`,
    METHODS 1.4.)
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    mean = y.mean(-1, keepdim=True)
    # in two passes: torch.var_mean takes twelve times as long on a CPU, and is no more exact
    centred = y - mean
    std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred.div_(std), torch.cat([mean, std], -1)


def moment_sums(stats: Any, width: int) -> Any:
    """Sum the moments of the numbers y of each level, from stats (n, L, T, 2) of `normalise` and D
    channels -> (L, 3) float64: their count, their sum and the sum of their squares, over pictures,
    tokens and channels; what several batches give may be added. Arrays or tensors."""
    of = np if isinstance(stats, np.ndarray) else torch
    stats = stats.astype(np.float64) if of is np else stats.double()
    mean, std = stats[..., 0], stats[..., 1]
    squares = (std**2 - EPS + mean**2).sum((0, 2)) * width
    count = of.full_like(squares, stats.shape[0] * stats.shape[2] * width)
    return of.stack([count, mean.sum((0, 2)) * width, squares], 1)


def moments(sums: Any) -> Any:
    """Turn `sums` (L, 3) into (L, 2) float32: mean and unbiased variance of each level (MaskAlign's
    whole-tensor `bn`, METHODS 14). An array or a tensor."""
    of = np if isinstance(sums, np.ndarray) else torch
    count, total, squares = sums.T
    variance = (squares - total**2 / count) / (count - 1)
    both = of.stack([total / count, variance], 1)
    return both.astype(np.float32) if of is np else both.float()
