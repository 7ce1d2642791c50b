"""A view's pixels are known by a hash and a thumbnail."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

THUMBNAIL = 14


def pixel_hash(pixels: npt.NDArray[np.uint8]) -> int:
    """Return the 64-bit BLAKE2b of a view rendered at the policy's size: the proof that training
    sees what the teacher saw."""
    return int.from_bytes(
        hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "little"
    )


def thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Reduce (S, S, 3) to (14, 14, 3): rounded means of a 14 x 14 grid of blocks; blocks share an
    edge where 14 does not divide S. From it the size of a difference is told when a hash does not
    match."""
    size = len(pixels)
    sums = np.zeros((size + 1, size + 1, 3), np.int64)
    sums[1:, 1:] = pixels.astype(np.int64).cumsum(0).cumsum(1)
    low = np.arange(THUMBNAIL) * size // THUMBNAIL
    high = -(-(np.arange(THUMBNAIL) + 1) * size // THUMBNAIL)
    total = sums[high][:, high] - sums[low][:, high] - sums[high][:, low] + sums[low][:, low]
    count = ((high - low)[:, None] * (high - low))[..., None]
    return ((total + count // 2) // count).astype(np.uint8)
