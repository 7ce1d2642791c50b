"""A source of pictures gives keys in order, bytes on demand, and labels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, counted
from featcache.runtime.local_path import check_encoding

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])
ALLOWED = (
    "a folder of pictures (" + " ".join(sorted(SUFFIXES)) + "), "
    "webdataset tars as a path, a glob, a brace pattern ('train-{000000..000009}.tar') or such a "
    "URL (s3://bucket/train-{000..146}.tar), "
    "a tar of tars (ImageNet's), parquet files with a column of pictures, or an FFCV .beton; A::B "
    "names the pictures of both"
)


class PictureError(Exception):
    """One picture cannot be used; the text says why. Extraction quarantines it, training stops."""


class Source(Protocol):
    """Pictures by number: `keys` in source order, bytes on demand, labels (n,) int64 or None. Safe
    in threads. What it left out stands in `passed_over`, where a source has it."""

    @property
    def spec(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def classes(self) -> list[str] | None: ...


class Picture(Protocol):
    """A decoded picture, Pillow's or of a source's own pixel path: what `views.render` takes."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def check_keys(source: Source) -> None:
    """Raise UserError unless keys are unique UTF-8, and name a place below their source: they are
    names in the tars that we write."""
    odd = next((key for key in source.keys if not _is_utf8(key)), None)
    if odd is not None:
        check_encoding(odd, f"pictures {source.spec!r}: the name")
        raise UserError(f"pictures {source.spec!r}: the name {odd!a} is not UTF-8; rename the file")
    strange = next((key for key in source.keys if "\0" in key or ".." in key.split("/")), None)
    if strange is not None:
        raise UserError(
            f"pictures {source.spec!r}: the name {strange[:200]!r} leads out of its folder, or "
            "holds a NUL; rename the picture, or pack the set again"
        )
    check_double(source.spec, source.keys, lambda row: f"picture {row}")


def check_double(spec: str, keys: Sequence[str], name: Callable[[int], str]) -> None:
    """Raise UserError where two pictures have one key; it names the files that they are."""
    if len(set(keys)) == len(keys):
        return
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if (other := first.setdefault(key, row)) != row:
            raise UserError(
                f"pictures {spec!r}: the key {key[:200]!r} is used by two pictures, "
                f"{name(other)[-300:]!r} and {name(row)[-300:]!r}{_as_well(keys)}; a key is the "
                "path without its last suffix and must be unique: rename one of them"
            )


def _as_well(keys: Sequence[str]) -> str:
    """Count the pictures whose key another has, beside the one that a message names."""
    more = len(keys) - len(set(keys)) - 1
    told = counted(more, "more picture has", "more pictures have")
    return f" (and {told} the key of another)" if more else ""


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
