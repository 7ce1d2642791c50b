"""A view is one augmented crop of one picture, drawn once, stored, and replayed exactly.

The draw is a pure function of (policy seed, key, view number); the box that came out of it is the
truth from then on. The second half of the pixel path is here: jitter on the whole picture, crop,
then resize, then flip. The box is in unflipped source pixels:

        0 ------------------- width          picture
        |      left                           |  crop = (top, left, height, width)
    top +------+-----------+                  v
        |      |   crop    | height        resize to size x size, then mirrored left-right when flip
        |      +-----------+
     height      width

Shapes: n pictures, V views. Sizes are (height, width) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.views.policy import Policy
from featcache.views.render import JITTER_ORDERS

TRIES = 10  # torchvision's RandomResizedCrop tries ten boxes before it takes the centre
# four a try (area, ratio, top, left), then flip, brightness, contrast, saturation, order
_WORDS = 4 * TRIES + 8


def stored_view(
    digests: rng.U64, epoch: int | npt.NDArray[np.int64], count: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Choose which of `count` stored views each picture shows in an epoch, digests (n, 2) -> (n,),
    both one or one per picture: (epoch + offset(key)) mod count, so every view is shown equally
    often, and a batch mixes views."""
    epochs, counts = np.asarray(epoch, np.uint64), np.asarray(count, np.uint64)
    return ((epochs + digests[:, 0] % counts) % counts).astype(np.int64)


class DrawnViews(NamedTuple):
    """The parameters of n pictures' V views are stored; `render` needs no more."""

    crop: npt.NDArray[np.int32]  # (n, V, 4): top, left, height, width
    flip: npt.NDArray[np.uint8]  # (n, V)
    # (n, V): sampled fraction; of the box itself where all tries failed
    area: npt.NDArray[np.float32]
    jitter: npt.NDArray[np.float32]  # (n, V, 4): brightness, contrast, saturation, order


def draw_views(
    policy: Policy,
    digests: rng.U64,
    source_sizes: npt.NDArray[np.integer],
    views: Sequence[int] = (0,),
    *,
    clamp: bool = False,
) -> DrawnViews:
    """Draw the given view numbers of n pictures from their key digests (n, 2) and sizes (n, 2).

    The law is torchvision's RandomResizedCrop: area fraction uniform in `scale`, log ratio uniform,
    ten tries, then the largest centred box within `ratio`. With `clamp` it is that of MAE's linear
    probe (facebookresearch/mae util/crop.py:22-42): one try, whose sides are cut to the picture's;
    the area is then the box's own.
    """
    stream = rng.stream("view", policy.seed)
    # (n, V, words)
    raw = np.stack([rng.words(digests, stream, _WORDS, view=view) for view in views], 1)
    sizes = np.asarray(source_sizes, np.int64)[:, None, :]  # (n, 1, 2)
    tries = raw[..., : 4 * TRIES].reshape(*raw.shape[:2], TRIES, 4)
    crop, area = _boxes(policy, tries[:, :, :1] if clamp else tries, sizes, clamp)
    flip = (rng.uniform(raw[..., 4 * TRIES]) < policy.flip).astype(np.uint8)
    return DrawnViews(
        crop.astype(np.int32),
        flip,
        area.astype(np.float32),
        _jitter(policy, raw[..., 4 * TRIES + 1 :]),
    )


def _boxes(
    policy: Policy, raw: rng.U64, sizes: npt.NDArray[np.int64], clamp: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """raw (n, V, tries, 4), sizes (n, 1, 2) -> crop (n, V, 4) and area (n, V): the first try that
    fits."""
    height, width = sizes[..., 0, None], sizes[..., 1, None]  # (n, 1, 1)
    low, high = policy.scale
    fraction = low + (high - low) * rng.uniform(raw[..., 0])
    log_low, log_high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    ratio = np.exp(log_low + (log_high - log_low) * rng.uniform(raw[..., 1]))
    target = fraction * (height * width)
    w = np.rint(np.sqrt(target * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    if clamp:
        w, h = np.clip(w, 1, width), np.clip(h, 1, height)
        fraction = w * h / (height * width)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = rng.below(raw[..., 2], np.maximum(height - h + 1, 1))
    left = rng.below(raw[..., 3], np.maximum(width - w + 1, 1))
    first = fits.argmax(-1)[..., None]
    boxes = np.stack(
        [np.take_along_axis(part, first, -1)[..., 0] for part in (top, left, h, w)], -1
    )
    area = np.take_along_axis(fraction, first, -1)[..., 0]
    centre = np.broadcast_to(central_box(policy, sizes[:, 0]), (len(sizes), 4))[:, None]
    good = fits.any(-1)
    centre_area = centre[..., 2] * centre[..., 3] / (sizes[..., 0] * sizes[..., 1])
    return np.where(good[..., None], boxes, centre), np.where(good, area, centre_area)


def central_box(policy: Policy, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the central boxes (n, 4) of pictures of `sizes` (n, 2): the whole picture, cut at the
    centre to a width / height within `ratio`."""
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = policy.ratio
    w = np.where(width > high * height, np.maximum(np.rint(height * high), 1), width).astype(
        np.int64
    )
    h = np.where(width < low * height, np.maximum(np.rint(width / low), 1), height).astype(np.int64)
    w, h = np.minimum(w, width), np.minimum(h, height)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)


def _jitter(policy: Policy, raw: rng.U64) -> npt.NDArray[np.float32]:
    """raw (n, V, >= 4) -> (n, V, 4): three factors in [1 - j, 1 + j] and the number of their
    order."""
    if policy.jitter == 0:
        return np.broadcast_to(np.array([1, 1, 1, 0], np.float32), (*raw.shape[:2], 4)).copy()
    factors = 1 + policy.jitter * (2 * rng.uniform(raw[..., :3]) - 1)
    order = rng.below(raw[..., 3], len(JITTER_ORDERS))
    return np.concatenate([factors, order[..., None]], -1).astype(np.float32)
