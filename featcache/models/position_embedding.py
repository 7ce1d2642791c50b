"""Learned positions are resized to another grid, and pictures are made smaller as MaskAlign does.

A teacher of 14-pixel patches sees 196 pixels where a student of 16-pixel patches sees 224: both
then have 14 x 14 patches, and the teacher's 16 x 16 positions are resized to 14 x 14. The mode is
part of what a cache is:

    bicubic            no antialias, align_corners False: MaskAlign's, Hugging Face's and our
                       default (METHODS 1.2)
    bilinear           no antialias: CAE v2's (METHODS 3.2)
    bicubic-antialias  what timm and open_clip do by themselves when they resize downwards
    tensor-bicubic     positions as `bicubic`, and the picture too is resized as a tensor: rendered
                       at the student's 224 pixels, normalised, then shrunk without antialias
                       (MaskAlign's whole path, METHODS 1.2)

T positions, D width, P patches of the new grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError, near
from featcache.models.architecture import MAX_PX
from featcache.models.contract import Option

MODES = ("bicubic", "bilinear", "bicubic-antialias", "tensor-bicubic")
STUDENT_PX = 224  # what MaskAlign renders for student and teacher alike


def rendered_px(what: str, mode: object, native: int, size: int) -> int:
    """Return the pixels to render where the tensor is then shrunk to `size`, 0 where it is rendered
    at `size` itself.

    An unknown mode, and one that would change nothing, are refused. `native`: the input size of the
    positions.
    """
    if mode is None:
        return 0
    if mode not in MODES:
        raise UsageError(f"teacher {what!r}: pos={mode!r}; {near(str(mode), MODES)}")
    if size == native or (mode == "tensor-bicubic" and size >= STUDENT_PX):
        raise UsageError(
            f"teacher {what!r}: pos={mode} resizes nothing, for its positions are those of "
            f"{native} pixels and {size} are asked for; leave pos out, or give another img_size or "
            "grid"
        )
    return STUDENT_PX if mode == "tensor-bicubic" else 0


def resize_positions(positions: Tensor, side: int, mode: str, prefix: int) -> Tensor:
    """Resize (1, prefix + T, D) to (1, prefix + side * side, D), T a square number.

    The first `prefix` positions belong to [CLS] and registers and stay. The grid is resized in
    float32 with align_corners False and keeps its dtype; only `bicubic-antialias` is antialiased.
    """
    from timm.layers import resample_abs_pos_embed  # costs timm's imports

    resized = resample_abs_pos_embed(
        positions,
        [side, side],
        num_prefix_tokens=prefix,
        interpolation="bilinear" if mode == "bilinear" else "bicubic",
        antialias=mode == "bicubic-antialias",
    )
    return resized.contiguous()  # without a prefix timm returns a transposed view


def shrink_pixels(pixels: Tensor, size: int) -> Tensor:
    """Shrink normalised pixels (B, 3, S, S) -> (B, 3, size, size): bicubic without antialias,
    values beyond the range kept."""
    return F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)


def grid_side(count: int, prefixes: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (side, prefix) of `count` positions, for the first prefix that leaves a square; None
    where none does.

    >>> grid_side(257, (1, 0)), grid_side(196, (1, 0)), grid_side(6, (1, 0))
    ((16, 1), (14, 0), None)
    """
    for prefix in prefixes:
        side = math.isqrt(max(count - prefix, 0))
        if side and side * side == count - prefix:
            return side, prefix
    return None


def resolve_input_px(
    name: str, options: Mapping[str, Option], patch: int, default: int | None
) -> int | None:
    """Return the input pixels by `img_size` or `grid`, or the default; None leaves the model's
    own."""
    asked = {key: options[key] for key in ("img_size", "grid") if key in options}
    if len(asked) == 2:
        raise UsageError(
            f"teacher {name!r}: img_size={asked['img_size']} and grid={asked['grid']}; give one of "
            "them"
        )
    for key, value in asked.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"teacher {name!r}: {key}={value!r}; a whole number from 1 is needed")
        px = value * patch if key == "grid" else value
        if px > MAX_PX:
            raise UsageError(
                f"teacher {name!r}: {key}={value} is {px} pixels a side; {MAX_PX} at most"
            )
        if px % patch:
            below = max(1, px // patch) * patch
            raise UsageError(
                f"teacher {name!r}: img_size={px} is no multiple of its {patch}-pixel patches; "
                f"give {below} or {below + patch}"
            )
        return px
    return default
