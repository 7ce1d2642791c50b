"""`--fallback online`: a cache some shards of which are not there, and the teacher in the loop for
their pictures.

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
from featcache.errors import IdentityError, UsageError, UserError
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.views import pixel_path
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.cached import CachedTargets
from student.targets.contract import I64, HostBatch
from student.targets.online import OnlineTargets

LIMIT = 0.01  # share of the training pictures that may be absent
# fields that the teacher in the loop gives
MADE = {"features", "feature_stats", "attention", "mask_order"}


@dataclass
class FallbackTargets:
    """`cached.rows` is -1 where a picture's shard is absent; `online` gives what the cache
    would."""

    cached: CachedTargets
    online: OnlineTargets
    is_stored = True
    stored_pixels = only_read = False
    moments = None

    def __post_init__(self) -> None:
        self.policy = self.cached.policy
        self.absent = self.cached.rows < 0

    def layout(self) -> buffers.Layout:
        return {**self.cached.layout(), **self.online.layout()}

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        return self.cached.view(digests, rounds)

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """As of the cache, and `absent` (B,): of these pictures every float is NaN, until the
        teacher has run."""
        absent = self.absent[at]
        if not absent.any():
            return self.cached.fetch(at, view, out) | {"absent": absent}
        memory = (
            buffers.allocate(self.cached.stored_layout(), len(at), False) if out is None else out
        )
        host = {}
        for name, values in self.cached.fetch(at[~absent], view[~absent]).items():
            memory[name][~absent] = values
            memory[name][absent] = np.nan if values.dtype.kind == "f" else 0
            host[name] = memory[name]
        return host | {"absent": absent}

    def noted(self, at: I64) -> dict[str, int]:
        return {"fallback": int(self.absent[at].sum())}

    def sources(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        return self.cached.sources(host)

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        way = self.online if host["absent"][i] else self.cached
        return way.render(picture, host, i, key, digest, view)

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        """0 for what is absent, which is not checked."""
        out, there = np.zeros(len(at), np.uint64), ~self.absent[at]
        if there.any():
            out[there] = np.asarray(self.cached.hashes(at[there], view[there]))
        return out

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        if not self.absent[at]:
            self.cached.check(pixels, at, view, stored)

    def complete(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        out, sources = self.cached.complete(host, device)
        here = np.flatnonzero(host["absent"])
        if not len(here):
            return out, sources
        names = [name for name in ("pixels", "teacher_pixels", "digests", "view") if name in host]
        fresh, fresh_sources = self.online.complete(
            {name: host[name][here] for name in names}, device
        )
        assert fresh.keys() == out.keys(), (fresh.keys(), out.keys())
        index = torch.from_numpy(here).to(device)
        for name, values in fresh.items():
            out[name] = out[name].index_copy(0, index, values.to(out[name].dtype))
        for name in sources:  # a copy: the batch's own memory is filled again
            sources[name] = sources[name].copy()
            sources[name][here] = fresh_sources[name]
        return out, sources


def check_spec(spec: TargetSpec) -> None:
    """What cannot be made for some of a batch's pictures."""
    others = sorted(set(spec.fields) - MADE)
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
    """As `joining.join`, with row -1 for the pictures of absent shards, which the source's order
    tells: it must be the list of pictures that the cache was made from. More than `limit` of them
    are a UserError."""
    pixel_path.check_pixel_path(source, cache.identity["pixel_path"], f"cache {str(cache.path)!r}")
    if manifest.keys_digest(source.keys) != cache.identity["pictures"]["keys_digest"]:
        raise IdentityError(
            f"--fallback online: the {len(source)} pictures of {source.spec!r} are not the list "
            f"that cache {str(cache.path)!r} was made from, so those of its absent shards are not "
            "known; give that list"
        )
    quarantined = {row["key"] for row in cache.quarantined}
    usable = np.array([key not in quarantined for key in source.keys])
    absent = np.zeros(len(source), bool)
    for shard in cache.manifest["shards"]:
        if shard["name"] in cache.absent:
            absent[shard["first"] : shard["first"] + shard["count"]] = True
    absent &= usable
    rows = cache.keys.find(source.keys)
    if (strange := np.flatnonzero((rows < 0) & usable & ~absent)).size:
        raise IdentityError(
            f"{len(strange)} of {len(source)} pictures of {source.spec!r} are neither in cache "
            f"{str(cache.path)!r} nor in its absent shards, the first is "
            f"{source.keys[strange[0]]!r}; run `featcache verify {cache.path}`"
        )
    pictures = np.flatnonzero((rows >= 0) | absent)
    count = int(absent.sum())
    if not count <= limit * len(pictures):
        raise UserError(
            f"{absent_text(cache)}: {count} of {len(pictures)} pictures "
            f"({count / len(pictures):.4g}) would have their targets computed, allowed: {limit:g}; "
            f"run `featcache repair {cache.path}`, or allow it with --fallback-limit "
            f"{np.ceil(1000 * count / len(pictures)) / 1000:g}"
        )
    return pictures, rows[pictures], len(source) - len(pictures)


def absent_text(cache: Cache) -> str:
    """Which shards are absent, in words."""
    shard, why = next(iter(cache.absent.items()))
    many = f"{len(cache.absent)} of {len(cache.manifest['shards'])} shards are absent"
    return f"cache {str(cache.path)!r}: {many}, the first is {shard} ({why.partition('; run ')[0]})"
