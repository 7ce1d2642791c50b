"""A picture's file is known by a digest of its bytes, whatever its name and wherever it lies."""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 16


def file_digest(data: bytes) -> bytes:
    """Return the BLAKE2b-128 of a file's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
