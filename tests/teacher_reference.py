"""Tests of the teachers share real photographs, and slow independent readings of the libraries' own
models.

The reference is an unmodified model in float64 with hooks: outputs of its blocks, and the whole
attention map of its last block, taken where the library's unfused path hands it to dropout, or from
torch's own `need_weights`.

B batch, T tokens, H heads, D width, S pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor, nn

NAMES = ("astronaut.png", "coffee.png", "rocket.jpg")


def photographs(size: int) -> Tensor:
    """Return centre squares of three photographs that scikit-image carries: uint8 (3, 3, S, S)."""
    rows = []
    for name in NAMES:
        picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        rows.append(np.asarray(square).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows))


def normalise_in_float64(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Normalise uint8 (B, 3, S, S) -> float64, by numpy."""
    x = images.numpy().astype(np.float64) / 255
    return torch.from_numpy((x - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1)))


def randomise_parameters(network: nn.Module, seed: int = 5, std: float = 0.2) -> nn.Module:
    """Draw every parameter, so that norms, biases, scales and registers all matter; norm weights
    about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            centre = float("norm" in name and name.endswith("weight") and parameter.ndim == 1)
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return network


def block_outputs(blocks: Any, run: Callable[[], object]) -> list[Tensor]:
    """Return y_k of every block."""
    ys: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, y: ys.append(y)) for block in blocks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return ys


def timm_attention_map(vit: Any, pixels: Tensor) -> Tensor:
    """Return the last block's softmax (B, H, T, T) on timm's own unfused path."""
    attn, maps = vit.blocks[-1].attn, []
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        vit.forward_features(pixels)
    handle.remove()
    (only,) = maps
    return only


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest per-token relative L2 difference."""
    expected = expected.double()
    return float(((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def attention_error(got: Tensor, expected: Tensor) -> float:
    """Return max|d| / max(a) of two attentions."""
    return float((got.double() - expected).abs().max() / expected.max())
