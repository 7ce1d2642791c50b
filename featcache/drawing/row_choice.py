"""Rows of a cache are chosen: by key, by number, or by a seed; a key that is not there is answered
with near ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from featcache import rng
from featcache.errors import UserError, counted, short
from featcache.reading.cache import Cache
from featcache.storage.indexed_keys import IndexedKeys
from featcache.storage.keys import Keys

_CANDIDATES = 2000  # keys that are compared letter by letter; each takes some 20 us
_LIKE = 4  # letters at either end that a candidate shares, where there are more keys than that


class Chosen(NamedTuple):
    """Names a row; `note` says what else its name could have meant."""

    row: int
    note: str = ""


def by_seed(count: int, rows: int, seed: int) -> list[int]:
    """Choose `count` of so many rows, ascending; all where there are fewer.

    >>> by_seed(3, 100, 0) == by_seed(3, 100, 0) != by_seed(3, 100, 1)
    True
    """
    return np.sort(rng.permutation(rows, seed, 0)[:count]).tolist() if rows else []


def by_keys(cache: Cache, keys: Sequence[str]) -> list[int]:
    """Return the rows of keys. Raises UserError for one that is not there."""
    for key in keys:
        if not _is_text(key):
            raise _unknown(cache, key)
    rows = cache.keys.find([*keys]).tolist()
    for key, row in zip(keys, rows, strict=True):
        if row < 0:
            raise _unknown(cache, key)
    return rows


def by_word(cache: Cache, word: str) -> Chosen:
    """Return the row whose key the word is, else the row of that number, from 0. Raises UserError
    where it is neither."""
    row = int(cache.keys.find([word])[0]) if _is_text(word) else -1
    number = int(word) if word.isascii() and word.isdigit() and len(word) < 19 else -1
    if row >= 0:
        note = (
            f"{word!r} is a key, and shown for that; row {number} is {cache.keys[number]!r}"
            if 0 <= number < len(cache) and number != row
            else ""
        )
        return Chosen(row, note)
    if number >= len(cache):
        raise UserError(
            f"row {number} of cache {str(cache.path)!r}: no key is called so, and it has "
            f"{counted(len(cache), 'row')}, 0 to {len(cache) - 1}; give one of these, or a key"
        )
    if number < 0:
        raise _unknown(cache, word)
    return Chosen(number)


def _unknown(cache: Cache, key: str) -> UserError:
    """Say what is known of a key without a row, and which keys are near."""
    where = f"cache {str(cache.path)!r}"
    for row in cache.quarantined:
        if row["key"] == key:
            return UserError(
                f"key {short(key)} of {where} is in quarantine ({row['reason']}): its picture was "
                "not extracted; give another key"
            )
    close = near_keys(cache.keys, key)
    hint = f"did you mean {' or '.join(map(short, close))}?" if close else "no key is like it;"
    absent = f" ({len(cache.absent)} of its shards are absent)" if cache.absent else ""
    return UserError(
        f"key {short(key)} is not in {where}, which has "
        f"{counted(len(cache), 'row')}{absent}; {hint} give a "
        "key as extraction wrote it (the path below SRC without its last suffix), or a row's number"
    )


def near_keys(keys: Keys | IndexedKeys, given: str) -> list[str]:
    """Return up to three keys that are most like the given one, a name with its suffix first."""
    plain = str(PurePosixPath(given).with_suffix("")) if PurePosixPath(given).name else given
    if plain != given and _is_text(plain) and keys.find([plain])[0] >= 0:
        return [plain]
    given = given[:200]
    last = given.rpartition("/")[2]
    head, end = given[:_LIKE].lower(), last[-_LIKE:].lower()
    few = len(keys) <= _CANDIDATES
    candidates: list[str] = []
    for key in keys:
        if len(candidates) == _CANDIDATES:
            break
        if few or key[-_LIKE:].lower() == end or (last and key.endswith(last)):
            candidates.append(key)
    if not candidates:
        candidates = [key for key in keys[: 50 * _CANDIDATES] if key[:_LIKE].lower() == head]
    return difflib.get_close_matches(given, candidates[:_CANDIDATES], n=3, cutoff=0.6)


def _is_text(word: str) -> bool:
    """Return whether a word can be a key: bytes of a command line that are no text cannot."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
