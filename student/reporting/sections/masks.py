"""Masks of every kind on one view, at the runs' ratios: what a student would see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.drawing import pictures
from featcache.drawing.page import escape
from featcache.errors import UserError, counted
from student import masking
from student.reporting.contents import Contents
from student.reporting.reported_run import Mask
from student.reporting.sections import display
from student.reporting.shown_views import ShownViews

I64 = npt.NDArray[np.int64]
EXPLAINED = "Grey patches are hidden. Drawn as in a run's first epoch, from its seed and the key."


def section(contents: Contents) -> str:
    """Return a row for each ratio and grid that a run has: all masks, of which its own is
    named."""
    views, settings = contents.views, dict[Mask, list[str]]()
    for run in contents.runs:
        if run.mask is not None:
            settings.setdefault(replace(run.mask, name=""), []).append(run.name)
    if views is None or not settings:
        return ""
    view = display.resized(contents.backdrop[0])
    rows = [_row(contents, view, each) for each in settings]
    return f'<p class="muted">{escape(EXPLAINED)}</p>\n' + "\n".join(rows)


def _row(contents: Contents, view: npt.NDArray[np.uint8], wanted: Mask) -> str:
    assert contents.views is not None
    key, figures = contents.views.keys[0], []
    for name in masking.MASKS:
        mask = replace(wanted, name=name)
        own = [run.number for run in contents.runs if run.mask == mask]
        used = f" (run{'s' * (len(own) > 1)} {', '.join(map(str, own))})" if own else ""
        if lacking := lacks(contents.views, mask):
            contents.miss(f"mask {name}: {lacking}")
            continue
        try:
            shown = visible(contents.views, mask)[0]
        except UserError as error:  # blocks may not fit a small grid
            contents.miss(f"mask {name}: {error}")
            continue
        figures.append(display.figure(pictures.masked(view, shown), f"{name}{used}", key))
    count = wanted.grid**2
    title = (
        f"mask_ratio {wanted.ratio:g}: {wanted.visible} of "
        f"{counted(count, 'patch', 'patches')} of {key} are seen"
    )
    return display.row(title, figures)


def lacks(views: ShownViews, mask: Mask) -> str:
    """Say what of a cache a mask needs and the views do not have; empty where they have it."""
    fields = [name for name in masking.fields(mask.name) if _stored(views, name, mask) is None]
    if not fields:
        return ""
    grid = f"of {mask.grid} x {counted(mask.grid, 'patch', 'patches')}"
    return f"it is drawn by {fields[0]} {grid}: --cache CACHE with such a teacher"


def _stored(views: ShownViews, name: str, mask: Mask) -> npt.NDArray[Any] | None:
    rows = views.stored.get(name)
    return rows if rows is not None and rows.shape[1] == mask.grid**2 else None


def visible(views: ShownViews, mask: Mask) -> npt.NDArray[np.bool_]:
    """Return which patches (n, g, g) of the views a mask of epoch 0 shows. Raises UserError where
    it reads what is not there."""
    keep, _ = drawn(views, mask)
    return seen(keep, mask.grid)


def seen(keep: I64, grid: int) -> npt.NDArray[np.bool_]:
    """Return which patches (n, g, g) are those of ids (n, V)."""
    found = np.zeros((len(keep), grid**2), bool)
    np.put_along_axis(found, keep, True, 1)
    return found.reshape(-1, grid, grid)


def drawn(views: ShownViews, mask: Mask) -> tuple[I64, I64]:
    """Return ids_keep (n, V) and ids_masked (n, P - V) of the views in epoch 0."""
    rows = {name: _stored(views, name, mask) for name in masking.fields(mask.name)}
    return masking.draw(
        mask.name, digests=rng.key_digests(views.keys), seed=mask.seed, epoch=0,
        n_visible=mask.visible, n_patches=mask.grid**2, **rows,
    )  # fmt: skip
