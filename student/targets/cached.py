"""Targets are read from the rows of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UserError
from featcache.reading import pixel_check
from featcache.reading.cache import Cache
from featcache.reading.crop_range import ViewSchedule
from featcache.reading.feature_reader import FeatureReader
from featcache.reading.tensors import tail_to_device, to_tensor
from featcache.targets import derived
from featcache.targets import levels as target_levels
from featcache.targets.codecs import Codec
from featcache.views import render as view_render
from featcache.views.draw import DrawnViews, stored_view
from featcache.views.fingerprint import pixel_hash
from featcache.views.policy import policy_from_dict
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.assemble import copied_to, pixel_layout, recipe_targets
from student.targets.contract import I64, HostBatch, Moments, ResidentRows


@dataclass
class SecondTeacher:
    """What is read of the second teacher, and what becomes of it."""

    cache: Cache
    spec: TargetSpec

    def __post_init__(self) -> None:
        self.reader = FeatureReader(self.cache, self.spec.second, derive=self.spec.derive)

    def fetch(
        self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Its stored arrays of the rows, by the names that the cache has for them, in the memory of
        `out`."""
        memory = None if out is None else {name: out[name] for name in self.reader.fields}
        return self.cache.read(
            rows, view, self.reader.fields, (self.spec.second_level,), None, memory
        )

    def complete(self, host: HostBatch, device: torch.device) -> dict[str, Tensor]:
        """`second` (B,1+P,E) on the device."""
        arrays = self.reader.to_device(host, device)
        h, stats = self.reader.features(arrays)[:, 0], self.reader.stats(arrays)
        if not self.spec.derive:
            return {"second": h}
        std = None if stats is None else stats[:, 0, :, 1:]
        return {
            "second": derived.derive(
                self.spec.derive, h, tail_to_device(self.reader.tail, device), std
            )
        }


@dataclass
class CachedTargets:
    """Rows of a cache: `rows` (n,) joins training picture and cache row.

    Recipes get features in image order whatever the cache's. From a ranked cache the first `tokens`
    of each level are enough where the stored order is the mask: one range of bytes a level, and NaN
    for what was not read.
    """

    cache: Cache
    spec: TargetSpec
    rows: I64
    tolerance: float = 0.0  # mean difference of block means, in levels of 255, that is let pass
    tokens: int | None = None  # of each level, CLS first; None: all that are stored
    stored_pixels: bool = False  # take the pixels the cache stores, decode nothing
    schedule: ViewSchedule | None = None  # of the views that are shown, where not all are
    is_stored = True

    def __post_init__(self) -> None:
        self.policy = policy_from_dict(self.cache.identity["policy"])
        wants = self.spec.fields
        reader = FeatureReader(self.cache, derive=self.spec.derive, stats="feature_stats" in wants)
        self.reader = reader if "features" in wants else None
        self.second = SecondTeacher(self.cache, self.spec) if self.spec.second else None
        side = [field for field in wants if field.rpartition("/")[2] != "features"]
        pixels = ("pixels",) if self.stored_pixels else DrawnViews._fields
        self.own = tuple(
            dict.fromkeys((*(self.reader.fields if self.reader else ()), *side, *pixels))
        )
        self.reads = self.own if self.second is None else (*self.own, *self.second.reader.fields)
        self.resident: ResidentRows | None = None

    def layout(self) -> buffers.Layout:
        return dict(self.stored_layout()) | (
            {} if self.stored_pixels else pixel_layout(self.policy.size)
        )

    def stored_layout(self) -> buffers.Layout:
        """Shape and type of one sample of all that is read of the cache."""
        nothing = self._read(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
        return {name: (array.shape[1:], array.dtype) for name, array in nothing.items()}

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        return (
            self.schedule.view(digests, rounds)
            if self.schedule
            else stored_view(digests, rounds, self.cache.views)
        )

    @property
    def codec(self) -> Codec | None:
        """The codec of the features; None where the recipe reads none."""
        return self.reader.codec if self.reader else None

    @property
    def only_read(self) -> bool:
        return self.stored_pixels and self.resident is None

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        return (
            self._read(self.rows[at], view, out)
            if self.resident is None
            else self.resident.fetch(at, view, out)
        )

    def _read(self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None) -> HostBatch:
        memory = None if out is None else {name: out[name] for name in self.own}
        host = self.cache.read(rows, view, self.own, self.spec.levels or None, self.tokens, memory)
        return host if self.second is None else host | self.second.fetch(rows, view, out)

    @property
    def moments(self) -> Moments | None:
        return self._moments if self.spec.moments else None

    def _moments(self, at: I64, view: I64) -> npt.NDArray[np.float32]:
        field, levels = "feature_stats", self.spec.levels or None
        known = self.resident
        stats = (
            known.take(field, at, view)
            if known
            else self.cache.read(self.rows[at], view, (field,), levels)[field]
        )
        return target_levels.moments(
            target_levels.moment_sums(stats, self.cache.identity["teacher"]["width"])
        )

    def noted(self, at: I64) -> dict[str, int]:
        return {}

    def sources(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return {
            name: host[name] for name in ("attention", "mask_order") if name in self.spec.fields
        }

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        parts = (host["crop"][i], host["flip"][i], host["jitter"][i])
        return {"pixels": view_render.render(picture, *parts, self.policy.size, self.policy.filter)}

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        # Its own checksum is left to `check`, which looks into every difference.
        return self.cache.read(self.rows[at], view, ("pixel_hash",), check=False)["pixel_hash"]

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        if pixel_hash(pixels) == stored:
            return
        option = "--pixel-tolerance LEVELS"
        pixel_check.check_pixels(
            self.cache, int(self.rows[at]), view, pixels, self.tolerance, option
        )

    def complete(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        out = {}
        for field in self.spec.fields:
            # a tokenizer's part of a cache: NAME/token_ids
            if field.rpartition("/")[2] == "token_ids":
                out["token_ids"] = _token_ids(host[field], self.spec.vocabulary).to(
                    device, non_blocking=True
                )
        if self.reader is not None:
            arrays = self.reader.to_device(host, device)
            features, stats = self.reader.features(arrays), self.reader.stats(arrays)
            self.reader.tail = tail_to_device(self.reader.tail, device)
            seen = (
                host["masks"]["ids_keep"].to(device)
                if self.spec.visible_only and "masks" in host
                else None
            )
            out |= recipe_targets(self.spec, features, stats, self.reader.tail, seen)
        if "moments" in host:
            out["moments"] = copied_to(host["moments"], device)
        if self.second is not None:
            out |= self.second.complete(host, device)
        return out, self.sources(host)


def _token_ids(ids: npt.NDArray[np.unsignedinteger], vocabulary: int) -> Tensor:
    """ids (B,P) as stored -> int64; an id that the recipe has no class for is refused."""
    if ids.size and int(ids.max()) >= vocabulary:
        raise UserError(
            f"cannot predict token id {int(ids.max())} of the cache: vocabulary={vocabulary}; "
            "allowed: a vocabulary above every id; give vocabulary=N of the tokenizer that made "
            "them"
        )
    return to_tensor(ids).long()
