"""Targets are read from the rows of a cache.

n training pictures, B samples of a batch, L levels, P patches, E width of a derived target.
"""

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
from featcache.reading.tensors import copy_to_device, tail_to_device
from featcache.targets import derived
from featcache.targets import levels as target_levels
from featcache.views import render as view_render
from featcache.views.draw import DrawnViews, stored_view
from featcache.views.fingerprint import pixel_hash
from featcache.views.policy import policy_from_dict
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.assemble import pixel_layout, recipe_targets
from student.targets.contract import I64, HostBatch, Moments, ResidentRows

TOLERANCE_ADVICE = pixel_check.training_advice("--pixel-tolerance LEVELS")


@dataclass
class SecondTeacher:
    """The second teacher's one level is read from the same cache, and becomes `second`."""

    cache: Cache
    spec: TargetSpec

    def __post_init__(self) -> None:
        self.reader = FeatureReader(
            self.cache,
            self.spec.second,
            levels=(self.spec.second_level,),
            derive=self.spec.derive,
        )

    def fetch(
        self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Read its stored arrays (B, ...) of cache rows (B,), by the names that the cache has for
        them, into the memory of `out`."""
        memory = None if out is None else {name: out[name] for name in self.reader.fields}
        return self.cache.read(
            rows, view, self.reader.fields, (self.spec.second_level,), None, memory
        )

    def fetch_ahead(self, rows: I64, view: I64) -> bool:
        return self.cache.read_ahead(rows, view, self.reader.fields, (self.spec.second_level,))

    def to_device(self, host: HostBatch, device: torch.device) -> dict[str, Tensor]:
        """Return `second` (B, 1 + P, E) on the device."""
        reader = self.reader
        arrays = reader.to_device(host, device)
        h, stats = reader.features(arrays)[:, 0], reader.stats(arrays)
        if not self.spec.derive:
            return {"second": h}
        reader.tail = tail_to_device(reader.tail, device)  # moved once, with the first batch
        stats = None if stats is None else stats[:, 0]
        return {"second": derived.derive(self.spec.derive, h, reader.tail, stats)}


@dataclass
class CachedTargets:
    """Targets of the training pictures lie in `rows` (n,) of a cache.

    Recipes get features in image order whatever the order of the cache. From a ranked cache the
    first `tokens` of each level are enough where the stored order is the mask: one range of bytes a
    level, and NaN for what was not read.
    """

    cache: Cache
    spec: TargetSpec
    rows: I64  # (n,)
    tolerance: float = 0.0  # mean difference of block means, in levels of 255, that is let pass
    tokens: int | None = None  # of each level, CLS first; None: all that are stored
    stored_pixels: bool = False  # take the pixels the cache stores, decode nothing
    schedule: ViewSchedule | None = None  # of the views that are shown, where not all are
    is_stored = True

    def __post_init__(self) -> None:
        self.policy = policy_from_dict(self.cache.identity["policy"])
        wanted = self.spec.fields
        reader = FeatureReader(
            self.cache,
            levels=self.spec.levels or None,
            derive=self.spec.derive,
            stats="feature_stats" in wanted,
        )
        self.reader = reader if "features" in wanted else None
        self.second = SecondTeacher(self.cache, self.spec) if self.spec.second else None
        self.resident: ResidentRows | None = None
        coded = self.reader.fields if self.reader else ()
        side = (field for field in wanted if field.rpartition("/")[2] != "features")
        pixels = ("pixels",) if self.stored_pixels else DrawnViews._fields
        # the arrays that are read, once each, without those of the second teacher and with them
        self.own_fields = tuple(dict.fromkeys((*coded, *side, *pixels)))
        self.fields = (*self.own_fields, *(self.second.reader.fields if self.second else ()))

    def layout(self) -> buffers.Layout:
        rendered = {} if self.stored_pixels else pixel_layout(self.policy.size)
        return dict(self.stored_layout()) | rendered

    def stored_layout(self) -> buffers.Layout:
        """Return shape and dtype of one sample of all that is read of the cache."""
        nothing = self._read(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
        return {name: (array.shape[1:], array.dtype) for name, array in nothing.items()}

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        if self.schedule is None:
            return stored_view(digests, rounds, self.cache.views)
        return self.schedule.view(digests, rounds)

    @property
    def is_io_bound(self) -> bool:
        return self.stored_pixels and self.resident is None

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        if self.resident is not None:
            return self.resident.fetch(indices, view, out)
        return self._read(self.rows[indices], view, out)

    def _read(self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None) -> HostBatch:
        fields, levels = self.own_fields, self.spec.levels or None
        memory = None if out is None else {name: out[name] for name in fields}
        host = self.cache.read(rows, view, fields, levels, self.tokens, memory)
        for name in self._token_fields:
            _check_token_ids(host[name], self.spec.vocabulary)
        return host if self.second is None else host | self.second.fetch(rows, view, out)

    def fetch_ahead(self, indices: I64, view: I64) -> bool:
        """Fetch from an object store what `fetch` will read; False where there is no room yet."""
        if self.resident is not None:
            return True
        rows, second = self.rows[indices], self.second
        fields, levels = self.own_fields, self.spec.levels or None
        done = self.cache.read_ahead(rows, view, fields, levels, self.tokens)
        return done and (second is None or second.fetch_ahead(rows, view))

    @property
    def moments(self) -> Moments | None:
        return self._moments if self.spec.moments else None

    def _moments(self, indices: I64, view: I64) -> npt.NDArray[np.float32]:
        field, levels = "feature_stats", self.spec.levels or None
        if self.resident is not None:
            stats = self.resident.take(field, indices, view)
        else:
            stats = self.cache.read(self.rows[indices], view, (field,), levels)[field]
        width = self.cache.identity["teacher"]["width"]
        return target_levels.moments(target_levels.moment_sums(stats, width))

    def step_metrics(self, indices: I64) -> dict[str, int]:
        return {}

    def mask_inputs(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return {
            name: host[name] for name in ("attention", "mask_order") if name in self.spec.fields
        }

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        parts = (host["crop"][i], host["flip"][i], host["jitter"][i])
        return {"pixels": view_render.render(picture, *parts, self.policy.size, self.policy.filter)}

    def pixel_hashes(self, indices: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        # The hash's own checksum is left to `check_pixels`, which looks into every difference.
        stored = self.cache.read(self.rows[indices], view, ("pixel_hash",), check=False)
        return stored["pixel_hash"]

    def check_pixels(
        self, pixels: npt.NDArray[np.uint8], index: int, view: int, stored_hash: int
    ) -> None:
        if pixel_hash(pixels) == stored_hash:
            return
        row = int(self.rows[index])
        pixel_check.check_pixels(self.cache, row, view, pixels, self.tolerance, TOLERANCE_ADVICE)

    def draw(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return {}

    def device_arrays(self, host: HostBatch) -> tuple[str, ...]:
        names = [*(self.reader.fields if self.reader else ()), *self._token_fields]
        names += ["moments"] if "moments" in host else []
        names += self.second.reader.fields if self.second else ()
        return (*names, *self._undrawn(host))

    def to_device(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out: dict[str, Tensor] = {}
        for name in self._token_fields:
            out["token_ids"] = copy_to_device(host[name], device).long()
        if self.reader is not None:
            out |= self._features(self.reader, host, device)
        if "moments" in host:
            out["moments"] = copy_to_device(host["moments"], device)
        if self.second is not None:
            out |= self.second.to_device(host, device)
        rows = self._undrawn(host)
        return out, {name: copy_to_device(rows[name], device) for name in rows}

    def _undrawn(self, host: HostBatch) -> dict[str, Any]:
        """Return what the masks are drawn from, where they are not drawn yet."""
        return {} if "ids_keep" in host.get("drawn", {}) else self.mask_inputs(host)

    @property
    def _token_fields(self) -> tuple[str, ...]:
        # a tokenizer's part of a cache: NAME/token_ids
        return tuple(name for name in self.spec.fields if name.rpartition("/")[2] == "token_ids")

    def _features(
        self, reader: FeatureReader, host: HostBatch, device: torch.device
    ) -> dict[str, Tensor]:
        arrays = reader.to_device(host, device)
        reader.tail = tail_to_device(reader.tail, device)  # moved once, with the first batch
        visible = host.get("drawn", {}).get("ids_keep") if self.spec.visible_only else None
        visible = None if visible is None else visible.to(device, non_blocking=True)
        features, stats = reader.features(arrays, visible), reader.stats(arrays)
        return recipe_targets(self.spec, features, stats, reader.tail, visible)


def _check_token_ids(ids: npt.NDArray[np.unsignedinteger], vocabulary: int) -> None:
    """Raise UserError where ids (B, P) hold one that the recipe has no class for."""
    if ids.size and int(ids.max()) >= vocabulary:
        raise UserError(
            f"cannot predict token id {int(ids.max())} of the cache: vocabulary={vocabulary}; "
            "allowed: a vocabulary above every id; give vocabulary=N of the tokenizer that made "
            "them"
        )
