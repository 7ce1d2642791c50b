"""A seeded orthogonal matrix spreads a token over all channels, so that its values are near normal
numbers whatever the outlier channels.

`ROUNDS` times: signs, Hadamard blocks, a permutation. A block is as wide as the largest power of
two that divides the width D. The blocks are not normalised: `rotate` multiplies by the orthogonal
matrix and by `gain`, and so does `rotate_back`, by the transposed matrix. There are additions and
changes of sign only, in a fixed order, so that every device gives the same bits, whatever the
batch. Before the first round and after the second the channels are turned by some places, so that
a token may choose among `TURNS` squared matrices.

N tokens, R rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from featcache import rng

ROUNDS = 4
TURNS = 64  # before the first round, and as many after the second: 4,096 matrices of one state


def block_width(width: int) -> int:
    """Return the width of a Hadamard block, the largest power of two that divides the width.

    >>> [block_width(width) for width in (768, 1024, 1408)]
    [256, 1024, 128]
    """
    return width & -width


def gain(width: int) -> int:
    """Return the factor by which `rotate` lengthens a token: a power of two.

    >>> gain(768) == 256**2
    True
    """
    return block_width(width) ** (ROUNDS // 2)


def draw(width: int, seed: int) -> dict[str, Tensor]:
    """Draw `signs` (R, D) of 1 and -1 as int8, and `order` (R, D) int32, the permutations."""
    digest = rng.key_digests([f"width:{width}"])
    signs, order = (
        np.concatenate(
            [rng.words(digest, rng.stream(what, seed), width, view=i) for i in range(ROUNDS)]
        )
        for what in ("rotation signs", "rotation order")
    )
    return {
        "signs": torch.from_numpy(1 - 2 * (signs >> np.uint64(63)).astype(np.int8)),
        "order": torch.from_numpy(np.argsort(order, axis=1, kind="stable").astype(np.int32)),
    }


def rotate(x: Tensor, state: Mapping[str, Tensor], turns: Tensor) -> Tensor:
    """Rotate tokens (N, D) float32, each by the matrix of its number (N,) in `turns`."""
    x = _turned(x, -(turns % TURNS))
    for number, (signs, order) in enumerate(zip(state["signs"], state["order"], strict=True)):
        x = _hadamard(x * signs)[:, order.long()]
        if number == ROUNDS // 2 - 1:
            x = _turned(x, -(turns // TURNS))
    return x


def rotate_back(x: Tensor, state: Mapping[str, Tensor], turns: Tensor) -> Tensor:
    """Rotate tokens (N, D) float32 by the transposed matrices."""
    for number in range(ROUNDS - 1, -1, -1):
        if number == ROUNDS // 2 - 1:
            x = _turned(x, turns // TURNS)
        signs, order = state["signs"][number], state["order"][number]
        x = _hadamard(torch.empty_like(x).index_copy_(1, order.long(), x)) * signs
    return _turned(x, turns % TURNS)


def _turned(x: Tensor, places: Tensor) -> Tensor:
    """Turn the channels of tokens (N, D): channel i becomes that at i + places (N,)."""
    at = torch.arange(x.shape[1], device=x.device) + places[:, None]
    return x.gather(1, at % x.shape[1])


def _hadamard(x: Tensor) -> Tensor:
    """Transform each block of (N, D), not normalised."""
    (n, width), half = x.shape, 1
    while half < block_width(width):
        a, b = x.reshape(n, -1, 2, half).unbind(2)
        x = torch.stack((a + b, a - b), 2)
        half *= 2
    return x.reshape(n, width)
