"""What a codec loses of levels is measured, and so is what the teacher's own arithmetic changes.

Per level, over tokens: the mean cosine; the relative MSE, of the residual without the channels'
means; that of the worst token; and the added loss. The last is in MaskAlign's unit, twice the mean
smooth L1: a student that misses each value by a normal number of 0.5 would see its loss rise by so
much (OpenDriveLab/maskalign, models_pretrain.py at 4cb577f; METHODS 1.4).

L levels, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDUAL = 0.5  # of the student, for the added loss
_DIGITS = 4


class Distortion(NamedTuple):
    """Hold what was measured, a number for each level."""

    cosine: list[float]
    mse: list[float]
    worst: list[float]  # relative MSE of the worst token
    added_loss: list[float]  # as a share of the loss


def compare(pairs: Iterable[tuple[Tensor, Tensor]], mean: Tensor) -> Distortion:
    """Compare views (L, T, D) with what became of them; `mean` (L, D) is that of the channels."""
    rows = [_of_view(h.float(), other.float(), mean, seed) for seed, (h, other) in enumerate(pairs)]
    cosine, lost, size, worst, before, after = (
        torch.stack(each) for each in zip(*rows, strict=True)
    )
    return Distortion(
        _plain(cosine.mean(0)),
        _plain(lost.sum(0) / size.sum(0).clamp_min(1e-300)),
        _plain(worst.max(0).values),
        _plain(after.sum(0) / before.sum(0) - 1),
    )


def _of_view(h: Tensor, other: Tensor, mean: Tensor, seed: int) -> tuple[Tensor, ...]:
    """(L,) each: mean cosine, squared error, squared residual, worst token, loss without the error
    and with it."""
    error = other - h
    lost = error.double().square().sum(-1)
    size = (h - mean[:, None]).double().square().sum(-1)
    cosine = F.cosine_similarity(h.double(), other.double(), dim=-1).mean(-1)
    ratio = torch.where(size > 0, lost / size, 0)
    missed = RESIDUAL * torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))
    return (
        cosine,
        lost.sum(-1),
        size.sum(-1),
        ratio.amax(-1),
        _loss(missed),
        _loss(missed - error),
    )


def _loss(difference: Tensor) -> Tensor:
    """2 x smooth L1 with beta 1 of differences (L, T, D), summed a level."""
    each = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")
    return 2 * each.double().sum((1, 2))


def _plain(values: Tensor) -> list[float]:
    """Plain numbers of few digits, the same wherever sums are made in another order."""
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
