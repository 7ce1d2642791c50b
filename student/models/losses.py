"""Recipes share these losses.

Losses are where small numbers are summed over millions of values, so they never run in half
precision: inputs are promoted to float32 (float64 is kept, for comparisons with a paper's code) and
autocast is off inside.

Shapes: B batch, N tokens, D width, P patches, M masked patches, C = p*p*3 values of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_PIX_EPS = 1e-6


def upcast(x: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def autocast_off(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def fd_smooth_l1(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Compute Feature Distillation's mean smooth-L1 of pred, target (..., D): e^2 / (2 beta) where
    |e| < beta and |e| - beta / 2 beyond."""
    with autocast_off(pred):
        return F.smooth_l1_loss(upcast(pred), upcast(target), beta=beta)


def smooth_l1(pred: Tensor, target: Tensor) -> Tensor:
    """Compute MaskAlign's 2 x mean smooth-L1 with beta 1 of pred, target (..., D).

    With e = pred - target: the mean of e^2 where |e| <= 1 and of 2|e| - 1 beyond (the paper's Eq. 3
    lacks the factor 2, the released code has it).
    """
    with autocast_off(pred):
        return 2 * F.smooth_l1_loss(upcast(pred), upcast(target), beta=1.0)


def l2(pred: Tensor, target: Tensor) -> Tensor:
    """Compute the mean of e^2 of pred, target (..., D)."""
    with autocast_off(pred):
        return F.mse_loss(upcast(pred), upcast(target))


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """Compute the mean of |e| of pred, target (..., D)."""
    with autocast_off(pred):
        return F.l1_loss(upcast(pred), upcast(target))


def cosine_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - cos of each pair of pred, target (..., D) -> (...), half their squared distance
    once both are of length 1.

    No eps: a vector of zeros has no direction, and gives NaN as in the released codes.
    """
    with autocast_off(pred):
        pred, target = upcast(pred), upcast(target)
        pred, target = (
            pred / pred.norm(dim=-1, keepdim=True),
            target / target.norm(dim=-1, keepdim=True),
        )
        return 1 - (pred * target).sum(dim=-1)


def norm_pix(patches: Tensor) -> Tensor:
    """Normalise patches (..., C): each less its mean, over its std (unbiased variance, eps
    1e-6)."""
    with autocast_off(patches):
        patches = upcast(patches)
        mean = patches.mean(dim=-1, keepdim=True)
        variance = patches.var(dim=-1, keepdim=True, unbiased=True)
        return (patches - mean) / (variance + NORM_PIX_EPS).sqrt()


def pixel_mse(pred: Tensor, patches: Tensor, *, normalise: bool = True) -> Tensor:
    """Compute the squared error, mean over a patch, then over masked patches: pred, patches
    (B,M,C) of these alone -> scalar.

    Every picture hides the same number of patches, so this is MAE's sum(loss * mask) / sum(mask).
    """
    with autocast_off(pred):
        return F.mse_loss(upcast(pred), norm_pix(patches) if normalise else upcast(patches))
