"""One record of a cache, a row with some of its views, is told as plain data; and drawn as one
picture, a view in each line.

What cannot be read is told in `problems`, and the rest stands. T tokens, D width, P = g * g
patches, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.drawing.level_colours import fit_levels
from featcache.drawing.panels import Panel, target_panels, view_panel
from featcache.drawing.pictures import Pixels, smallest_set
from featcache.drawing.sheet import compose
from featcache.drawing.stored_view import StoredView, TeacherReader, read_drawn
from featcache.drawing.view_pixels import Pictures
from featcache.errors import UserError
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.views.render import jitter_factors

EPS = 1e-5  # of the stored standard deviation, sqrt(var + EPS)


def describe(cache: Cache, row: int, views: Sequence[int]) -> dict[str, Any]:
    """Return what a cache stores of some views of a row, every array of which is read and compared
    with its checksum."""
    readers = [TeacherReader(cache, teacher) for teacher in cache.teachers]
    problems: list[str] = []
    found = [_view(cache, readers, row, view, problems) for view in views]
    shard, at = _place(cache, row)
    return {
        "cache": str(cache.path),
        "id": cache.manifest["id"],
        "random_weights": [
            name for name in cache.teachers if manifest.is_random(cache.manifest_of(name))
        ],
        "key": cache.keys[row],
        "row": row,
        "rows": len(cache),
        "shard": shard,
        "row_of_shard": at,
        "stored_views": cache.views,
        "arrays": {
            name: {"dtype": spec.dtype, "shape": list(spec.item)}
            for name, spec in cache.arrays.items()
        },
        "views": found,
        "problems": list(dict.fromkeys(problems)),
    }


def _place(cache: Cache, row: int) -> tuple[str, int]:
    """Return the shard of a row, and its number there."""
    starts = cache.shard_starts
    shard = int(np.searchsorted(starts, row, side="right")) - 1
    return cache.shard_names[shard], row - int(starts[shard])


def _view(
    cache: Cache, readers: Sequence[TeacherReader], row: int, view: int, problems: list[str]
) -> dict[str, Any]:
    facts: dict[str, Any] = {"view": view}
    try:
        facts |= _drawn(read_drawn(cache, row, view))
    except UserError as error:
        problems.append(str(error))
    teachers = {}
    for reader in readers:
        if view < reader.views:
            stored = reader.read(row, view)
            problems += stored.problems
            teachers[reader.teacher] = _targets(stored)
    problems += _unread(cache, row, view, readers)
    return {**facts, "teachers": teachers}


def _drawn(about: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    return {
        "crop": about["crop"].tolist(),
        "source_size": about["source_size"].tolist(),
        "flip": bool(about["flip"]),
        "area": float(about["area"]),
        "jitter": jitter_factors(about["jitter"].tolist()),
    }


def _targets(stored: StoredView) -> dict[str, Any]:
    return {
        "attention": None if stored.attention is None else stored.attention.tolist(),
        # the fewest patches that hold half of it
        "half": None
        if stored.attention is None
        else int(smallest_set(stored.attention, 0.5).sum()),
        "mask_order": None if stored.order is None else stored.order.tolist(),
        "token_ids": None if stored.token_ids is None else stored.token_ids.tolist(),
        "levels": {
            str(level): {
                "shape": list(tokens.shape),
                "stored_tokens": int(np.isfinite(tokens).all(-1).sum()),
                "norm": _norms(np.linalg.norm(tokens.astype(np.float64), axis=-1)),
                "residual_norm": _norms(residual_norms(stored.stats.get(level), tokens.shape[-1])),
            }
            for level, tokens in stored.levels.items()
        },
    }


def residual_norms(
    stats: npt.NDArray[np.float32] | None, width: int
) -> npt.NDArray[np.float64] | None:
    """Return the norm (T,) of each token of the residual stream y, from its mean and std (T, 2):
    |y|^2 = D (mean^2 + var)."""
    if stats is None:
        return None
    mean, std = stats.astype(np.float64).T
    squares: npt.NDArray[np.float64] = width * (mean**2 + np.maximum(std**2 - EPS, 0))
    return np.sqrt(squares)


def _norms(norms: npt.NDArray[np.float64] | None) -> dict[str, float | None] | None:
    """Return the norm of [CLS], and what those of the patches (P,) are like; None of none."""
    if norms is None:
        return None
    known = norms[1:][np.isfinite(norms[1:])]
    first = float(norms[0]) if np.isfinite(norms[0]) else None
    if not len(known):
        return {"cls": first, "mean": None, "min": None, "max": None}
    return {
        "cls": first,
        "mean": float(known.mean()),
        "min": float(known.min()),
        "max": float(known.max()),
    }


def _unread(cache: Cache, row: int, view: int, readers: Sequence[TeacherReader]) -> Iterator[str]:
    """Read every array of a view, and yield what is wrong with it."""
    views = {reader.teacher: reader.views for reader in readers}
    for name in cache.fields:
        if view < views[name.rpartition("/")[0] or cache.teachers[0]]:
            try:
                cache.read([row], view, (name,))
            except UserError as error:
                yield str(error)


def draw(
    cache: Cache, row: int, views: Sequence[int], images: Pictures
) -> tuple[Pixels, list[str]]:
    """Draw a record, a view in each line, and say what of its pixels is not as it should be. Raises
    UserError where its boxes or thumbnails are damaged, or its picture cannot be decoded."""
    readers = [TeacherReader(cache, teacher) for teacher in cache.teachers]
    bases = {
        reader.teacher: fit_levels(reader, [(row, view) for view in views if view < reader.views])
        for reader in readers
    }
    picture, problems, lines = images.decode(cache.keys[row]), [], []
    for view in views:
        shown = images.view(row, view, picture, read_drawn(cache, row, view))
        problems += [shown.problem] if shown.problem else []
        line = [view_panel(shown)._replace(title=f"view {view}")]
        for reader in readers:
            if view < reader.views:
                stored = reader.read(row, view)
                drawn = target_panels(shown.pixels, stored, bases[reader.teacher])
                line += [_named(panel, reader) for panel in drawn]
        lines.append(line)
    return compose(lines), problems


def _named(panel: Panel, reader: TeacherReader) -> Panel:
    """Return a panel of an added teacher with its name."""
    return panel._replace(title=f"{panel.title}, {reader.teacher}") if reader.prefix else panel
