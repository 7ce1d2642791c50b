"""Hooks read a running ViT block by block, and pixels are normalised for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class BlockOutputs:
    """Hold hooks that read y_k (B, T, D) after every block of a running ViT.

    The library's own forward runs unchanged; blocks must be batch-first. One object reads one
    model, one forward at a time.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._levels: dict[int, Tensor] = {}
        for k, block in enumerate(blocks, 1):
            block.register_forward_hook(lambda _, __, y, k=k: self._levels.__setitem__(k, y))

    def take(self, levels: Sequence[int]) -> list[Tensor]:
        """Return y_k (B, T, D) of the 1-based levels; nothing is kept afterwards."""
        out = [self._levels[k] for k in levels]
        self._levels.clear()
        return out


def tail_arrays(norm: Any, **more: Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """Return gamma (D,), beta (D,) and eps () of a final LayerNorm, and what comes with it, such as
    proj (D, E)."""
    parts = {"gamma": norm.weight, "beta": norm.bias, **more, "eps": torch.tensor(norm.eps)}
    return {name: part.detach().cpu().float().numpy() for name, part in parts.items()}


def rms_tail_arrays(norm: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Return rms_gamma (D,) and eps () of a final RMS norm."""
    parts = {"rms_gamma": norm.weight, "eps": torch.tensor(norm.eps)}
    return {name: part.detach().cpu().float().numpy() for name, part in parts.items()}


def normalise_pixels(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """Normalise uint8 (B, 3, S, S) by the channels' mean and std, numbers or float32 tensors (3,)
    on the images' device; returns float32."""
    if not isinstance(mean, Tensor):
        mean = _on_device(tuple(mean), images.device)
    if not isinstance(std, Tensor):
        std = _on_device(tuple(std), images.device)
    return (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers (3,) on a device; kept, since a GPU's stream is waited for to copy them."""
    # what is compiled has them for constants
    return _make(values, device) if torch.compiler.is_compiling() else _kept(values, device)


def _make(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whose tensors could not be used outside of it
        return _make(values, device)
