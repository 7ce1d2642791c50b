"""Views: one augmented crop of one picture, drawn once, stored, and replayed exactly.

The draw is a pure function of (policy seed, key, view number); the box that came out of it is the truth from then on.
The second half of the pixel path is here: jitter on the whole picture, crop, then resize, then flip. The box is in
unflipped source pixels:

        0 ------------------- width          picture
        |      left                           |  crop = (top, left, height, width)
    top +------+-----------+                  v
        |      |   crop    | height        resize to size x size, then mirrored left-right when flip
        |      +-----------+
     height      width

Shapes: n pictures, V views. Sizes are (height, width) everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from featcache import errors, rng

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
AREA = "area"  # OpenCV's INTER_AREA, which pictures that FFCV decodes are resized by (`replay`), and no others
TRIES = 10  # torchvision's RandomResizedCrop tries ten boxes before it takes the centre
_WORDS = 4 * TRIES + 8  # four a try (area, ratio, top, left), then flip, brightness, contrast, saturation, order
_ORDERS = list(permutations(("brightness", "contrast", "saturation")))  # jitter's fourth number counts these
THUMBNAIL = 14


@dataclass(frozen=True)
class Policy:
    """How views are drawn. `scale` is the area fraction, `ratio` is width / height, `jitter` the largest change."""

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: str = "bicubic"
    flip: float = 0.5
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.scale
        checks = [
            (1 <= self.size <= 4096, f"size {self.size}: 1 to 4096 pixels are allowed"),
            (0 < low <= high <= 1, f"scale {low:g},{high:g}: 0 < low <= high <= 1 is allowed"),
            (0 < self.ratio[0] <= self.ratio[1] < math.inf, f"ratio {self.ratio}: 0 < low <= high is allowed"),
            (self.filter in {*FILTERS, AREA}, f"filter {self.filter!r}: {errors.near(self.filter, [*FILTERS, AREA])}"),
            (0 <= self.flip <= 1, f"flip {self.flip:g}: a probability from 0 to 1 is allowed"),
            (0 <= self.jitter < 1, f"jitter {self.jitter:g}: 0 to below 1 is allowed"),
            (0 <= self.seed < 2**63, f"seed {self.seed}: 0 to 2**63 - 1 is allowed"),
        ]
        for good, message in checks:
            if not good:
                raise errors.UsageError(f"view policy: {message}")

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# The augmentations of the released code, METHODS 1.6, 3.6, 4.6, 7.6.
POLICIES = {
    "default": Policy(),
    "cae": Policy(scale=(0.08, 1.0)),
    "caev2": Policy(scale=(0.4, 1.0), jitter=0.4),
    "fd": Policy(scale=(0.08, 1.0), filter="bilinear"),
}


def policy(name: str = "default", **changes: Any) -> Policy:
    """A named policy, or one read from a JSON file, with some fields changed."""
    if name in POLICIES:
        base = POLICIES[name].as_dict()
    elif name.endswith(".json"):
        base = _read_policy(name)
    else:
        raise errors.UsageError(
            f"unknown policy {name!r}: {errors.near(name, POLICIES)}, or a .json file with its fields"
        )
    return from_dict({**base, **changes})


def _read_policy(path: str) -> dict[str, Any]:
    try:
        fields = json.loads(Path(path).read_text())
        return {**Policy().as_dict(), **fields}
    except (OSError, ValueError, TypeError) as error:
        raise errors.UserError(f"policy file {path!r}: {error}; a JSON object of policy fields is needed") from error


def from_dict(fields: dict[str, Any]) -> Policy:
    """The policy stored in a manifest or a file; unknown fields and wrong types are refused."""
    known = Policy().as_dict()
    for key, value in fields.items():
        if key not in known:
            raise errors.UsageError(f"view policy: unknown field {key!r}; {errors.near(key, known)}")
        pair, text = isinstance(known[key], list), isinstance(known[key], str)
        parts = list(value) if pair and isinstance(value, list | tuple) and len(value) == 2 else [value]
        right = all(isinstance(part, str) if text else type(part) in (int, float) for part in parts)
        if not right or (pair and len(parts) != 2) or (key in ("size", "seed") and type(value) is not int):
            raise errors.UsageError(f"view policy: {key} is {value!r}, something like {known[key]!r} is needed")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Policy(**values)


def stored_view(
    digests: rng.U64, epoch: int | npt.NDArray[np.int64], count: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """digests (n, 2) -> (n,) which of `count` stored views each picture shows in an epoch, each one or one per picture:
    (epoch + offset(key)) mod count, so every view is shown equally often, and a batch mixes views."""
    epochs, counts = np.asarray(epoch, np.uint64), np.asarray(count, np.uint64)
    return ((epochs + digests[:, 0] % counts) % counts).astype(np.int64)


class Drawn(NamedTuple):
    """What is stored of n pictures' V views; all that `render` needs."""

    crop: npt.NDArray[np.int32]  # (n, V, 4): top, left, height, width
    flip: npt.NDArray[np.uint8]  # (n, V)
    area: npt.NDArray[np.float32]  # (n, V): sampled fraction; of the box itself where all tries failed
    jitter: npt.NDArray[np.float32]  # (n, V, 4): brightness, contrast, saturation, order


