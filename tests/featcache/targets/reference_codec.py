"""A second implementation of the codecs q8, t4 and t3, written from their specification in numpy
float64: dense matrices for the rotation, Viterbi's search one value at a time for all tokens.

It shares no code with featcache, and is slow and plain. A state is a dict of arrays: `signs` (4, D)
of 1 and -1, `order` (4, D) of permutations, `table` (256,).

D width, k bits a value, b the largest power of two that divides D, T tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BITS = {"q8": 8, "t4": 4, "t3": 3}
TABLES = Path(__file__).parents[2] / "golden/codec_tables.json"

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
State = dict[str, npt.NDArray[Any]]


def table(name: str) -> npt.NDArray[np.float32]:
    """The 256 numbers of a codec, as they were fixed."""
    return np.array(json.loads(TABLES.read_text("utf-8"))[name], "f4")


def random_state(name: str, width: int, rng: np.random.Generator) -> State:
    """A state of random signs and permutations, by numpy."""
    return {
        "signs": rng.choice(np.array([-1, 1], "i1"), (4, width)),
        "order": np.stack([rng.permutation(width) for _ in range(4)]).astype("i4"),
        "table": table(name),
    }


def block(width: int) -> int:
    """The largest power of two that divides the width."""
    b = 1
    while width % (2 * b) == 0:
        b *= 2
    return b


def blocks_of_hadamard(width: int) -> F64:
    """The (D, D) matrix with Sylvester's H_b along its diagonal, D / b times."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < block(width):
        hadamard = np.kron([[1.0, 1.0], [1.0, -1.0]], hadamard)
    return np.kron(np.eye(width // len(hadamard)), hadamard)


def rotate(x: F64, state: State, turn: npt.ArrayLike = 0) -> F64:
    """(..., D) and turns (...) -> (..., D): b^2 times an orthogonal matrix."""
    matrix, turn = blocks_of_hadamard(x.shape[-1]), np.broadcast_to(turn, x.shape[:-1])
    x = rolled(x, turn % 64)
    for number, (signs, order) in enumerate(zip(state["signs"], state["order"], strict=True)):
        x = ((x * signs) @ matrix.T)[..., order]
        if number == 1:
            x = rolled(x, turn // 64)
    return x


def rotate_back(v: F64, state: State, turn: npt.ArrayLike = 0) -> F64:
    """The transpose of `rotate`, so that rotate_back(rotate(x)) is b^4 x."""
    matrix, turn = blocks_of_hadamard(v.shape[-1]), np.broadcast_to(turn, v.shape[:-1])
    for number in (3, 2, 1, 0):
        if number == 1:
            v = rolled(v, -(turn // 64))
        scattered = np.empty_like(v)
        scattered[..., state["order"][number]] = v
        v = (scattered @ matrix) * state["signs"][number]
    return rolled(v, -(turn % 64))


def rolled(x: F64, by: npt.NDArray[np.int64]) -> F64:
    """Each token (..., D) rolled by its number (...): what was at i is at i + by."""
    flat, numbers = x.reshape(-1, x.shape[-1]), np.ravel(by)
    rows = [np.roll(row, number) for row, number in zip(flat, numbers, strict=True)]
    return np.stack(rows).reshape(x.shape)


def windows(stream: U8, bits: int) -> npt.NDArray[np.int64]:
    """Streams (..., k D / 8) of bytes -> (..., D): the eight bits that end where a value ends."""
    flat = np.unpackbits(stream, axis=-1)
    flat = np.concatenate([np.zeros((*flat.shape[:-1], 8), np.uint8), flat], axis=-1)
    eights = np.lib.stride_tricks.sliding_window_view(flat, 8, axis=-1)[..., bits::bits, :]
    return eights @ (1 << np.arange(7, -1, -1))


def pack(codes: npt.NDArray[np.int64], bits: int) -> U8:
    """Codes (..., D) of k bits each -> their streams (..., k D / 8)."""
    spread = (codes[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1)


def search(u: F64, table: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int64]:
    """Values (T, D) -> codes (T, D) of the least sum of squared distances, by Viterbi's search.

    `cost[t, w]` is the least sum of a stream that ends in window w. The window w follows those
    whose last 8 - k bits are the first 8 - k of w.
    """
    tokens, width = u.shape
    ways, kept = 2**bits, 2 ** (8 - bits)
    cost = np.full((tokens, 256), np.inf)
    cost[:, 0] = 0
    came_from = np.empty((width, tokens, kept), np.int64)
    for i in range(width):
        before = cost.reshape(tokens, ways, kept)
        came_from[i] = before.argmin(1)
        distance = (u[:, i, None] - table.astype("f8")) ** 2
        cost = before.min(1).repeat(ways, axis=1) + distance
    codes = np.empty((tokens, width), np.int64)
    window = cost.argmin(1)
    for i in reversed(range(width)):
        codes[:, i] = window % ways
        first = window // ways
        window = came_from[i, np.arange(tokens), first] * kept + first
    return codes


def hashes(h: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Tokens (..., D) -> (...): the hash of what fp16 stores, from 0 to 4095."""
    patterns = np.ascontiguousarray(h.astype("<f2")).view("<u2").astype(object)
    totals = patterns.sum(-1)
    hashed = np.vectorize(lambda total: (int(total) * 2654435761) // 2**20 % 4096, [int])(totals)
    return np.asarray(hashed, np.int64)


def turns(h: npt.NDArray[Any], residual: F64, state: State) -> npt.NDArray[np.int64]:
    """(...): of four turns that begin with the hash, the one whose largest rotated value is
    smallest."""
    four = np.stack([(hashes(h) + 1237 * number) % 4096 for number in range(4)])
    largest = [np.abs(rotate(residual, state, each)).max(-1) for each in four]
    return np.take_along_axis(four, np.argmin(largest, 0)[None], 0)[0]


def with_turns(scale: F64, turn: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The float32 nearest to each scale of those whose lowest 12 bits are its turn; too small a
    scale is 0."""
    plain = scale.astype("<f4")
    above = plain.view("<u4").astype(np.int64) // 4096 * 4096 + turn
    every = np.stack([above - 4096, above, above + 4096])
    values = np.where(every > 0, every, 0).astype("<u4").view("<f4")
    distance = np.abs(values.astype("f8") - plain)
    nearest = np.take_along_axis(values, distance.argmin(0)[None], 0)[0]
    return np.where(plain < 2.0**-126, 0, nearest).astype("<f4")


def divided(
    h: npt.NDArray[Any], mean: npt.NDArray[Any], state: State
) -> tuple[F64, F64, npt.NDArray[np.int64]]:
    """The rotated residuals (..., D) divided by their root mean square, the rms (...) of the
    residuals of what fp16 stores, and their turns (...). A residual of zero stays zero."""
    residual = h.astype("f2").astype("f8") - mean
    turn = turns(np.broadcast_to(h, residual.shape), residual, state)
    rotated = rotate(residual, state, turn)
    size = np.sqrt(np.mean(rotated**2, axis=-1, keepdims=True))
    return rotated / np.where(size > 0, size, 1), np.sqrt(np.mean(residual**2, axis=-1)), turn


def encode(h: npt.NDArray[Any], mean: npt.NDArray[Any], state: State, bits: int) -> U8:
    """Tokens (..., D) and their means, of any shape that broadcasts -> (..., 4 + k D / 8) bytes."""
    u, rms, turn = divided(h, mean, state)
    codes = search(u.reshape(-1, u.shape[-1]), state["table"], bits).reshape(u.shape)
    codes[rms == 0] = 0
    stream = pack(codes, bits)
    v = state["table"].astype("f8")[windows(stream, bits)]
    scale = rms * (u**2).sum(-1) / np.where(rms > 0, (u * v).sum(-1), 1)
    scale = with_turns(scale, turn)
    head = np.ascontiguousarray(scale[..., None]).view(np.uint8)
    return np.concatenate([head, stream], axis=-1)


def decode(coded: U8, mean: npt.NDArray[Any], state: State, bits: int) -> F64:
    """Bytes (..., 4 + k D / 8) -> tokens (..., D)."""
    head = np.ascontiguousarray(coded[..., :4])
    scale, turn = head.view("<f4").astype("f8"), head.view("<u4")[..., 0].astype(np.int64) % 4096
    v = state["table"].astype("f8")[windows(coded[..., 4:], bits)]
    return mean + scale / block(v.shape[-1]) ** 2 * rotate_back(v, state, turn)


def predicted_error(
    h: npt.NDArray[Any], mean: npt.NDArray[Any], coded: U8, state: State, bits: int
) -> F64:
    """|h decoded - h|^2 / |h - mean|^2 of tokens that are not their mean, without decoding: that of
    the numbers found, by the scale that is stored, from the divided values."""
    u, rms, _ = divided(h, mean, state)
    v = state["table"].astype("f8")[windows(coded[..., 4:], bits)]
    scale = np.ascontiguousarray(coded[..., :4]).view("<f4").astype("f8")[..., 0] / rms
    return ((scale[..., None] * v - u) ** 2).sum(-1) / (u**2).sum(-1)
