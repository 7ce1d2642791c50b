"""A frozen encoder embeds pictures, batch by batch.

n pictures, V views of each, b pictures of a batch, S pixels a side, T tokens, D width.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError, counted
from featcache.pictures.decode import decode
from featcache.pictures.source import PictureError, Source
from featcache.runtime.meter import meter
from featcache.views import draw as view_draw
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from student.features.frozen import FrozenEncoder

I64 = npt.NDArray[np.int64]
Keep = Callable[[Tensor], Tensor]
CROP_PCT = 0.875  # 256 -> 224, the centre crop of MAE's and DINO's evaluations
# Pillow frees the interpreter while it decodes and resizes; more than 32 wait for it all the same
DECODE_THREADS = max(4, min(32, len(os.sched_getaffinity(0))))
EmbedProgress = Callable[[str, int, int], None]  # stage, pictures (or epochs) done, of how many


@dataclass(frozen=True)
class Rendering:
    """Says which pixels of a picture an encoder sees: its centre crop, or the augmented view of a
    number, drawn under `seed`."""

    size: int
    crop_pct: float = CROP_PCT
    view: int | None = None  # None: the centre crop
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise UsageError(
                f"cannot take a centre crop of {self.crop_pct:g}: --crop-pct is above 0 and at "
                "most 1; give 0.875"
            )

    def facts(self) -> dict[str, Any]:
        """Return what the pixels depend on beside the picture."""
        if self.view is None:
            return {"crop": "centre", "size": self.size, "crop_pct": self.crop_pct}
        return {"policy": policy_of(self.size, self.seed).as_dict(), "view": self.view}


class Skipped:
    """Counts pictures that cannot be decoded, and raises the error of the one that is too many."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.errors: dict[str, dict[int, UserError]] = {}

    def add(self, source: Source, row: int, error: UserError) -> None:
        """Raise the error unless it may be skipped."""
        self.errors.setdefault(source.spec, {})[row] = error
        if self.count > self.allowed:
            raise self._one_too_many(error)

    def _one_too_many(self, error: UserError) -> UserError:
        """Add to the error of the picture that is too many how many were left out before it."""
        if not self.allowed:
            return error
        left_out = counted(self.allowed, "other was", "others were")
        told = UserError(f"{error}; {left_out} left out already, as many as --skip-bad allows")
        told.__cause__ = error
        return told

    @property
    def count(self) -> int:
        return sum(map(len, self.errors.values()))

    def told(self) -> dict[str, Any]:
        """Return how many were skipped, and the first of them, as plain JSON."""
        errors = [str(error) for found in self.errors.values() for error in found.values()]
        return {"count": self.count, "first": errors[:5]}


def tokens_of(
    frozen: FrozenEncoder,
    source: Source,
    renderings: Sequence[Rendering],
    *,
    blocks: Sequence[int],
    batch_size: int,
    device: str,
    skipped: Skipped,
    keep: Keep | None = None,
    keep_px: int = 0,
) -> Iterator[tuple[I64, list[list[Tensor]]]]:
    """Yield, batch by batch in source order, rows (b,) of the source and the tokens (b,T,D) of each
    rendering and block, on the device. Rows of pictures that were skipped are not among them.

    Every picture is decoded once; at most two batches of pixels are held. `keep` maps pixels
    (b,3,S,S) to the ids (b,V) of the patches that the encoder is to see; with `keep_px` it is given
    the same crops at that size.
    """
    frozen.to(device)
    other_size = keep is not None and keep_px not in (0, frozen.img_size)
    sizes = (frozen.img_size, keep_px) if other_size else (frozen.img_size,)
    for rows, batches in pixels_of(source, renderings, sizes, batch_size, skipped):
        found: list[list[Tensor]] = []
        for shown, seen in zip(batches[0], batches[-1], strict=True):
            images = shown.to(device)
            ids = None
            if keep is not None:
                ids = keep(seen.to(device) if other_size else images)
            found.append(frozen.tokens(images, blocks, ids))
        yield rows, found


