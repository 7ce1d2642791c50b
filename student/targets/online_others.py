"""Beside the teacher in the loop others run in it: a tokenizer gives `token_ids`, a second teacher
`second`, as a cache that has their arrays would.

B batch, S pixels a side, P patches, D and E2 channels of the second teacher and of its target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from featcache.errors import UsageError, counted
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.models.tokenizer import TokenizerTeacher
from featcache.reading.feature_reader import FeatureReader
from featcache.reading.tensors import tail_tensors, tail_to_device
from featcache.runtime.device_clock import StepClock
from featcache.runtime.meter import meter
from featcache.targets import levels
from student.recipes import TargetSpec
from student.targets.assemble import recipe_targets


class OnlineNetwork(Protocol):
    """A network runs on views of its own size, of the same crop box as the student's."""

    field: str  # of the spec, which it gives in place of a cache
    array: str  # of its pixels in a batch

    @property
    def network(self) -> Teacher: ...
    @property
    def filter(self) -> str | None:
        """Return the filter that its views are resized by; None: the policy's."""
        ...

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Return what a recipe takes, for uint8 images (B, 3, S, S)."""
        ...


@dataclass
class OnlineTokens:
    """A tokenizer gives `token_ids` (B, P)."""

    network: TokenizerTeacher
    field: str
    spec: TargetSpec
    array = "tokenizer_pixels"

    def __post_init__(self) -> None:
        _check_patches(self.network, self.spec)
        if self.network.width > self.spec.vocabulary:
            raise UsageError(
                f"tokenizer {self.network.name!r} has {counted(self.network.width, 'token')}, "
                f"vocabulary={self.spec.vocabulary}; give vocabulary={self.network.width}"
            )

    @property
    def filter(self) -> str | None:
        return self.network.filter

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        clock = StepClock(images.device)
        with torch.no_grad(), precision.autocast_for(self.network):
            ids = self.network.ids(images).long()
        meter.teacher(self.network.name, clock.seconds(), len(images))
        return {"token_ids": ids}


@dataclass
class OnlineSecond:
    """A second teacher's one level becomes `second` (B, 1 + P, E2)."""

    network: Teacher
    field: str
    spec: TargetSpec
    # of a cache's codec, through which its level goes as if it had been stored
    stored_as: FeatureReader | None = None
    array = "second_pixels"
    filter = None

    def __post_init__(self) -> None:
        _check_patches(self.network, self.spec)
        self.tail: Mapping[str, Tensor] = (
            tail_tensors(self.network.tail()) if self.spec.derive else {}
        )

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        clock = StepClock(images.device)
        with torch.no_grad(), precision.autocast_for(self.network):
            (y,), _ = self.network(images, (self.spec.second_level,))
            meter.teacher(self.network.name, clock.seconds(), len(images))
            h, stats = levels.normalise(y)
        h, stats = h[:, None], stats[:, None]  # (B, 1, 1 + P, D)
        if self.stored_as is not None:
            h = self.stored_as.through_codec(h)
        self.tail = tail_to_device(self.tail, images.device)  # moved once, with the first batch
        spec = dataclasses.replace(self.spec, fields=())  # its statistics are asked of no recipe
        made = recipe_targets(spec, h, stats, self.tail)
        return {"second": made["targets"] if spec.derive else made["features"][:, 0]}


def _check_patches(network: Teacher, spec: TargetSpec) -> None:
    if network.patches != spec.patches:
        raise UsageError(
            f"{network.name} has {counted(network.patches, 'patch', 'patches')}, "
            f"{spec.patches} are needed; give one on "
            "that grid"
        )
