"""The codecs' names, and what each stores of a token, for those who need no tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from featcache.errors import UsageError, UserError, near

# name -> (numpy dtype, item, dimension names)
ArrayForms = dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]

SCALE_BYTES = 4  # of a token whose codec has a scale
SMALLEST_BLOCK = 64  # what a token's outliers are spread over at once
LOSSLESS = "fp16"  # it has no state, and what every other one encodes


def fp16_arrays(width: int) -> ArrayForms:
    """Return the one array that half precision needs."""
    return {"features": ("<f2", (width,), ("channel",))}


def token_bytes(width: int, bits: int) -> int:
    """Count the bytes of a token: 4 + D k / 8.

    >>> token_bytes(768, 3)
    292
    """
    return SCALE_BYTES + width * bits // 8


def trellis_arrays(bits: int, width: int) -> ArrayForms:
    """Return the one array of bytes. Raises UserError for a width that no rotation is known for."""
    if width % SMALLEST_BLOCK:
        raise UserError(
            f"a codec that rotates its tokens needs a width that {SMALLEST_BLOCK} divides, the "
            f"teacher has {width}; store fp16: --codec fp16"
        )
    return {"features": ("|u1", (token_bytes(width, bits),), ("byte",))}


# named functions: spawned workers get codecs by pickle
ARRAYS: dict[str, Callable[[int], ArrayForms]] = {
    LOSSLESS: fp16_arrays,
    "q8": partial(trellis_arrays, 8),
    "t4": partial(trellis_arrays, 4),
    "t3": partial(trellis_arrays, 3),
}
NAMES = tuple(ARRAYS)


def check(name: str) -> None:
    """Raise UsageError for a name that --codec does not take."""
    if name not in NAMES:
        raise UsageError(f"--codec {name!r}: {near(name, NAMES)}")