def draw(
    policy: Policy,
    digests: rng.U64,
    source_sizes: npt.NDArray[np.integer],
    views: Sequence[int] = (0,),
    *,
    clamp: bool = False,
) -> Drawn:
    """Draw the given view numbers of n pictures from their key digests (n, 2) and sizes (n, 2).

    The law is torchvision's RandomResizedCrop: area fraction uniform in `scale`, log ratio uniform, ten tries, then the
    largest centred box within `ratio`. With `clamp` it is that of MAE's linear probe (facebookresearch/mae
    util/crop.py:22-42): one try, whose sides are cut to the picture's; the area is then the box's own.
    """
    stream = rng.stream("view", policy.seed)
    raw = np.stack([rng.words(digests, stream, _WORDS, view=view) for view in views], 1)  # (n, V, words)
    sizes = np.asarray(source_sizes, np.int64)[:, None, :]  # (n, 1, 2)
    tries = raw[..., : 4 * TRIES].reshape(*raw.shape[:2], TRIES, 4)
    crop, area = _boxes(policy, tries[:, :, :1] if clamp else tries, sizes, clamp)
    flip = (rng.uniform(raw[..., 4 * TRIES]) < policy.flip).astype(np.uint8)
    return Drawn(crop.astype(np.int32), flip, area.astype(np.float32), _jitter(policy, raw[..., 4 * TRIES + 1 :]))


def _boxes(
    policy: Policy, raw: rng.U64, sizes: npt.NDArray[np.int64], clamp: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """raw (n, V, tries, 4), sizes (n, 1, 2) -> crop (n, V, 4) and area (n, V): the first try that fits."""
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
    boxes = np.stack([np.take_along_axis(part, first, -1)[..., 0] for part in (top, left, h, w)], -1)
    area = np.take_along_axis(fraction, first, -1)[..., 0]
    centre = np.broadcast_to(central_box(policy, sizes[:, 0]), (len(sizes), 4))[:, None]
    good = fits.any(-1)
    centre_area = centre[..., 2] * centre[..., 3] / (sizes[..., 0] * sizes[..., 1])
    return np.where(good[..., None], boxes, centre), np.where(good, area, centre_area)


def central_box(policy: Policy, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """sizes (n, 2) -> (n, 4): the whole picture, cut at the centre to a width / height within `ratio`."""
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = policy.ratio
    w = np.where(width > high * height, np.maximum(np.rint(height * high), 1), width).astype(np.int64)
    h = np.where(width < low * height, np.maximum(np.rint(width / low), 1), height).astype(np.int64)
    w, h = np.minimum(w, width), np.minimum(h, height)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)


def _jitter(policy: Policy, raw: rng.U64) -> npt.NDArray[np.float32]:
    """raw (n, V, >= 4) -> (n, V, 4): three factors in [1 - j, 1 + j] and the number of their order."""
    if policy.jitter == 0:
        return np.broadcast_to(np.array([1, 1, 1, 0], np.float32), (*raw.shape[:2], 4)).copy()
    factors = 1 + policy.jitter * (2 * rng.uniform(raw[..., :3]) - 1)
    order = rng.below(raw[..., 3], len(_ORDERS))
    return np.concatenate([factors, order[..., None]], -1).astype(np.float32)


class Replaying(Protocol):
    """A decoded picture of a pixel path that replays views itself; arguments are those of `render`."""

    def replay(
        self, crop: Sequence[int], flip: int, jitter: Sequence[float], size: int, filter: str
    ) -> npt.NDArray[np.uint8]: ...


def render(
    picture: Image.Image | Replaying, crop: Sequence[int], flip: int, jitter: Sequence[float], size: int, filter: str
) -> npt.NDArray[np.uint8]:
    """Replay one stored view of an RGB picture at any size: (size, size, 3) uint8."""
    if not isinstance(picture, Image.Image):
        return picture.replay(crop, flip, jitter, size, filter)
    from featcache.views import resample  # machine code, which most commands do without

    top, left, height, width = (int(x) for x in crop)
    picture = apply_jitter(picture, jitter)
    box = (left, top, left + width, top + height)
    return resample.resize(picture.crop(box), size, FILTERS[filter], bool(flip))


def apply_jitter(picture: Image.Image, jitter: Sequence[float]) -> Image.Image:
    """The whole picture's brightness, contrast (about its mean grey) and saturation, in the stored order."""
    factors = dict(zip(("brightness", "contrast", "saturation"), (float(x) for x in jitter[:3]), strict=True))
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    for name in _ORDERS[int(jitter[3])]:
        if factors[name] != 1.0:
            picture = enhance[name](picture).enhance(factors[name])
    return picture


def centre(picture: Image.Image, size: int, crop_pct: float, filter: str) -> npt.NDArray[np.uint8]:
    """The evaluation view: shorter side to round(size / crop_pct), then the central size x size; uint8 HWC.

    Sides and offsets are rounded as in torchvision's Resize and CenterCrop.
    """
    short = round(size / crop_pct)
    width, height = picture.size
    long = short * max(width, height) // min(width, height)
    picture = picture.resize((short, long) if width <= height else (long, short), FILTERS[filter])
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def pixel_hash(pixels: npt.NDArray[np.uint8]) -> int:
    """64-bit BLAKE2b of a view rendered at the policy's size: the proof that training sees what the teacher saw."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "little")


def thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(S, S, 3) -> (14, 14, 3): rounded means of a 14 x 14 grid of blocks; blocks share an edge where 14 does not
    divide S. From it the size of a difference is told when a hash does not match."""
    size = len(pixels)
    sums = np.zeros((size + 1, size + 1, 3), np.int64)
    sums[1:, 1:] = pixels.astype(np.int64).cumsum(0).cumsum(1)
    low = np.arange(THUMBNAIL) * size // THUMBNAIL
    high = -(-(np.arange(THUMBNAIL) + 1) * size // THUMBNAIL)
    total = sums[high][:, high] - sums[low][:, high] - sums[high][:, low] + sums[low][:, low]
    count = ((high - low)[:, None] * (high - low))[..., None]
    return ((total + count // 2) // count).astype(np.uint8)
