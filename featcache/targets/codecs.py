"""A codec turns a normalised level into bytes and back: it is a pair of functions and one line in
`CODECS`.

A codec's name is a promise: what it writes never changes; another encoding is another name. Both
directions work on tensors where they are, so a GPU encodes before the copy to the host and decodes
after the copy from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from featcache.errors import UserError, near


class Codec(NamedTuple):
    """A pair of functions encodes and decodes levels. `arrays`: width -> what is stored of a token,
    name -> (numpy dtype, item, dimension names); `features` is one.

    `encode` (..., D) float -> those arrays (..., *item); `decode` takes them back to (..., D)
    float32.
    """

    arrays: Callable[[int], dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]]
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


def fp16_arrays(width: int) -> dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Return the one array that half precision needs."""
    return {"features": ("<f2", (width,), ("channel",))}


def encode_fp16(h: Tensor) -> dict[str, Tensor]:
    """Encode in half precision, rounded to nearest. |h| <= sqrt(D - 1), so only non-finite input
    leaves the range.

    >>> encode_fp16(torch.tensor([1.0, -27.7, 1e-8]))["features"].tolist()
    [1.0, -27.703125, 0.0]
    """
    return {"features": h.to(torch.float16)}


def decode_fp16(coded: Mapping[str, Tensor]) -> Tensor:
    return coded["features"].to(torch.float32)


# named functions: spawned workers get codecs by pickle
CODECS = {"fp16": Codec(fp16_arrays, encode_fp16, decode_fp16)}


def get_codec(name: str) -> Codec:
    """Return the codec that a cache names."""
    if name not in CODECS:
        raise UserError(
            f"unknown codec {name!r}: {near(name, CODECS)}; a newer version of featcache may know "
            "it"
        )
    return CODECS[name]


_WIDER = {torch.float32: torch.float64, torch.float64: torch.float64}


def all_finite(coded: Mapping[str, Tensor], stats: Tensor) -> Tensor:
    """Return (B, L) whether encoded arrays and statistics, all (B, L, ...), hold finite values
    only; stays on the device.

    By sums that cannot overflow: what is not finite stays in a sum, and one pass makes no mask of
    the size of it all.
    """
    values = [each.flatten(2) for each in (*coded.values(), stats)]
    sums = [each.sum(2, dtype=_WIDER.get(each.dtype, torch.float32)) for each in values]
    return torch.stack([torch.isfinite(each) for each in sums]).all(0)
