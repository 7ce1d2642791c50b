"""A transform of a dataset's pictures is tried on pictures of our own: one that moves pixels would
part them from their targets.

Two pictures are equal but for one block, in which two values have changed places, so that their
histograms agree. Both go through the transform with the same random numbers. Then the outputs
differ where the block has come to:

    in the block, or in a part of it               colours, normalisation, noise, erasing
    around it too, alike on opposite sides         blur, sharpness
    beside it, and not on the opposite side        flips, crops, rotations, shifts

Random transforms are tried with many numbers. S pixels a side.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featcache.errors import UsageError

TRIES = 64  # what happens to one picture in ten is missed once in 850
# Rows and columns of the block's middle, in parts of S: no flip and no quarter turn brings one of
# these places near itself.
PLACES = ((0.19, 0.37), (0.37, 0.81), (0.81, 0.63), (0.63, 0.19))
DARK, BRIGHT = 40, 200
LOUD = 0.75  # of the largest difference: blur leaves half of it at the block's edge
FEW = 0.03  # of the block's pixels, that may be loud beside it
LEAST_PX = 32  # blocks of smaller pictures are of few pixels

Transform = Callable[[Tensor], Any]
Values = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


def check_transform(transform: Transform, size: int) -> None:
    """Raise UsageError where a transform changes the size of a view (3, S, S), or moves its pixels.

    Looked at is what gives one picture, a tensor, an array or a PIL image, and repeats itself with
    the same state of the generators of torch, numpy and Python, which are put back, or as a copy of
    itself. Anything else passes, and so does what fails here, as it will where it is used. Views of
    fewer than 32 pixels are not looked at. Too much is refused where a wide blur is partly erased
    afterwards.
    """
    with _generators_kept():
        own = _copied(transform)
        for number in range(TRIES if size >= LEAST_PX else 0):
            found = _try(own, size, number)
            if found is None:
                return
            if found:
                raise UsageError(
                    f"Dataset: the transform {found}, and targets belong to the places of the "
                    "pixels that the teacher saw; allowed: what changes colours alone; crops and "
                    "flips are drawn by `featcache extract` (--views, --scale, --flip), and "
                    "check_transform=False leaves this check out"
                )


def _try(transform: Transform, size: int, number: int) -> str | None:
    """Say what a transform does to the pixels with one set of random numbers; empty for nothing,
    None where it cannot be told."""
    one, other, block = _pictures(size, PLACES[number % len(PLACES)])
    again, twin = _copied(transform), _copied(transform)
    outputs = []
    for each, picture in ((twin, one), (again, one), (transform, other)):
        _seed(number)
        try:
            outputs.append(_picture(each(picture.clone())))
        except Exception:
            return None
    first, repeated, marked = outputs
    if first is None or repeated is None or marked is None:
        return None
    if first.shape[:2] != (size, size):
        return f"makes {first.shape[0]} x {first.shape[1]} of {size} x {size} pixels"
    if first.shape != marked.shape or not np.array_equal(first, repeated, equal_nan=True):
        return None
    return "moves pixels" if _moved(np.abs(first - marked).sum(2), block) else ""


def _moved(change: Values, block: Bool) -> bool:
    """Tell whether the change (S, S) of the outputs lies beside the block (S, S)."""
    largest = np.nan_to_num(change).max()
    if not largest > 0:  # erased
        return False
    loud = change > LOUD * largest
    beside = loud & ~block & ~_turned(loud, block)
    few = FEW * block.sum()
    if (beside & ~_grown(block)).sum() > few:
        return True
    # Near it: a shift, unless little more than a blurred edge is left of an erased block.
    return bool((change[block] > 0).mean() >= 0.2 and beside.sum() > few)


def _turned(loud: Bool, block: Bool) -> Bool:
    """Turn (S, S) by half a turn about the block's middle."""
    out = np.zeros_like(loud)
    rows, columns = (2 * each.min() + np.ptp(each) - np.argwhere(loud)[:, axis]
                     for axis, each in enumerate(np.nonzero(block)))  # fmt: skip
    inside = (rows >= 0) & (rows < len(out)) & (columns >= 0) & (columns < len(out))
    out[rows[inside], columns[inside]] = True
    return out


def _pictures(size: int, place: tuple[float, float]) -> tuple[Tensor, Tensor, Bool]:
    """Return two pictures (3, S, S) uint8 of all values, whose block has its halves exchanged, and
    the block (S, S)."""
    y, x = np.mgrid[:size, :size] * (2 * np.pi / size)
    waves = np.stack([np.sin(x + 2 * y), np.sin(3 * x - y + 1), np.cos(2 * x + 3 * y)])
    plain = np.rint(127.5 + 127.5 * waves).astype(np.uint8)
    half = size // 16
    top, left = (round(part * size) - half for part in place)
    block = np.zeros((size, size), bool)
    block[top : top + 2 * half, left : left + 2 * half] = True
    pair = []
    for values in ((DARK, BRIGHT), (BRIGHT, DARK)):
        picture = plain.copy()
        picture[:, top : top + 2 * half, left : left + half] = values[0]
        picture[:, top : top + 2 * half, left + half : left + 2 * half] = values[1]
        pair.append(torch.from_numpy(picture))
    return pair[0], pair[1], block


def _grown(block: Bool) -> Bool:
    """Grow the block (S, S) by its side."""
    margin = len(block) // 8
    rows, columns = (np.flatnonzero(block.any(axis)) for axis in (1, 0))
    out = np.zeros_like(block)
    out[
        max(0, rows[0] - margin) : rows[-1] + margin + 1,
        max(0, columns[0] - margin) : columns[-1] + margin + 1,
    ] = True
    return out


def _picture(output: Any) -> Values | None:
    """Return one picture (H, W, C) of what a transform gave; None where it is none."""
    if isinstance(output, Tensor):
        array = output.detach().cpu().to(torch.float64).numpy()
        array = array[None] if array.ndim == 2 else array
        return np.moveaxis(array, 0, 2) if array.ndim == 3 else None
    if isinstance(output, Image.Image | np.ndarray):
        array = np.asarray(output, np.float64)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3:
            return None
        return array if array.shape[2] <= 4 else np.moveaxis(array, 0, 2)
    return None


def _copied(transform: Transform) -> Transform:
    """Copy a transform with its own generators; itself where it cannot be copied."""
    try:
        return copy.deepcopy(transform)
    except Exception:
        return transform


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  # the global generator, which transforms draw from
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the global generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
