"""Stored arrays become tensors, in image order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_image_order(features: Tensor, order: Tensor) -> Tensor:
    """Put ranked tokens (B, L, 1 + K, D) into image order (B, L, 1 + P, D), by the patches' order
    (B, P).

    Where a token was not read there is NaN, so that a loss which looks at it is not a number and
    cannot go unnoticed.
    """
    batch, levels, tokens, width = features.shape
    out = features.new_full((batch, levels, 1 + order.shape[1], width), float("nan"))
    out[:, :, 0] = features[:, :, 0]
    at = 1 + order[:, : tokens - 1].long()
    return out.scatter_(2, at[:, None, :, None].expand(-1, levels, -1, width), features[:, :, 1:])


def to_tensor(values: npt.NDArray[Any]) -> Tensor:
    """Make a tensor; unsigned numbers of more than 8 bits, which PyTorch hardly knows, as int64."""
    return copy_to_device(values, torch.device("cpu"))


def copy_to_device(
    values: npt.NDArray[Any] | Tensor, device: torch.device, *, own: bool = False
) -> Tensor:
    """Copy values as they are stored, without waiting for the copy; what is there already stays.
    Unsigned numbers of more than 8 bits become int64 on the device.

    With `own` the result never shares the host's memory; without, it does on a CPU.
    """
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    stored = values.view(f"i{values.dtype.itemsize}") if wide else values
    copied = torch.from_numpy(stored).to(device, non_blocking=True, copy=own)
    if wide and values.dtype.itemsize < 8:
        return copied.long() & ((1 << 8 * values.dtype.itemsize) - 1)
    return copied


def tail_tensors(tail: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
    """Return a teacher's tail (gamma, beta, eps, proj) as tensors."""
    return {name: torch.from_numpy(values) for name, values in tail.items()}


def tail_to_device(tail: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move the tail to the features' device; its one number stays on the host, which looks at
    it."""
    return {name: values.to(device) if values.ndim else values for name, values in tail.items()}
