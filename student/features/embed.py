"""A frozen encoder embeds pictures, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.pictures.source import PictureError, Source
from featcache.views import draw as view_draw
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from student.features.frozen import FrozenEncoder
from student.features.labels import labels_of

CROP_PCT = 0.875  # 256 -> 224, the centre crop of MAE's and DINO's evaluations
DECODE_THREADS = 4  # Pillow frees the interpreter while it decodes and resizes
EmbedProgress = Callable[[str, int, int], None]  # stage, pictures (or epochs) done, of how many


def embed_source(
    frozen: FrozenEncoder,
    source: Source,
    view_numbers: Sequence[int] | None = None,
    *,
    batch_size: int = 256,
    device: str = "cpu",
    progress: EmbedProgress | None = None,
    crop_pct: float = CROP_PCT,
    seed: int = 0,
    stage: str = "features",
) -> tuple[Tensor, Tensor]:
    """Embed a source; return features (V,n,D) float32 and labels (n,) int64, both on the CPU.

    `view_numbers` None is the centre crop (V = 1); else those augmented views of each picture,
    drawn under `seed`. Every picture is decoded once; at most two batches of pixels are held.
    """
    labels = torch.from_numpy(labels_of(source))
    count = 1 if view_numbers is None else len(view_numbers)
    draw = centre_views(source, frozen.img_size, crop_pct)
    if view_numbers is not None:
        draw = augmented_views(source, frozen.img_size, view_numbers, seed)
    frozen.to(device)
    parts: list[Tensor] = []
    done = 0
    for pixels in _batches(draw, len(source), max(1, batch_size // count)):  # (b,V,3,S,S)
        flat = [
            frozen.embed(chunk.to(device)).cpu() for chunk in pixels.flatten(0, 1).split(batch_size)
        ]
        parts.append(torch.cat(flat).unflatten(0, pixels.shape[:2]))
        done += len(pixels)
        if progress is not None:
            progress(stage, done, len(source))
    return torch.cat(parts).transpose(0, 1).contiguous(), labels


def policy_of(img_size: int, seed: int) -> Policy:
    """Return the policy of the linear protocol's training views: crops of (0.08, 1) by MAE's own
    sampler, bicubic, flip; no jitter."""
    return Policy(size=img_size, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=seed)


def centre_views(
    source: Source, size: int, crop_pct: float
) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Return a function from a row to its centre crop (1,S,S,3)."""
    if not 0 < crop_pct <= 1:
        raise UsageError(
            f"cannot take a centre crop of {crop_pct:g}: --crop-pct is above 0 and at most 1; give "
            "0.875"
        )
    return lambda row: render_centre(_picture(source, row), size, crop_pct, "bicubic")[None]


def augmented_views(
    source: Source, size: int, view_numbers: Sequence[int], seed: int
) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Return a function from a row to its views (V,S,S,3), whose boxes come from the picture's key
    and the view numbers, whatever the batch."""
    policy = policy_of(size, seed)

    def pixels(row: int) -> npt.NDArray[np.uint8]:
        picture = _picture(source, row)
        digest = rng.key_digests([source.keys[row]])
        drawn = view_draw.draw_views(
            policy,
            digest,
            np.array([[picture.height, picture.width]]),
            views=view_numbers,
            clamp=True,
        )
        return np.stack(
            [
                render(
                    picture,
                    drawn.crop[0, v],
                    drawn.flip[0, v],
                    drawn.jitter[0, v],
                    size,
                    policy.filter,
                )
                for v in range(len(view_numbers))
            ]
        )

    return pixels


def _picture(source: Source, row: int) -> Image:
    try:
        return decode(source.read(row))
    except PictureError as error:
        raise UserError(
            f"cannot decode the picture {source.keys[row]!r} of {source.spec}: {error}; an "
            "evaluation counts every labelled picture: repair it or take it out of the source"
        ) from error


def _batches(draw: Callable[[int], npt.NDArray[np.uint8]], n: int, rows: int) -> Iterator[Tensor]:
    """Yield uint8 (b,V,3,S,S) in source order; the next batch decodes while the caller embeds this
    one."""
    pool = ThreadPoolExecutor(DECODE_THREADS)
    ahead: list[Future[npt.NDArray[np.uint8]]] = []
    try:
        for start in range(0, n, rows):
            current, ahead = (
                ahead,
                [pool.submit(draw, row) for row in range(start, min(start + rows, n))],
            )
            if current:
                yield _stacked(current)
        if ahead:
            yield _stacked(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(futures: list[Future[npt.NDArray[np.uint8]]]) -> Tensor:
    return (
        torch.from_numpy(np.stack([future.result() for future in futures]))
        .permute(0, 1, 4, 2, 3)
        .contiguous()
    )
