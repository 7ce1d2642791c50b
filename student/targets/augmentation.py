"""Pictures and labels are augmented for fine-tuning: RandAugment, random erasing, mixup and cutmix.

Laws and operations are timm's (1.0.31: data/auto_augment.py, random_erasing.py, mixup.py); the
randomness is ours. What happens to a picture is a pure function of (seed, key, round), what is
mixed one of (seed, step): neither worker, batch nor world size enters. The host draws words, boxes
and lambda; the device erases and mixes without being waited for.

B samples of a batch, C classes, S pixels a side. A box is top, left, height, width; one of zeros is
none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError
from student.targets.assemble import copy_page_locked
from student.targets.rand_augment import check_rand_augment
from student.targets.rand_augment import draw_rand_augment as draw_rand_augment
from student.targets.rand_augment import rand_augment as rand_augment

TRIES = 10  # for a box that fits
AREA = (0.02, 1 / 3)  # of the picture, that is erased
ASPECT = (0.3, 1 / 0.3)  # height over width of what is erased
ALPHAS = (0.01, 100.0)


@dataclass(frozen=True)
class Augmentation:
    """Says what fine-tuning does to pictures and labels; raises UsageError for what cannot be."""

    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's text; "" is none
    erasing: float = 0.25  # probability
    mixup: float = 0.8  # alpha of Beta(alpha, alpha); 0 is none
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5  # to cutmix, where both are on
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_rand_augment(self.rand_augment)
        for name in ("erasing", "mix_prob", "switch_prob", "smoothing"):
            _check_range(name, getattr(self, name), (0.0, 1.0))
        for name in ("mixup", "cutmix"):
            if getattr(self, name) != 0:
                _check_range(name, getattr(self, name), ALPHAS)


def _check_range(name: str, value: float, allowed: tuple[float, float]) -> None:
    low, high = allowed
    if not low <= value <= high:  # neither is nan
        raise UsageError(
            f"cannot augment with {name}={value}: {low:g} to {high:g} is allowed; 0 leaves it out"
        )


# --- random erasing -------------------------------------------------------------------------------


def draw_erasing(
    option: Augmentation, digests: rng.U64, seed: int, rounds: npt.ArrayLike, size: int
) -> dict[str, npt.NDArray[Any]]:
    """digests (B, 2), rounds () or (B,) -> `erase_box` (B, 4) int32, and `erase_seed` (B,) int64 of
    what fills it.

    The law is timm's: the first of ten tries whose box is smaller than the picture, none if all
    fail.
    """
    raw = rng.words(digests, rng.stream("erasing", seed), 2 + 4 * TRIES, epoch=rounds)
    boxes, fits = _tried_boxes(raw[:, 2:].reshape(-1, TRIES, 4), size)
    box = np.take_along_axis(boxes, fits.argmax(1)[:, None, None], 1)[:, 0]
    chosen = (rng.uniform(raw[:, 0]) < option.erasing) & fits.any(1)
    return {
        "erase_box": np.where(chosen[:, None], box, 0).astype(np.int32),
        "erase_seed": (raw[:, 1] >> np.uint64(1)).astype(np.int64),
    }


def _tried_boxes(raw: rng.U64, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """raw (B, tries, 4) -> boxes (B, tries, 4), and whether each fits (B, tries)."""
    log_low, log_high = math.log(ASPECT[0]), math.log(ASPECT[1])
    area = (AREA[0] + (AREA[1] - AREA[0]) * rng.uniform(raw[..., 0])) * size**2
    aspect = np.exp(log_low + (log_high - log_low) * rng.uniform(raw[..., 1]))
    height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    top = rng.below(raw[..., 2], np.maximum(size - height + 1, 1))
    left = rng.below(raw[..., 3], np.maximum(size - width + 1, 1))
    return np.stack([top, left, height, width], -1), (height < size) & (width < size)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """images (B, 3, S, S) normalised, boxes (B, 4), seeds (B,) int64 -> (B, 3, S, S): fill each box
    by N(0, 1); `images` may be written to.

    A sample's numbers come from its seed alone. Boxes and seeds on the host save time: only what is
    erased is drawn. On the device they are not waited for, and numbers are drawn for all pictures.
    """
    if boxes.device != torch.device("cpu"):
        return _fill(images, boxes, seeds)
    rows = boxes[:, 2:].all(1).nonzero()[:, 0]
    if not len(rows):
        return images
    index, box, seed = (
        copy_page_locked(part.numpy(), images.device) for part in (rows, boxes[rows], seeds[rows])
    )
    return images.index_copy_(0, index, _fill(images[index], box, seed))


def _fill(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    noise = _normals(seeds, images[0].numel()).view(images.shape).to(images.dtype)
    return torch.where(_inside(boxes, images.shape[-1])[:, None], noise, images)


def _inside(boxes: Tensor, size: int) -> Tensor:
    """boxes (..., 4) -> (..., S, S) bool."""
    top, left, height, width = boxes.unsqueeze(-1).unbind(-2)  # (..., 1) each
    at = torch.arange(size, device=boxes.device)
    rows = (at >= top) & (at < top + height)
    columns = (at >= left) & (at < left + width)
    return rows.unsqueeze(-1) & columns.unsqueeze(-2)


def _normals(seeds: Tensor, count: int) -> Tensor:
    """seeds (B,) -> (B, count) float32 of N(0, 1): Box and Muller's two from the halves of a word,
    the cosines first.

    torch's generators give other numbers on another device, and one kernel a sample.
    """
    raw = _split_mix(seeds, -(-count // 2))
    radius = (((raw >> 32) & 0xFFFFFFFF).float() + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (raw & 0xFFFFFFFF).float().mul_(math.tau * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def _split_mix(seeds: Tensor, count: int) -> Tensor:
    """seeds (B,) -> (B, count) int64: the first words of SplitMix64 (Steele, Lea, Flood: "Fast
    Splittable Pseudorandom Number Generators", OOPSLA 2014), whose unsigned numbers wrap as signed
    ones do."""
    steps = torch.arange(1, count + 1, device=seeds.device)
    z = seeds.unsqueeze(1) + steps * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        z = _xor_shifted(z, shift) * factor
    return _xor_shifted(z, 31)


def _xor_shifted(z: Tensor, shift: int) -> Tensor:
    return z ^ ((z >> shift) & (2 ** (64 - shift) - 1))  # without the sign's copies


# --- mixup and cutmix -----------------------------------------------------------------------------


def draw_mix(option: Augmentation, seed: int, step: int, size: int) -> dict[str, npt.NDArray[Any]]:
    """Draw `mix_lam` () float32 and `mix_box` (4,) int32 of a step's global batch: cutmix has a
    box, mixup none; lambda is 1 where nothing is mixed.

    The law is timm's of its mode `batch`, with lambda corrected to the area that is left.
    """
    raw = rng.words(rng.key_digests(["batch"]), rng.stream("mixup", seed), 5, epoch=step)[0]
    is_mixed, switch, quantile, *centre = rng.uniform(raw)
    lam, box = 1.0, np.zeros(4, np.int32)
    use_cutmix = option.cutmix > 0 and (option.mixup == 0 or switch < option.switch_prob)
    alpha = option.cutmix if use_cutmix else option.mixup
    if alpha > 0 and is_mixed < option.mix_prob:
        lam = float(special.betaincinv(alpha, alpha, quantile))
        if use_cutmix:
            lam, box = _cut(lam, centre, size)
    return {"mix_lam": np.array(lam, np.float32), "mix_box": box}


def _cut(lam: float, centre: Sequence[float], size: int) -> tuple[float, npt.NDArray[np.int32]]:
    """Return the box around a centre, in [0, 1) each, that leaves lam of the picture, clipped to
    the picture; and what it leaves then."""
    side = int(size * math.sqrt(1 - lam))
    at = np.floor(np.multiply(centre, size)).astype(np.int64)
    low, high = np.maximum(at - side // 2, 0), np.minimum(at + (side + 1) // 2, size)
    height, width = high - low
    box = [*low, height, width] if side else [0] * 4
    return 1 - height * width / size**2, np.array(box, np.int32)


def mix_images(images: Tensor, lam: Tensor, box: Tensor) -> Tensor:
    """images (B, 3, S, S), lam (), box (4,), on one device -> (B, 3, S, S): mix picture 2k with
    picture 2k + 1 and the other way round.

    Neighbours lie in one micro-batch whatever the number of processes. The last of an odd number
    stays as it is.
    """
    lam = lam.to(images.dtype)
    outside = (~_inside(box, images.shape[-1])).to(images.dtype)  # (S, S): a box shows one picture
    return _mix_neighbours(images, torch.where(box[2:].all(), outside, lam))


def mix_targets(labels: Tensor, classes: int, lam: Tensor, smoothing: float) -> Tensor:
    """labels (B,), lam () -> (B, C) float32: smooth the labels and mix them as `mix_images` does
    its pictures."""
    off = smoothing / classes
    hot = torch.full((len(labels), classes), off, device=labels.device)
    hot.scatter_(1, labels.long().unsqueeze(1), 1 - smoothing + off)
    return _mix_neighbours(hot, lam)


def _mix_neighbours(values: Tensor, weight: Tensor) -> Tensor:
    """values (B, ...) and what each keeps of its own, to broadcast."""
    even = len(values) // 2 * 2
    pairs = values[:even].unflatten(0, (even // 2, 2))
    mixed = pairs * weight + pairs.flip(1) * (1 - weight)
    return torch.cat([mixed.flatten(0, 1), values[even:]])
