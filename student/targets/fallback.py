"""Targets are read from a cache, and the teacher in the loop computes those of absent shards
(`--fallback online`).

Views, masks and codec are those of the cache, so that a picture's target is the one that its shard
would hold. Batches without such pictures cost nothing more. n training pictures, B batch.
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
from featcache.errors import IdentityError, UsageError, UserError, command_line, counted
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.reading.tensors import copy_to_device
from featcache.storage import picture_lists
from featcache.views import pixel_path
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.assemble import copy_page_locked
from student.targets.cached import CachedTargets
from student.targets.contract import I64, HostBatch
from student.targets.online import TEACHER_FIELDS, OnlineTargets

Bool = npt.NDArray[np.bool_]
LIMIT = 0.01  # share of the training pictures that may be absent


@dataclass
class FallbackTargets:
    """Targets of pictures whose shard is absent, -1 in `cached.rows`, come from `online`, as the
    cache would give them."""

    cached: CachedTargets
    online: OnlineTargets
    is_stored = True
    stored_pixels = is_io_bound = False
    moments = None

    def __post_init__(self) -> None:
        self.policy = self.cached.policy
        self.absent = self.cached.rows < 0

    def layout(self) -> buffers.Layout:
        return {**self.cached.layout(), **self.online.layout()}

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        return self.cached.view(digests, rounds)

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Read what the cache has, and `absent` (B,): of these pictures every float is NaN, until
        the teacher has run."""
        absent = self.absent[indices]
        if not absent.any():
            return self.cached.fetch(indices, view, out) | {"absent": absent}
        if out is None:
            out = buffers.allocate(self.cached.stored_layout(), len(indices), False)
        host: HostBatch = {"absent": absent}
        for name, values in self.cached.fetch(indices[~absent], view[~absent]).items():
            out[name][~absent] = values
            out[name][absent] = np.nan if values.dtype.kind == "f" else 0
            host[name] = out[name]
        return host

    def step_metrics(self, indices: I64) -> dict[str, int]:
        return {"fallback": int(self.absent[indices].sum())}

    def mask_inputs(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return self.cached.mask_inputs(host)

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        targets = self.online if host["absent"][i] else self.cached
        return targets.render(picture, host, i, key, digest, view)

    def pixel_hashes(self, indices: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        """Return 0 for what is absent, which is not checked."""
        out, stored = np.zeros(len(indices), np.uint64), ~self.absent[indices]
        if stored.any():
            out[stored] = np.asarray(self.cached.pixel_hashes(indices[stored], view[stored]))
        return out

    def check_pixels(
        self, pixels: npt.NDArray[np.uint8], index: int, view: int, stored_hash: int
    ) -> None:
        if not self.absent[index]:
            self.cached.check_pixels(pixels, index, view, stored_hash)

    def draw(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return self.online.draw(host) if host["absent"].any() else {}

    def device_arrays(self, host: HostBatch) -> tuple[str, ...]:
        online = self.online.device_arrays(host) if host["absent"].any() else ()
        return (*self.cached.device_arrays(host), *online)

    def to_device(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out, mask_inputs = self.cached.to_device(host, device)
        absent = np.flatnonzero(host["absent"])
        if not len(absent):
            return out, mask_inputs
        index = copy_page_locked(absent, device)
        fresh, fresh_inputs = self._compute(host, absent, index)
        assert fresh.keys() == out.keys(), (fresh.keys(), out.keys())
        for name, values in out.items():
            out[name] = values.index_copy(0, index, fresh[name].to(values.dtype))
        for name, values in mask_inputs.items():
            mask_inputs[name] = values.index_copy(0, index, fresh_inputs[name].to(values.dtype))
        return out, mask_inputs

    def _compute(
        self, host: HostBatch, absent: I64, index: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Targets and mask inputs of the samples `absent` of a batch, by the teacher; `index` says
        on the device which they are."""
        device = index.device
        own: HostBatch = {name: host[name][absent] for name in ("digests", "view") if name in host}
        for name in self.online.device_arrays(host):
            own[name] = copy_to_device(host[name], device).index_select(0, index)
        if "order" in (drawn := host.get("drawn", {})):
            order = drawn["order"].to(device, non_blocking=True)
            own["drawn"] = {"order": order.index_select(0, index)}
        return self.online.to_device(own, device)


def check_spec(spec: TargetSpec) -> None:
    """Raise UsageError where a recipe needs what the teacher cannot compute for some of a batch's
    pictures."""
    others = sorted(set(spec.fields) - set(TEACHER_FIELDS))
    wrong = {
        "target_norm=bn wants statistics of the whole batch as it is stored": spec.moments,
        f"the recipe learns from {spec.second} too, and only the cache's own teacher is "
        "run": spec.second,
        f"the teacher makes no {', '.join(others)}": others,
    }
    for text, found in wrong.items():
        if found:
            raise UsageError(
                f"--fallback online does not do: {text}; leave it out and run `featcache repair`"
            )


def join(cache: Cache, source: Source, limit: float) -> tuple[I64, I64, int]:
    """(pictures (n,), rows (n,), skipped): join pictures with cache rows by key, as
    `reading.join.join_by_key` does, with row -1 for the pictures of absent shards.

    The source's order tells which pictures these are: it must be the list that the cache was made
    from. More than a share `limit` of them are a UserError.
    """
    pixel_path.check_pixel_path(source, cache.identity["pixel_path"], f"cache {str(cache.path)!r}")
    _check_same_list(cache, source)
    quarantined = {row["key"] for row in cache.quarantined}
    usable = np.array([key not in quarantined for key in source.keys])
    absent = _in_absent_shards(cache, len(source)) & usable
    rows = cache.keys.find(source.keys)
    _check_known(cache, source, (rows >= 0) | absent | ~usable)
    pictures = np.flatnonzero((rows >= 0) | absent)
    _check_share(cache, int(absent.sum()), len(pictures), limit)
    return pictures, rows[pictures], len(source) - len(pictures)


def _check_same_list(cache: Cache, source: Source) -> None:
    if not picture_lists.match(picture_lists.lists(cache.identity), source.keys):
        raise IdentityError(
            f"--fallback online: the {counted(len(source), 'picture')} of "
            f"{source.spec!r} are not the list "
            f"that cache {str(cache.path)!r} was made from, so those of its absent shards are not "
            "known; give that list"
        )


def _in_absent_shards(cache: Cache, count: int) -> Bool:
    """(count,): whether each picture of the source lies in a shard that is absent."""
    absent = np.zeros(count, bool)
    for shard in cache.manifest["shards"]:
        if shard["name"] in cache.absent:
            absent[shard["first"] : shard["first"] + shard["count"]] = True
    return absent


def _check_known(cache: Cache, source: Source, known: Bool) -> None:
    if (unknown := np.flatnonzero(~known)).size:
        raise IdentityError(
            f"{len(unknown)} of {counted(len(source), 'picture')} of {source.spec!r} "
            "are neither in cache "
            f"{str(cache.path)!r} nor in its absent shards, the first is "
            f"{source.keys[unknown[0]]!r}; run `{command_line('featcache', 'verify', cache.path)}`"
        )


def _check_share(cache: Cache, count: int, n: int, limit: float) -> None:
    if not count <= limit * n:
        raise UserError(
            f"{absent_text(cache)}: {count} of {counted(n, 'picture')} "
            f"({count / n:.4g}) would have their "
            f"targets computed, allowed: {limit:g}; run "
            f"`{command_line('featcache', 'repair', cache.path)}`, or allow "
            f"it with --fallback-limit {np.ceil(1000 * count / n) / 1000:g}"
        )


def absent_text(cache: Cache) -> str:
    """Say in words which shards are absent."""
    shard, why = next(iter(cache.absent.items()))
    many = (
        f"{len(cache.absent)} of "
        f"{counted(len(cache.manifest['shards']), 'shard is', 'shards are')} absent"
    )
    return f"cache {str(cache.path)!r}: {many}, the first is {shard} ({why.partition('; run ')[0]})"