def pixels_of(
    source: Source,
    renderings: Sequence[Rendering],
    sizes: tuple[int, ...],
    batch_size: int,
    skipped: Skipped,
) -> Iterator[tuple[I64, list[Tensor]]]:
    """Yield, batch by batch in source order, rows (b,) of the source and, at each of the sizes, the
    uint8 pixels (V,b,3,S,S) of the renderings. Rows of pictures that were skipped are not among
    them."""
    draw = functools.partial(_render, source, list(renderings), sizes)
    per_batch = max(1, batch_size // len(renderings))
    for start, pixels in _batches(draw, len(source), per_batch):
        rows = [start + i for i, each in enumerate(pixels) if not isinstance(each, UserError)]
        for i, each in enumerate(pixels):
            if isinstance(each, UserError):
                skipped.add(source, start + i, each)
        good = [each for each in pixels if not isinstance(each, UserError)]
        if good:
            shown = [_stacked([each[i] for each in good]) for i in range(len(sizes))]
            yield np.array(rows, np.int64), shown


def _stacked(pictures: list[npt.NDArray[np.uint8]]) -> Tensor:
    """Turn b times (V,S,S,3) into (V,b,3,S,S)."""
    return torch.from_numpy(np.stack(pictures)).permute(1, 0, 4, 2, 3).contiguous()


Views = list[npt.NDArray[np.uint8]]  # (V,S,S,3) of each size


def _render(
    source: Source, renderings: list[Rendering], sizes: tuple[int, ...], row: int
) -> Views | UserError:
    """Return the views of a picture at each size, or the error of one that cannot be decoded."""
    try:
        data, key = source.read(row), source.keys[row]
        meter.count("picture_bytes", len(data))
        picture = decode(data)
        return [
            np.stack([_view(picture, key, each, size) for each in renderings]) for size in sizes
        ]
    except PictureError as error:
        refused = UserError(
            f"cannot decode the picture {source.keys[row]!r} of {source.spec}: {error}; an "
            "evaluation counts every labelled picture: repair it, take it out of the source, or "
            "leave up to N out with --skip-bad N"
        )
        refused.__cause__ = error
        return refused


def _view(picture: Image, key: str, rendering: Rendering, size: int) -> npt.NDArray[np.uint8]:
    """Render (S,S,3); the box of a view comes from the picture's key and the view's number,
    whatever the batch and the size."""
    if rendering.view is None:
        return render_centre(picture, size, rendering.crop_pct, "bicubic")
    policy = policy_of(size, rendering.seed)
    drawn = view_draw.draw_views(
        policy,
        rng.key_digests([key]),
        np.array([[picture.height, picture.width]]),
        views=[rendering.view],
        clamp=True,
    )
    return render(
        picture, drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0], size, policy.filter
    )


def policy_of(img_size: int, seed: int) -> Policy:
    """Return the policy of the linear protocol's training views: crops of (0.08, 1) by MAE's own
    sampler, bicubic, flip; no jitter."""
    return Policy(size=img_size, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=seed)


def _batches(
    draw: Callable[[int], Views | UserError], n: int, rows: int
) -> Iterator[tuple[int, list[Views | UserError]]]:
    """Yield the first row of a batch and its pictures, in source order; the next batch decodes
    while the caller embeds this one."""
    pool = ThreadPoolExecutor(DECODE_THREADS)
    ahead: list[Future[Views | UserError]] = []
    try:
        for start in range(0, n, rows):
            current, ahead = (
                ahead,
                [pool.submit(draw, row) for row in range(start, min(start + rows, n))],
            )
            if current:
                yield start - rows, [future.result() for future in current]
        if ahead:
            yield n - len(ahead), [future.result() for future in ahead]
    finally:
        pool.shutdown(cancel_futures=True)
