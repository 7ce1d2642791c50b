"""Targets are computed by the teacher in the loop; no cache is read."""

from __future__ import annotations

from collections.abc import Mapping
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
from featcache.reading.tensors import tail_tensors, tail_to_device, to_tensor
from featcache.targets import codecs, levels
from featcache.targets.attention import mask_order
from featcache.views import render as view_render
from featcache.views.draw import draw_views, stored_view
from featcache.views.policy import Policy
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.assemble import pixel_layout, recipe_targets
from student.targets.contract import I64, HostBatch


@dataclass
class OnlineTargets:
    """Views drawn on the spot and, where the recipe needs targets, the teacher run on them: no
    cache is read."""

    policy: Policy
    spec: TargetSpec
    teacher: Teacher | None
    views: int | None  # as many as a cache would hold; None: a fresh view each epoch
    order: str = "attentive"  # of `mask_order`
    schedule: ViewSchedule | None = (
        None  # of the views of a cache that are shown, where not all are
    )
    # of a cache, through which features go as if they had been stored
    codec: codecs.Codec | None = None
    is_stored = False
    stored_pixels = only_read = False
    moments = None

    def __post_init__(self) -> None:
        lacking = set(self.spec.fields) - {"features", "feature_stats", "attention", "mask_order"}
        if lacking:
            raise UsageError(
                f"--teacher online computes no {', '.join(sorted(lacking))}; allowed: features and "
                "what derives from them; give a cache that holds it with --cache"
            )
        self.tail = (
            tail_tensors(self.teacher.tail())
            if self.teacher is not None and self.spec.derive
            else {}
        )

    def layout(self) -> buffers.Layout:
        return pixel_layout(self.policy.size) | (
            pixel_layout(self.teacher_px, "teacher_pixels") if self.teacher_px else {}
        )

    @property
    def teacher_px(self) -> int:
        """The size the teacher wants where it is not the student's, else 0."""
        return (
            self.teacher.input_px
            if self.teacher is not None and self.teacher.input_px != self.policy.size
            else 0
        )

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        if self.schedule is not None:
            return self.schedule.view(digests, rounds)
        if self.views is None:
            return np.broadcast_to(np.asarray(rounds, np.int64), len(digests)).copy()
        return stored_view(digests, rounds, self.views)

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        return {}

    def noted(self, at: I64) -> dict[str, int]:
        return {}

    def sources(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return {}

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        size = np.array([(picture.height, picture.width)])
        drawn = draw_views(self.policy, digest[None], size, [view])
        parts = (drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0])
        out = {"pixels": view_render.render(picture, *parts, self.policy.size, self.policy.filter)}
        if self.teacher_px:
            out["teacher_pixels"] = view_render.render(
                picture, *parts, self.teacher_px, self.policy.filter
            )
        return out

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        return None

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        """Nothing is stored that the pixels could differ from."""

    def complete(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        if self.teacher is None:
            return {}, {}
        pixels = (
            torch.from_numpy(host.get("teacher_pixels", host["pixels"]))
            .to(device)
            .permute(0, 3, 1, 2)
        )
        # as a cache's teacher ran, whatever the student runs in
        with torch.no_grad(), precision.autocast_for(self.teacher):
            ys, attention = self.teacher(pixels.contiguous(), self.spec.levels)
            pairs = [levels.normalise(y) for y in ys]
        weights = attention.float().cpu().numpy()
        sources = {"attention": weights}
        if "mask_order" in self.spec.fields:
            args = (host["digests"], host["view"], self.policy.seed)
            sources["mask_order"] = mask_order(self.order, weights, *args)
        if not pairs:
            return {}, sources
        features, stats = (torch.stack(each, 1) for each in zip(*pairs, strict=True))
        features = (
            features if self.codec is None else self.codec.decode(self.codec.encode(features))
        )
        self.tail = tail_to_device(self.tail, device)
        out = recipe_targets(self.spec, features, stats, self.tail)
        return out | ({"moments": self._moments(stats)} if self.spec.moments else {}), sources

    def _moments(self, stats: Tensor) -> Tensor:
        """stats (B,L,1+P,2) -> (L,2) over the batches of all processes, which all come here. A step
        has one micro-batch (origin.choose sees to it): the others' targets would not be known
        yet."""
        assert self.teacher is not None
        own = torch.from_numpy(levels.moment_sums(stats.cpu().numpy(), self.teacher.width)).to(
            stats.device
        )
        return to_tensor(levels.moments(reduce(own, "sum").cpu().numpy())).to(stats.device)
