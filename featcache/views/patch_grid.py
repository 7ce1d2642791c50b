"""A student sees a view in patches on its teacher's square grid, so the view's size must be a
multiple of the grid's."""

from __future__ import annotations

import math

from featcache.errors import counted


def patch_px(size: int, patches: int) -> int | None:
    """Return the pixels a side of a student's patch in views of `size` pixels a side; None where
    they cannot be cut into so many patches.

    >>> patch_px(224, 196), patch_px(224, 36), patch_px(96, 36), patch_px(224, 5)
    (16, None, 16, None)
    """
    side = math.isqrt(patches)
    return size // side if side * side == patches and size % side == 0 else None


def misfit(size: int, patches: int, input_px: int | None) -> str:
    """Say that views of `size` pixels cannot be cut into a teacher's patches, and which could, by
    the size of its own input; empty where they can.

    >>> misfit(224, 36, 96)
    "views of 224 pixels cannot be cut into the teacher's 6 x 6 patches (--size 96 can)"
    """
    if patch_px(size, patches) is not None:
        return ""
    side = math.isqrt(patches)
    grid = f"{side} x {side} patches"
    if side * side != patches:
        return (
            f"views of {size} pixels cannot be cut into the teacher's "
            f"{counted(patches, 'patch', 'patches')}, which are no square"
        )
    fits = input_px is not None and patch_px(input_px, patches) is not None
    other = input_px if fits else side * max(round(size / side), 1)
    return f"views of {size} pixels cannot be cut into the teacher's {grid} (--size {other} can)"
