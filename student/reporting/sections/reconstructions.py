"""What students that predict pixels make of hidden patches.

n views, M hidden patches, p pixels a side of a patch, C = p * p * 3, S pixels a side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.drawing import pictures
from featcache.drawing.page import escape
from student.models import losses, vit
from student.reporting.contents import Contents
from student.reporting.reported_run import Mask, ReportedRun
from student.reporting.sections import display, masks
from student.reporting.shown_views import ShownViews

U8 = npt.NDArray[np.uint8]
EXPLAINED = (
    "Visible patches are the picture's own, hidden ones are predicted. With norm_pix a student "
    "predicts each patch without its mean and contrast: these are taken from the true patch."
)


def section(contents: Contents) -> str:
    """Return a row for each view: the view, and what each student sees and predicts of it."""
    views = contents.views
    if views is None:
        return ""
    parts = [made for run in contents.runs if (made := _of_run(run, views)) is not None]
    if not parts:
        return ""
    rows = []
    for i, key in enumerate(views.keys):
        figures = [display.figure(display.resized(contents.backdrop[i]), "the view", key)]
        rows.append(display.row(key, [*figures, *(each for part in parts for each in part[i])]))
    return f'<p class="muted">{escape(EXPLAINED)}</p>\n' + "\n".join(rows)


def _of_run(run: ReportedRun, views: ShownViews) -> list[list[str]] | None:
    """Return two figures for each view; None of a run that predicts no pixels."""
    pixels = views.pixels(run.img_size) if hasattr(run.model, "reconstruct") else None
    if pixels is None:
        return None
    if run.mask is None:
        run.missing.append("reconstructions: its config.json says of no mask that it has one")
        return None
    mask, note = _possible(run.mask, views)
    ids = masks.drawn(views, mask)
    made = reconstruct(run, pixels, ids)
    if made is None:
        return None
    seen = masks.seen(ids[0], mask.grid)
    hidden = [
        pictures.masked(display.resized(each), own) for each, own in zip(pixels, seen, strict=True)
    ]
    return [
        [
            display.figure(hidden[i], f"run {run.number} sees{note}", key),
            display.figure(display.resized(made[i]), f"run {run.number} predicts", key),
        ]
        for i, key in enumerate(views.keys)
    ]


def _possible(mask: Mask, views: ShownViews) -> tuple[Mask, str]:
    """Return the run's own mask; a uniform one where the cache has not what that reads."""
    if not masks.lacks(views, mask):
        return mask, ""
    return replace(mask, name="uniform"), f" (uniform, in place of {mask.name})"


def reconstruct(run: ReportedRun, pixels: U8, ids: tuple[Any, Any]) -> U8 | None:
    """Return views (n, S, S, 3) whose hidden patches are predicted; None of a model that predicts
    no pixels."""
    images = run.images(pixels)
    keep, masked = (torch.from_numpy(each) for each in ids)
    model: Any = run.model
    with torch.no_grad():
        predicted = model.reconstruct({"images": images, "ids_keep": keep, "ids_masked": masked})
    if predicted is None:
        return None
    if run.settings.get("norm_pix", True):
        predicted = restored(predicted, vit.gather_patches(images, masked, run.patch_px))
    filled = fill(images, predicted, masked, run.patch_px)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in run.pixel_stats)
    levels = ((filled * std + mean) * 255).round().clamp(0, 255).byte()
    made: U8 = levels.permute(0, 2, 3, 1).numpy()
    shown = masks.seen(ids[0], run.grid).repeat(run.patch_px, 1).repeat(run.patch_px, 2)
    made[shown] = pixels[shown]  # what is seen, bit for bit
    return made


def restored(predicted: Tensor, patches: Tensor) -> Tensor:
    """Give predictions (n, M, C) the mean and the std (unbiased, eps 1e-6) of the true patches:
    the inverse of `losses.norm_pix`."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True, unbiased=True)
    return predicted * (variance + losses.NORM_PIX_EPS).sqrt() + mean


def fill(images: Tensor, patches: Tensor, ids: Tensor, patch_px: int) -> Tensor:
    """Put patches (n, M, C), each (row, column, channel), in the places ids (n, M) of images
    (n, 3, S, S): the inverse of `vit.gather_patches`."""
    filled = images.clone()
    cells = filled.unflatten(2, (-1, patch_px)).unflatten(4, (-1, patch_px))  # (n,3,G,p,G,p)
    cells = cells.permute(0, 2, 4, 3, 5, 1)  # a view into `filled`
    cols, picture = cells.shape[2], torch.arange(len(ids)).unsqueeze(1)
    cells[picture, ids // cols, ids % cols] = patches.unflatten(2, (patch_px, patch_px, 3))
    return filled
