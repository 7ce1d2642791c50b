"""Make arrays, items and keys that a store must give back, and look at what it wrote.

n rows, V views.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from featcache.storage.store import Array

SHARD = "000000"
DTYPES = ["<f2", "<f4", "|u1", "<u2", "<u4", "<i4", "<u8"]
ARRAYS = [
    Array("features", "<f2", (2, 3, 4), ("row", "view", "level", "token", "channel"), split=True),
    Array("attention", "<f4", (2,), ("row", "view", "patch")),
    Array("flip", "|u1", (), ("row", "view")),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
]
ODD_KEYS = [
    "n01/plain",
    "ünïcödé/日本語/🦆",
    "a.b/c.d.e",
    "deep/er/and/deep/er",
    "x" * 230,
    "100%2E",
    "",
    "line\nbreak",
]
ODD_KEYS += ["folder-" * 30 + "/" + "y" * 90, " spaces  in and around "]
STATISTICS: dict[str, dict[str, float]] = {
    "features": {"min": -1.5, "max": 2, "non_finite": 0, "norm": 3.25},
    "flip": {"min": 0, "max": 1},
}


def numbers(arrays: Sequence[Array], rows: int, views: int, seed: int = 0) -> dict[str, np.ndarray]:
    """(n, V, *item) or (n, *item) of every array, any finite bytes."""
    random = np.random.default_rng(seed)
    out = {}
    for array in arrays:
        shape = (rows, *([views] if array.per_view else []), *array.item)
        low, high = (-99, 99) if np.dtype(array.dtype).kind in "fi" else (0, 99)
        out[array.name] = random.integers(low, high, shape).astype(array.dtype)
    return out


def as_items(
    arrays: Sequence[Array], data: Mapping[str, np.ndarray], views: int
) -> dict[str, np.ndarray]:
    """(n * V, *item) of every array. Of arrays that are not per view, later views hold numbers that
    must not count."""
    out = {}
    for array in arrays:
        values = data[array.name]
        if not array.per_view:
            values = np.stack([values, *[values + 1] * (views - 1)], 1)
        out[array.name] = values.reshape(-1, *array.item)
    return out


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def dead_process() -> int:
    """The number of a process that has ended."""
    code = "import os; print(os.getpid())"
    return int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
