"""Labelled pictures are a source of targets: fresh augmented views, and soft labels in the place of
a teacher's features.

    picture -> crop, flip -> RandAugment                                        (host, uint8)
            -> normalised -> erased -> mixed with its neighbour in the batch    (device)
    label   -> smoothed -> mixed likewise

All that is random is a function of (seed, key, epoch), or of (seed, step) where pictures are mixed;
neighbours of a step are mixed, so that any number of processes with even batches makes the same
pairs.

B samples of a batch, C classes, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.models.hooks import normalise_pixels
from featcache.reading.tensors import copy_to_device
from featcache.views import render as view_render
from featcache.views.draw import draw_views
from featcache.views.policy import Policy
from student.targets import augmentation, buffers
from student.targets.assemble import pixel_layout
from student.targets.augmentation import Augmentation
from student.targets.contract import I64, HostBatch, Moments

Triple = tuple[float, float, float]


@dataclass
class LabelledViews:
    """Gives views and labels of training pictures, whose class numbers are `labels` (n,)."""

    policy: Policy
    labels: I64 = field(repr=False)
    classes: int
    augment: Augmentation
    mean: Triple
    std: Triple
    is_stored = True  # no teacher is in the loop
    stored_pixels = is_io_bound = False
    moments: Moments | None = None

    def __post_init__(self) -> None:
        self._change: Callable[[Image.Image, int], Image.Image] | None = None
        if self.augment.rand_augment:
            self._change = augmentation.rand_augment(
                self.augment.rand_augment, self.policy.size, self.mean
            )

    def layout(self) -> buffers.Layout:
        return pixel_layout(self.policy.size)

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        """Number views by the times that a picture was shown: a fresh one each epoch."""
        return np.broadcast_to(np.asarray(rounds, np.int64), len(digests)).copy()

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        return {}

    def step_metrics(self, indices: I64) -> dict[str, int]:
        return {}

    def mask_inputs(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return {}

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        size = np.array([(picture.height, picture.width)])
        drawn = draw_views(self.policy, digest[None], size, [view])
        parts = (drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0])
        pixels = view_render.render(picture, *parts, self.policy.size, self.policy.filter)
        if self._change is not None:
            words = augmentation.draw_rand_augment(digest[None], self.policy.seed, view)
            pixels = np.asarray(self._change(Image.fromarray(pixels), int(words[0])))
        return {"pixels": pixels}

    def pixel_hashes(self, indices: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        return None

    def check_pixels(
        self, pixels: npt.NDArray[np.uint8], index: int, view: int, stored_hash: int
    ) -> None:
        """Nothing is stored that the pixels could differ from."""

    def draw(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        """Draw how the step's pictures are mixed, beside the labels (B,)."""
        mix = augmentation.draw_mix(self.augment, self.policy.seed, host["step"], self.policy.size)
        return {"labels": self.labels[host["at"]], **mix}

    def device_arrays(self, host: HostBatch) -> tuple[str, ...]:
        return ()

    def to_device(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return `images` (B,3,S,S), normalised, erased and mixed, and `targets` (B,C)."""
        drawn = host["drawn"]
        pixels = copy_to_device(host["pixels"], device).permute(0, 3, 1, 2)
        images = normalise_pixels(pixels, self.mean, self.std)
        # drawn here, on the host: what is erased of few pictures is not asked of the device
        erased = augmentation.draw_erasing(
            self.augment, host["digests"], self.policy.seed, host["round"], self.policy.size
        )
        boxes, seeds = (torch.from_numpy(erased[name]) for name in ("erase_box", "erase_seed"))
        images = augmentation.erase(images, boxes, seeds)
        lam, box = drawn["mix_lam"], drawn["mix_box"]
        images = augmentation.mix_images(images, lam, box)
        targets = augmentation.mix_targets(
            drawn["labels"], self.classes, lam, self.augment.smoothing
        )
        return {"images": images, "targets": targets}, {}
