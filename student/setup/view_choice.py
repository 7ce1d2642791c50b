"""A run shows those views of a cache whose crop has the area that the recipe was published with, or
that was asked for.

A cache of wider crops than the recipe's serves by rejection (`reading.crop_range`). One of narrower
crops cannot: given by hand it is used as it is, and the run says so.

n training pictures, V stored views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.catalog import extract_command
from featcache.errors import UsageError, UserError, counted
from featcache.reading import crop_range
from featcache.reading.cache import Cache
from featcache.reading.crop_range import LEFT_OUT, Scale, ViewSchedule

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
SHAPE_STEP = 0.1  # of the logarithm of height / width: pictures within it are alike
MOST_VIEWS = 64  # no more are proposed
NAMED = 1000  # pictures that are left out, by name in a run's record; a screen has five


@dataclass(frozen=True)
class ViewSelection:
    """The selection holds the training pictures, and which of their views are shown."""

    pictures: I64  # (n,) indices in the source
    rows: I64  # (n,) in the cache
    schedule: ViewSchedule | None = None  # None: all stored views
    notes: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)  # for config.json


def choose_views(
    cache: Cache,
    pictures: I64,
    rows: I64,
    published: Scale,
    wanted: Scale | None = None,
    most_left_out: float = LEFT_OUT,
) -> ViewSelection:
    """Choose the views in the `wanted` range, or in the `published` one where none is asked for and
    the cache holds it."""
    stored = _stored(cache)
    _check(wanted, stored)
    scale = wanted or (published if crop_range.is_within(published, stored) else stored)
    notes = [_departure(scale, published)] if scale != published else []
    if scale == stored:
        return ViewSelection(pictures, rows, notes=tuple(notes))
    accepted = crop_range.accepted_views(cache, rows, scale)
    left_out = crop_range.keys_without_view(accepted, cache.keys, rows)
    if left_out and (len(left_out) / len(rows) > most_left_out or len(left_out) == len(rows)):
        raise _too_many(cache, rows, scale, accepted, left_out, most_left_out)
    notes += _shown_notes(scale, stored, accepted, left_out)
    kept = accepted.any(1)
    schedule = ViewSchedule.of(cache.keys.digests_of(rows[kept]), accepted[kept])
    record = {"scale": list(scale), "left_out": len(left_out), "left_out_first": left_out[:NAMED]}
    return ViewSelection(pictures[kept], rows[kept], schedule, tuple(notes), {"crops": record})


def _stored(cache: Cache) -> Scale:
    """The range of the areas of a cache's crops."""
    low, high = cache.identity["policy"]["scale"]
    return float(low), float(high)


def _shown_notes(scale: Scale, stored: Scale, accepted: Bool, left_out: Sequence[str]) -> list[str]:
    """accepted (n, V) -> what the user should know of the views that are shown."""
    shown = (
        f"crops of {_text(scale)} of the area are shown, {_text(stored)} are stored: "
        f"{accepted.mean():.1%} of the views"
    )
    if not left_out:
        return [shown]
    without = f"{_pictures(left_out)} have none of these and are left out: {_names(left_out)}"
    return [shown, without]


def _check(wanted: Scale | None, stored: Scale) -> None:
    if wanted is not None and not crop_range.is_within(wanted, stored):
        raise UsageError(
            f"--scale {wanted[0]:g},{wanted[1]:g}: the cache holds crops of {_text(stored)} of the "
            "area; allowed: a range within; give such a one, or extract another cache with this "
            "--scale"
        )


def _departure(scale: Scale, published: Scale) -> str:
    return f"crops of {_text(scale)} of the area; the recipe was published with {_text(published)}"


def _too_many(
    cache: Cache, rows: I64, scale: Scale, accepted: Bool, left_out: Sequence[str], allowed: float
) -> UserError:
    """The error counts the pictures without a view, and names three ways out."""
    share, stored = len(left_out) / len(accepted), _stored(cache)
    leave = (
        f"leave them out with --without-view {math.ceil(1000 * share) / 1000:g}, "
        if share < 1
        else ""
    )
    return UserError(
        f"{_pictures(left_out)} of {len(accepted)} ({share:.2%}) have no view with a crop of "
        f"{_text(scale)} of the area among their {cache.views}, the first is {left_out[0]!r}; "
        f"allowed: {allowed:.2%}; {leave}show all views with --scale "
        f"{stored[0]:g},{stored[1]:g}{_more_views(cache, rows, accepted, allowed)}"
    )


def _more_views(cache: Cache, rows: I64, accepted: Bool, allowed: float) -> str:
    """The command that adds as many views as leave out so few pictures, or half a picture where
    none may be; empty where that many are too many."""
    views = _views_needed(cache, rows, accepted, allowed)
    if views is None or extract_command.is_derived(cache.manifest):
        return ""
    options = extract_command.extract_options(cache.manifest, cache.levels, views)
    more = [*options, "--add", "--out", str(cache.path)]
    return f", or add views with: {extract_command.shell_line(more)}"


def _views_needed(cache: Cache, rows: I64, accepted: Bool, allowed: float) -> int | None:
    """accepted (n, V) -> how many views leave out no more than the allowed share.

    A large crop fits a long picture less often, so views are rejected by shape: of v views of a
    shape, all are with probability q^v, where q is the share that was.
    """
    sizes = cache.read(rows, 0, ("source_size",))["source_size"].astype(np.float64)
    shape = np.rint(np.abs(np.log(sizes[:, 0] / sizes[:, 1])) / SHAPE_STEP).astype(np.int64)
    counts = np.bincount(shape)
    rejected = np.bincount(shape, (~accepted).mean(1)) / np.maximum(counts, 1)
    wanted = max(allowed, 0.5 / len(rows)) * len(rows)
    tried = range(cache.views + 1, MOST_VIEWS)
    return next((v for v in tried if counts @ rejected**v <= wanted), None)


def _text(scale: Scale) -> str:
    return f"{scale[0]:g}-{scale[1]:g}"


def _pictures(keys: Sequence[str]) -> str:
    return "1 picture" if len(keys) == 1 else counted(len(keys), "picture")


def _names(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (
        f" and {len(keys) - 5} more, named in config.json" if len(keys) > 5 else ""
    )
