"""A list of keys is known by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def keys_digest(keys: Iterable[str]) -> str:
    """Return the BLAKE2b-128 of the keys in order, each ended by a newline. Newlines within a key
    become a byte that UTF-8 does not have, so that no two lists are hashed as the same bytes."""
    hasher = hashlib.blake2b(digest_size=16)
    for key in keys:
        hasher.update(key.encode().replace(b"\n", b"\xff") + b"\n")
    return hasher.hexdigest()
