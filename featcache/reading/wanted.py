"""What a read asks of a cache's fields is checked, and completed by what the cache stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from featcache.errors import UsageError, near
from featcache.reading.read_plan import parts_of
from featcache.storage import checksums
from featcache.storage.keys import I64
from featcache.storage.part import Part
from featcache.storage.store import Array


class Stored(Protocol):
    """Says what a cache stores: see reading.cache.Cache."""

    arrays: dict[str, Array]
    _parts: list[Part]

    @property
    def fields(self) -> list[str]: ...
    @property
    def teachers(self) -> list[str]: ...
    def levels_of(self, teacher: str) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...


def check_request(cache: Stored, rows: I64, views: I64, fields: Sequence[str]) -> None:
    if rows.size and (rows.min() < 0 or rows.max() >= len(cache)):
        raise UsageError(f"read: rows must be numbers from 0 to {len(cache) - 1}")
    asked = set(views.tolist())
    for name in fields:
        if name not in cache.arrays:
            raise UsageError(f"read: unknown field {name!r}; {near(name, cache.fields)}")
        plain = name.rpartition("/")[2]
        held = {
            view
            for part in parts_of(cache._parts, name)
            if plain in part.arrays
            for view in part.view_numbers
        }
        if strange := asked - held:
            raise UsageError(
                f"read: view {min(strange)} of {name}: view must be from {min(held)} to {max(held)}"
            )


def wanted_levels(cache: Stored, name: str, levels: Sequence[int] | None) -> tuple[int, ...]:
    """Return the levels to read of a field: none of one that has no levels, whatever is asked
    for beside it."""
    teacher = parts_of(cache._parts, name)[0].teacher
    stored = cache.levels_of(teacher)
    has_levels = checksums.has_levels(cache.arrays[name])
    allowed = (
        stored if has_levels else {x for each in cache.teachers for x in cache.levels_of(each)}
    )
    for level in () if levels is None else levels:
        if level not in allowed:
            raise _level_error(cache, name, int(level), teacher)
    if not has_levels:
        return ()
    return stored if levels is None else tuple(map(int, levels))


def _level_error(cache: Stored, name: str, level: int, teacher: str) -> UsageError:
    others = [
        each
        for each in cache.teachers
        if level in cache.levels_of(each)
        and (each == cache.teachers[0] or f"{each}/feature_stats" in cache.arrays)
    ]
    elsewhere = (
        f" ({others[0]} has it: read the fields of each teacher in a call of their own)"
        if others
        else ""
    )
    return UsageError(
        f"read: level {level} of {name} is not stored; stored are "
        f"{list(cache.levels_of(teacher))}{elsewhere}"
    )


def wanted_tokens(cache: Stored, name: str, tokens: int | None) -> int:
    spec = cache.arrays[name]
    if not checksums.has_levels(spec):
        return 0
    if tokens is not None and not 1 <= tokens <= spec.item[1]:
        raise UsageError(f"read: tokens of {name} must be from 1 to {spec.item[1]}, {tokens} given")
    return tokens or spec.item[1]


def must_read_whole(cache: Stored, name: str, tokens: int) -> bool:
    """Return whether only whole levels have a checksum where some tokens are wanted."""
    spec = cache.arrays[name]
    if not checksums.has_levels(spec) or tokens == spec.item[1]:
        return False
    return (
        name.rpartition("/")[2] != "features"
        or "prefix_crc" not in parts_of(cache._parts, name)[0].arrays
    )
