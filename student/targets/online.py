"""Targets are computed by the teacher in the loop; no cache is read.

B samples of a batch, L levels, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.reading.crop_range import ViewSchedule
from featcache.reading.feature_reader import FeatureReader
from featcache.reading.tensors import copy_to_device, tail_tensors, tail_to_device
from featcache.runtime.device_clock import StepClock
from featcache.runtime.meter import meter
from featcache.targets import levels
from featcache.targets.attention import draw_for_order, order_by
from featcache.views import render as view_render
from featcache.views.draw import draw_views, stored_view
from featcache.views.policy import Policy
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.assemble import copy_page_locked, pixel_layout, recipe_targets
from student.targets.contract import I64, HostBatch
from student.targets.online_others import OnlineNetwork

# the fields that a cache's own teacher gives
TEACHER_FIELDS = ("features", "feature_stats", "attention", "mask_order")


@dataclass
class OnlineTargets:
    """Views are drawn as they are shown, and the teacher is run on them where the recipe needs
    targets."""

    policy: Policy
    spec: TargetSpec
    teacher: Teacher | None
    views: int | None  # as many as a cache would hold; None: a fresh view each epoch
    order: str = "attentive"  # of `mask_order`
    # of the views of a cache that are shown, where not all are
    schedule: ViewSchedule | None = None
    # of a cache's codec, through which features go as if they had been stored
    stored_as: FeatureReader | None = None
    # a tokenizer, a second teacher
    others: Sequence[OnlineNetwork] = ()
    is_stored = False
    stored_pixels = is_io_bound = False
    moments = None

    def __post_init__(self) -> None:
        given = {*TEACHER_FIELDS, *(other.field for other in self.others)}
        lacking = set(self.spec.fields) - given
        if lacking:
            raise UsageError(
                f"--teacher online computes no {', '.join(sorted(lacking))}; allowed: features and "
                "what derives from them; give a cache that holds it with --cache"
            )
        self.tail: Mapping[str, Tensor] = {}
        if self.teacher is not None and self.spec.derive:
            self.tail = tail_tensors(self.teacher.tail())

    def layout(self) -> buffers.Layout:
        sizes = {name: size for name, (size, _) in self._renderings().items()}
        every = [pixel_layout(size, name) for name, size in sizes.items()]
        return {name: array for each in every for name, array in each.items()}

    def _renderings(self) -> dict[str, tuple[int, str]]:
        """Return pixels a side and filter of every array of pixels."""
        filter = self.policy.filter
        found = {"pixels": (self.policy.size, filter)}
        if self.teacher_px:
            found["teacher_pixels"] = (self.teacher_px, filter)
        for other in self.others:
            if self._array_of(other) != "pixels":
                found[other.array] = (other.network.input_px, other.filter or filter)
        return found

    def _array_of(self, other: OnlineNetwork) -> str:
        """Return the array of pixels that a network reads: the student's where it would be the
        same."""
        own = (other.network.input_px, other.filter or self.policy.filter)
        return "pixels" if own == (self.policy.size, self.policy.filter) else other.array

    @property
    def teacher_px(self) -> int:
        """Return the pixels a side that the teacher wants, or 0 where they are the student's."""
        if self.teacher is None or self.teacher.input_px == self.policy.size:
            return 0
        return self.teacher.input_px

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        if self.schedule is not None:
            return self.schedule.view(digests, rounds)
        if self.views is None:
            return np.broadcast_to(np.asarray(rounds, np.int64), len(digests)).copy()
        return stored_view(digests, rounds, self.views)

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
        return {
            name: view_render.render(picture, *parts, *kind)
            for name, kind in self._renderings().items()
        }

    def pixel_hashes(self, indices: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        return None

    def check_pixels(
        self, pixels: npt.NDArray[np.uint8], index: int, view: int, stored_hash: int
    ) -> None:
        """Nothing is stored that the pixels could differ from."""

    def draw(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        if self.teacher is None or "mask_order" not in self.spec.fields:
            return {}
        seeds = (host["digests"], host["view"], self.policy.seed)
        return {"order": draw_for_order(self.order, self.teacher.patches, *seeds)}

    def device_arrays(self, host: HostBatch) -> tuple[str, ...]:
        names = [self._teacher_array] if self.teacher is not None else []
        return tuple(dict.fromkeys([*names, *map(self._array_of, self.others)]))

    @property
    def _teacher_array(self) -> str:
        return "teacher_pixels" if self.teacher_px else "pixels"

    def to_device(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out, mask_inputs = (
            ({}, {}) if self.teacher is None else self._of_teacher(self.teacher, host, device)
        )
        for other in self.others:
            out |= other.compute(_images(host[self._array_of(other)], device))
        return out, mask_inputs

    def _of_teacher(
        self, teacher: Teacher, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `to_device` does of the teacher itself."""
        pairs, attention = self._forward(teacher, host, device)
        mask_inputs = self._mask_inputs(host, attention)
        if not pairs:
            return {}, mask_inputs
        features, stats = (torch.stack(each, 1) for each in zip(*pairs, strict=True))
        if self.stored_as is not None:
            features = self.stored_as.through_codec(features)
        self.tail = tail_to_device(self.tail, device)  # moved once, with the first batch
        out = recipe_targets(self.spec, features, stats, self.tail)
        if self.spec.moments:
            # A step has one micro-batch (`target_choice` sees to it): the others' targets would not
            # be known yet. All processes come here.
            sums = levels.moment_sums(stats, teacher.width)
            out["moments"] = levels.moments(reduce(sums, "sum"))
        return out, mask_inputs

    def _forward(
        self, teacher: Teacher, host: HostBatch, device: torch.device
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The teacher's L levels, each h (B, 1 + P, D) with its stats (B, 1 + P, 2), and its
        attention (B, P)."""
        images = _images(host[self._teacher_array], device)
        clock = StepClock(device)
        # as a cache's teacher ran, whatever the student runs in
        with torch.no_grad(), precision.autocast_for(teacher):
            ys, attention = teacher(images, self.spec.levels)
            meter.teacher(teacher.name, clock.seconds(), len(images))
            return [levels.normalise(y) for y in ys], attention

    def _mask_inputs(self, host: HostBatch, attention: Tensor) -> dict[str, Tensor]:
        out = {"attention": attention.float()}
        if "mask_order" in self.spec.fields:
            drawn = host.get("drawn", {}).get("order")
            if drawn is None:
                drawn = copy_page_locked(self.draw(host)["order"], attention.device)
            drawn = drawn.to(attention.device, non_blocking=True)
            out["mask_order"] = order_by(self.order, drawn, out["attention"])
        return out


def _images(pixels: Any, device: torch.device) -> Tensor:
    """Bring pixels (B, S, S, 3) to the device as images (B, 3, S, S)."""
    return copy_to_device(pixels, device).permute(0, 3, 1, 2).contiguous()
