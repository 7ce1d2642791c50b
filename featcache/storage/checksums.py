"""Every item has the crc32c of its stored bytes, so that a read can be checked by what it read.

Three arrays hold them, one number per (row, view) and column:

    row_crc     (L,)    of each level of `features`
    side_crc    (C,)    of each level of the other (L, T, ...) arrays, and of each other array whole
    prefix_crc  (T, L)  of the first token, the first two, ... of each level; in ranked caches only,
                        whose rows are read by prefixes: those of one length lie together

They are plain crc32c of the bytes, so anyone can compare them. What ties them to their rows is the
record, which knows the crc32c of the files that hold them: a reader compares those before it
believes a file's numbers.

n items (row, view), L levels, T tokens, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache.storage.store import Array

NAMES = ("row_crc", "side_crc", "prefix_crc")


def has_levels(spec: Array) -> bool:
    """Return whether an item is (L, T, ...), so that levels and tokens can be chosen from it."""
    return spec.dimensions[2:4] == ("level", "token")


def side_columns(arrays: Iterable[Array]) -> dict[str, int]:
    """Return the first column of each array in `side_crc`, sorted since a manifest keeps no order;
    under "" how many there are."""
    columns, end = {}, 0
    for spec in sorted(arrays, key=lambda spec: spec.name):
        if spec.name != "features" and spec.name not in NAMES:
            columns[spec.name] = end
            end += spec.item[0] if has_levels(spec) else 1
    return {**columns, "": end}


def checksum_arrays(arrays: list[Array], levels: int, tokens: int, *, ranked: bool) -> list[Array]:
    """Return the arrays that hold the checksums of `arrays`; a part of discrete tokens has no
    features."""
    row_view = ("row", "view")
    features = any(array.name == "features" for array in arrays)
    return [
        *([Array("row_crc", "<u4", (levels,), (*row_view, "level"))] if features else []),
        Array("side_crc", "<u4", (side_columns(arrays)[""],), (*row_view, "array")),
        *(
            [
                Array(
                    "prefix_crc",
                    "<u4",
                    (tokens, levels),
                    (*row_view, "prefix", "level"),
                    split=True,
                )
            ]
            if ranked and features
            else []
        ),
    ]


def compute_checksums(
    arrays: Iterable[Array], items: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[np.uint32]]:
    """Compute the checksum arrays that `arrays` declares from the items (n, *item) of all
    arrays."""
    specs = {spec.name: spec for spec in arrays}
    out: dict[str, npt.NDArray[np.uint32]] = {}
    if "features" in specs:
        features = np.ascontiguousarray(items["features"], specs["features"].dtype)
        out["row_crc"] = level_crcs(features)
        if "prefix_crc" in specs:
            out["prefix_crc"] = _prefixes(features)
    side = np.empty((len(next(iter(items.values()))), specs["side_crc"].item[0]), np.uint32)
    for name, first in side_columns(specs.values()).items():
        if name:
            values = np.ascontiguousarray(items[name], specs[name].dtype)
            parts = level_crcs(values) if has_levels(specs[name]) else level_crcs(values[:, None])
            side[:, first : first + parts.shape[1]] = parts
    return {**out, "side_crc": side}


def level_crcs(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Compute the crc32c (n, L) of each level's bytes in `values` (n, L, ...)."""
    out = np.empty(values.shape[:2], np.uint32)
    each = values.nbytes // max(out.size, 1)
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    for i in range(out.size):
        out.flat[i] = crc32c(flat[i * each : (i + 1) * each])
    return out


def _prefixes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """(n, L, T, ...) -> (n, T, L) running crc32c after each token."""
    out = np.empty(values.shape[:3], np.uint32)
    each = values.nbytes // max(out.size, 1)
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    tokens, crc = values.shape[2], 0
    for i in range(out.size):
        crc = crc32c(flat[i * each : (i + 1) * each], 0 if i % tokens == 0 else crc)
        out.flat[i] = crc
    return np.ascontiguousarray(out.swapaxes(1, 2))
