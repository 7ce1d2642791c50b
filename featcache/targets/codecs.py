"""A codec turns normalised levels into bytes and back: it is a few functions and one line in
`CODECS`.

A codec's name is a promise: what it writes never changes; another encoding is another name. Both
directions work on tensors where they are, so a GPU encodes before the copy to the host and decodes
after the copy from it. Every codec encodes what fp16 would store, so that a cache in fp16 can be
made one in another codec, of the same bytes as an extraction.

L levels, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from featcache.errors import UserError, near
from featcache.targets import trellis
from featcache.targets.codec_names import ARRAYS, LOSSLESS, ArrayForms

Coded = Mapping[str, Tensor]
State = Mapping[str, Tensor]


class Codec(NamedTuple):
    """Functions encode and decode levels.

    `arrays`: width -> what is stored of a token, name -> (numpy dtype, item, dimension names);
    `features` is one. `prepare`: views (L, T, D) and a seed -> the state, which is made once for a
    cache; empty where the codec has none. `encode`: levels (..., L, T, D) and the state -> those
    arrays (..., L, T, *item); `decode` takes them back to (..., L, T, D) float32. `state_problem`:
    a state that was read from a file, L and D -> what is wrong with it. `tolerance`: how
    far a token may come back from what fp16 keeps, relative to its length without the mean.
    """

    arrays: Callable[[int], ArrayForms]
    prepare: Callable[[Iterable[Tensor], int], dict[str, Tensor]]
    encode: Callable[[Tensor, State], dict[str, Tensor]]
    decode: Callable[[Coded, State], Tensor]
    state_problem: Callable[[State, int, int], str]
    tolerance: float = 0.0


# ------------------------------------------------------------ fp16


def prepare_nothing(sample: Iterable[Tensor], seed: int) -> dict[str, Tensor]:
    return {}


def encode_fp16(h: Tensor, state: State) -> dict[str, Tensor]:
    """Encode in half precision, rounded to nearest. |h| <= sqrt(D - 1), so only non-finite input
    leaves the range.

    >>> encode_fp16(torch.tensor([1.0, -27.7, 1e-8]), {})["features"].tolist()
    [1.0, -27.703125, 0.0]
    """
    return {"features": h.to(torch.float16)}


def decode_fp16(coded: Coded, state: State) -> Tensor:
    return coded["features"].to(torch.float32)


def no_state_problem(state: State, levels: int, width: int) -> str:
    return ""


# ------------------------------------------------------------ q8, t4, t3


def prepare_trellis(bits: int, sample: Iterable[Tensor], seed: int) -> dict[str, Tensor]:
    return trellis.prepare(sample, seed, bits)


def encode_trellis(bits: int, h: Tensor, state: State) -> dict[str, Tensor]:
    return {"features": trellis.encode(h, state, bits)}


def decode_trellis(bits: int, coded: Coded, state: State) -> Tensor:
    return trellis.decode(coded["features"], state, bits)


def trellis_state_problem(bits: int, state: State, levels: int, width: int) -> str:
    return trellis.state_problem(state, levels, width, bits)


# twice the usual error: a token of 64 channels may lose so much
_TOLERANCES = {8: 0.013, 4: 0.15, 3: 0.29}


def _trellis(name: str, bits: int) -> Codec:
    return Codec(
        ARRAYS[name],
        partial(prepare_trellis, bits),
        partial(encode_trellis, bits),
        partial(decode_trellis, bits),
        partial(trellis_state_problem, bits),
        _TOLERANCES[bits],
    )


# named functions: spawned workers get codecs by pickle
CODECS = {
    LOSSLESS: Codec(ARRAYS[LOSSLESS], prepare_nothing, encode_fp16, decode_fp16, no_state_problem),
    "q8": _trellis("q8", 8),
    "t4": _trellis("t4", 4),
    "t3": _trellis("t3", 3),
}


def get_codec(name: str) -> Codec:
    """Return the codec that a cache names."""
    if name not in CODECS:
        raise UserError(
            f"unknown codec {name!r}: {near(name, CODECS)}; a newer version of featcache may know "
            "it"
        )
    return CODECS[name]


def of_level(state: State, number: int) -> dict[str, Tensor]:
    """Return the state of one of its levels; an empty one stays empty."""
    return {k: v[number : number + 1] if k == "mean" else v for k, v in state.items()}


_WIDER = {torch.float32: torch.float64, torch.float64: torch.float64}


def all_finite(rounded: Tensor, stats: Tensor) -> Tensor:
    """Return (B,) whether one level as fp16 has it (B, T, D) and its statistics (B, T, 2) hold
    finite values only; stays on the device.

    By sums that cannot overflow: what is not finite stays in a sum, and one pass makes no mask of
    the size of it all.
    """
    values = [each.flatten(1) for each in (rounded, stats)]
    sums = [each.sum(1, dtype=_WIDER.get(each.dtype, torch.float32)) for each in values]
    return torch.stack([torch.isfinite(each) for each in sums]).all(0)
