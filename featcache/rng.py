"""Randomness is a pure function of (seed, key, view, epoch).

Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11), vectorised in
numpy, keyed by the 128-bit BLAKE2b digest of a picture's key. The counter holds (block, view,
epoch, stream), where the stream word names what is drawn and carries the seed. Nothing else enters:
not the worker, the batch, the shard or the world size. Library distributions change between
versions, so words become floats by our own conversion.

Shapes: n keys, W words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def key_digests(keys: Iterable[str]) -> U64:
    """Return two words (n, 2) a key: BLAKE2b-128 of its UTF-8 bytes, little-endian."""
    blob = bytearray()  # which grows by 16 bytes a key, where a list of digests takes 57
    for key in keys:
        blob += hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.frombuffer(blob, "<u8").reshape(-1, 2).astype(np.uint64)


def stream(purpose: str, seed: int) -> np.uint64:
    """Return the counter word that separates what is drawn (`crop`, `mask`, ...) and under which
    seed."""
    digest = hashlib.blake2b(f"{purpose}:{int(seed)}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mul_high_low(a: np.uint64, b: U64) -> tuple[U64, U64]:
    """High and low 64 bits of the 128-bit product, from four 32-bit partial products."""
    a_hi, a_lo = a >> _32, a & _LOW
    b_hi, b_lo = b >> _32, b & _LOW
    low = a_lo * b_lo
    mid = a_hi * b_lo + (low >> _32)
    cross = a_lo * b_hi + (mid & _LOW)
    return a_hi * b_hi + (mid >> _32) + (cross >> _32), a * b


def philox(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> U64:
    """Run ten Philox4x64 rounds over arrays of counters and keys of equal shape; returns shape
    (..., 4)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):
        for _ in range(10):
            hi0, lo0 = _mul_high_low(_M0, c0)
            hi1, lo1 = _mul_high_low(_M1, c2)
            c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
            k0, k1 = k0 + _W0, k1 + _W1
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(
    digests: U64,
    stream_word: np.uint64,
    count: int,
    *,
    view: int | npt.ArrayLike = 0,
    epoch: int | npt.ArrayLike = 0,
) -> U64:
    """Return random words (n, count) for n keys. `view` and `epoch` are one number or one per
    key."""
    n, blocks = len(digests), -(-count // 4)
    shape = (n, blocks)
    block = np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape)
    views = np.broadcast_to(np.asarray(view, np.uint64).reshape(-1, 1), shape)
    epochs = np.broadcast_to(np.asarray(epoch, np.uint64).reshape(-1, 1), shape)
    streams = np.broadcast_to(stream_word, shape)
    keys = (np.broadcast_to(digests[:, :1], shape), np.broadcast_to(digests[:, 1:], shape))
    return philox((block, views, epochs, streams), keys).reshape(n, 4 * blocks)[:, :count]


def uniform(raw: U64) -> F64:
    """Return floats in [0, 1): the top 53 bits of each word."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def open_uniform(raw: U64) -> F64:
    """Return floats in (0, 1), safe under a logarithm: the top 52 bits of each word and a half."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def below(raw: U64, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return integers in [0, bound); the bias for bounds under 2**20 is below 2**-32."""
    return np.floor(uniform(raw) * np.asarray(bound)).astype(np.int64)


def permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of n rows in an epoch: the stable argsort of n words."""
    digest = key_digests([f"rows:{n}"])
    raw = words(digest, stream("order", seed), n, epoch=epoch)[0]
    return np.argsort(raw, kind="stable")


def exponentials(raw: U64) -> F64:
    """Return draws of Exp(1), one a word."""
    return -np.log(open_uniform(raw))


def race(weights: npt.ArrayLike, raw: U64) -> npt.NDArray[np.int64]:
    """Order by an exponential race, (n, P) weights and (n, P) words -> (n, P), so that for every m
    the first m entries are drawn without replacement in proportion to the weights (METHODS 0.3:
    top-k of log p - log e, e exponential).

    Zeros are legal and come last, in index order.
    """
    return finish_order(exponentials(raw), np.asarray(weights, np.float64))


def finish_order(drawn: Any, weights: Any) -> Any:
    """Order by the race of exponentials (n, P) float64 and weights (n, P) -> (n, P), arrays or
    tensors: j finishes at e_j / w_j.

    A division and a stable sort are exact everywhere, so that a GPU gives the order of the host. A
    logarithm is not, which is why the exponentials are drawn on the host.
    """
    with np.errstate(divide="ignore", over="ignore"):
        return (drawn / abs(weights)).argsort(stable=True)  # abs: a zero may be negative
