"""How a normalised level becomes bytes and comes back: a pair of functions and one line in `CODECS`.

A codec's name is a promise: what it writes never changes; another encoding is another name. Both directions work on
tensors where they are, so a GPU encodes before the copy to the host and decodes after the copy from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Codec(NamedTuple):
    """`encode` (..., D) float -> stored `features` (..., D) of numpy dtype `dtype`; `decode` its inverse, float32."""

    dtype: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def encode_fp16(h: Tensor) -> Tensor:
    """Half precision, rounded to nearest. |h| <= sqrt(D - 1), so only non-finite input leaves the range.

    >>> encode_fp16(torch.tensor([1.0, -27.7, 1e-8])).tolist()
    [1.0, -27.703125, 0.0]
    """
    return h.to(torch.float16)


def decode_fp16(features: Tensor) -> Tensor:
    return features.to(torch.float32)


CODECS = {
    "fp16": Codec("<f2", encode_fp16, decode_fp16),
}


def out_of_range(features: Tensor, stats: Tensor) -> list[tuple[int, int]]:
    """(batch, level) pairs of (B, L, T, D) encoded features or (B, L, T, 2) statistics that hold a non-finite value."""
    bad = ~(torch.isfinite(features).flatten(2).all(2) & torch.isfinite(stats).flatten(2).all(2))
    return [(int(row), int(level)) for row, level in bad.nonzero().tolist()]
