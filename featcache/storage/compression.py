"""Chunks are compressed, for archives, as Zarr specifies it: by blosc, with zstd after bit-shuffle.

Normalised levels in half precision are close to random: about a tenth is saved of them. Pixels
shrink more.
"""

from __future__ import annotations

import struct
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.storage.store import COMPRESSIONS

LEVEL = 5
OVERHEAD = 16  # bytes that a chunk may grow by, and has at least: those of its header
_HEADER = struct.Struct("<4B3I")  # two versions, flags, item bytes; bytes, block, compressed bytes


def zarr_codec(name: str, item_bytes: int) -> dict[str, Any]:
    """Return the codec as Zarr's metadata states it."""
    assert name in COMPRESSIONS, name
    about = {"cname": "zstd", "clevel": LEVEL, "shuffle": "bitshuffle"}
    return {"name": name, "configuration": {**about, "typesize": item_bytes, "blocksize": 0}}


def _blosc() -> ModuleType:
    """Return blosc without threads of its own: they write the blocks of a chunk as they are done,
    obey BLOSC_* of the environment, and fail where no thread may be started."""
    from numcodecs import blosc

    blosc.use_threads = False
    return blosc


def encode(name: str, chunk: npt.NDArray[Any]) -> bytes:
    """Compress the bytes of an array. UserError where they do not come back: an archive may be all
    that is kept."""
    assert name in COMPRESSIONS, name
    blosc, plain = _blosc(), np.ascontiguousarray(chunk)
    coded: bytes = blosc.compress(plain, b"zstd", LEVEL, blosc.BITSHUFFLE)
    back = np.empty(plain.nbytes, np.uint8)
    if not decode(name, coded, back) or back.tobytes() != plain.tobytes():
        raise UserError(
            f"{name} does not give back what it compressed: memory may be at fault, or numcodecs "
            f"{version('numcodecs')}; run the same command again"
        )
    return coded


def decode(name: str, coded: bytes, out: npt.NDArray[np.uint8]) -> bool:
    """Fill `out` with what was compressed. False where it is no chunk of so many bytes: it comes
    from a stranger, and its header says how far the decompressor goes."""
    assert name in COMPRESSIONS, name
    if len(coded) < _HEADER.size:
        return False
    *_, size, _, coded_bytes = _HEADER.unpack_from(coded)
    if (size, coded_bytes) != (out.nbytes, len(coded)):
        return False
    if not size:
        return True
    try:
        _blosc().decompress(coded, out)
    except (RuntimeError, ValueError):
        return False
    return True
