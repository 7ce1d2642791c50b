"""What others do at these bytes, to compare with: a number format of fewer bits, with scales.

Each function takes tokens (N, D) float32 and returns them as they come back; `bits` counts what is
stored of a value, scales included. D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# the 16 numbers of NF4, quantiles of normal ones (Dettmers et al., QLoRA, NeurIPS 2023, appendix E)
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of a 4-bit float


class Peer(NamedTuple):
    bits: Callable[[int], float]  # of a value, by the width
    through: Callable[[Tensor], Tensor]


def _nearest(x: Tensor, numbers: Tensor) -> Tensor:
    return numbers[torch.bucketize(x, (numbers[1:] + numbers[:-1]) / 2)]


def int8(x: Tensor) -> Tensor:
    """One scale a token, the largest value on 127."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round() * scale


def fp8(x: Tensor) -> Tensor:
    """E4M3 with one scale a token, the largest value on 448."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def nf4(x: Tensor) -> Tensor:
    """Blocks of 64 values with a scale of 16 bits."""
    blocks = x.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-6).half().float()
    return (_nearest(blocks / scale, torch.tensor(_NF4)) * scale).reshape(x.shape)


def nvfp4(x: Tensor) -> Tensor:
    """E2M1 in blocks of 16 values with a scale of 8 bits, and one of 32 bits a token."""
    whole = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / (6 * 448)
    blocks = (x / whole).reshape(-1, 16)
    scale = (
        (blocks.abs().amax(1, keepdim=True) / 6).to(torch.float8_e4m3fn).float().clamp_min(2**-9)
    )
    numbers = torch.tensor(sorted({sign * each for each in _E2M1 for sign in (-1, 1)}))
    return (_nearest(blocks / scale, numbers) * scale).reshape(x.shape) * whole


def int4(x: Tensor) -> Tensor:
    """One scale a token, the largest value on 7."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 7
    return (x / scale).round() * scale


PEERS = {
    "int8, a scale a token": Peer(lambda width: 8 + 32 / width, int8),
    "FP8 E4M3, a scale a token": Peer(lambda width: 8 + 32 / width, fp8),
    "NF4, blocks of 64": Peer(lambda width: 4 + 16 / 64, nf4),
    "NVFP4, blocks of 16": Peer(lambda width: 4 + 8 / 16 + 32 / width, nvfp4),
    "int4, a scale a token": Peer(lambda width: 4 + 32 / width, int4),
}
