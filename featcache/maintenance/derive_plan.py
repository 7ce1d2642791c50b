"""What is derived from a cache is planned: for each part of it that is wanted, the manifest of the
new cache and the change that its levels go through.

n items (row, view), L levels, T stored tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import featcache
from featcache.errors import UsageError, UserError, counted
from featcache.extraction.forward import rank_tokens
from featcache.extraction.layout import level_arrays
from featcache.extraction.options import parse_keep
from featcache.maintenance.transfer_plan import (
    Target,
    TransferJob,
    flat_cache_jobs,
    whole_cache_jobs,
)
from featcache.reading.cache import Cache
from featcache.storage import checksums
from featcache.storage import manifest as manifests
from featcache.storage.files import address
from featcache.storage.part import cache_root
from featcache.storage.store import FORMAT, array_from_dict
from featcache.targets.codec_names import LOSSLESS
from featcache.targets.codecs import get_codec

Items = dict[str, npt.NDArray[Any]]
WITH_TOKENS = ("features", "feature_stats")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Say what the new cache is to have; None: what the old one has."""

    levels: tuple[int, ...] | None = None
    views: int | None = None
    tokens: str | None = None
    keep: str | None = None  # a number of patches, or a share of them
    codec: str | None = None


@dataclass(frozen=True)
class LevelChange:
    """Change the levels of rows: which tokens are stored in which order, and in which codec. The
    identities are those of the old part and of the new one; the states those of their codecs, of
    the levels of the new one."""

    old: Mapping[str, Any]
    new: Mapping[str, Any]
    old_state: Mapping[str, Tensor]
    new_state: Mapping[str, Tensor]

    def apply(self, items: Items) -> Items:
        """Return the items (n, ...) of the new cache, but for checksums."""
        stored = {name: self._tokens(items[name], items["mask_order"]) for name in WITH_TOKENS}
        if self.old["codec"] == self.new["codec"]:
            return {**items, **stored}
        h = torch.from_numpy(stored.pop("features"))  # lossless: `_wished` sees to it
        coded = get_codec(self.new["codec"]).encode(h, self.new_state)
        return {**items, **stored, **{name: each.numpy() for name, each in coded.items()}}

    def _tokens(
        self, values: npt.NDArray[Any], order: npt.NDArray[np.unsignedinteger]
    ) -> npt.NDArray[Any]:
        """Bring tokens (n, L, T, ...) into the new order, those that are stored."""
        count = 1 + int(self.new.get("keep", self.new["teacher"]["patches"]))
        ranked = {"raster": False, "ranked": True}
        match ranked[self.old["tokens"]], ranked[self.new["tokens"]]:
            case False, True:
                return rank_tokens(values, order, count)
            case True, False:
                return _unrank(values, order)
        return np.ascontiguousarray(values[:, :, :count])

    def levels(self, items: Items) -> Tensor:
        """Return the levels (n, L, T, D) float16 that the new codec encodes."""
        return torch.from_numpy(self._tokens(items["features"], items["mask_order"]))


def _unrank(values: npt.NDArray[Any], order: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[Any]:
    """Turn (n, L, 1 + P, ...), ranked by `order` (n, P), into image order."""
    out = values.copy()
    for item, ranks, target in zip(values, order, out, strict=True):
        target[:, 1 + ranks.astype(np.intp)] = item[:, 1:]
    return out


def derive_jobs(source: Cache, out: Path, wish: Wish) -> tuple[list[TransferJob], list[str]]:
    """Return (jobs, what is left out in words): of the cache and all that was added to it, or with
    levels or views of one flat cache of its own teacher."""
    jobs, left = _transfers(source, out, wish, Target(source.identity["store"], FORMAT))
    changed = [_changed(job, source, wish) for job in jobs]
    if all(_same(job) for job in changed):
        raise UsageError(
            f"derive: {str(source.path)!r} has all of this already; say what is to differ with "
            "--codec, --tokens, --keep, --levels or --views, or copy it with `featcache copy`"
        )
    return [_placed(job, out) for job in changed], left


def job_again(
    source: Cache, part: Path, wish: Wish, about: Mapping[str, Any]
) -> TransferJob | None:
    """Return the job that gives a part that was derived before, as it is written now; None where
    there is none. The wish is of this part alone."""
    target = Target(about["identity"]["store"], about["format"], about.get("compression", ""))
    jobs, _ = _transfers(source, cache_root(part), wish, target)
    wanted = _without(about["identity"], "pictures")  # a copy may have some of the shards
    for job in jobs:
        if all(job.identity.get(name) == wanted.get(name) for name in _OF_PART):
            changed = _changed(job, source, wish)
            same = _without(changed.identity, "pictures") == wanted
            if same and changed.manifest["arrays"] == about["arrays"]:
                return replace(changed, out=part, manifest=dict(about))
    return None


_OF_PART = ("teacher", "levels", "views", "first_view")


def _transfers(
    source: Cache, out: Path, wish: Wish, target: Target
) -> tuple[list[TransferJob], list[str]]:
    """Plan what is wanted of the source, as it is."""
    if wish.levels is None and wish.views is None:
        return whole_cache_jobs(source, out, target)
    return flat_cache_jobs(source, out, target, views=wish.views, levels=wish.levels)


def _without(identity: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key != name}


def _same(job: TransferJob) -> bool:
    old, new = job.source.identity, job.identity
    return old == _without(new, "parent")


def _changed(job: TransferJob, source: Cache, wish: Wish) -> TransferJob:
    """Return the job of one part, with what it becomes."""
    about = job.manifest
    identity = {**about["identity"], "parent": source.manifest["id"]}
    if "features" in about["arrays"]:
        identity = _wished(identity, job.source, wish)
    arrays = _arrays(about["arrays"], identity)
    versions = {**about["provenance"].get("versions", {}), "featcache": featcache.__version__}
    provenance = {
        **about["provenance"],
        "versions": versions,
        "derived_from": address(source.path),
        "statistics": "of stored numbers",
        **({"merged": True} if wish.levels or wish.views else {}),
    }
    made = manifests.make(identity, provenance, arrays, about["shards"], {}, format=about["format"])
    made |= {name: about[name] for name in ("files", "compression") if name in about}
    recount = "features" in arrays
    return replace(job, manifest=made, as_files=False, recount=recount)


def _wished(identity: dict[str, Any], part: Cache, wish: Wish) -> dict[str, Any]:
    """Return the identity with the tokens and the codec that are wished for; UserError or
    UsageError for what the old part cannot give."""
    old, where = part.identity, f"derive: {str(part.path)!r}"
    tokens = wish.tokens or old["tokens"]
    patches, there = old["teacher"]["patches"], old.get("keep", old["teacher"]["patches"])
    if wish.keep is not None and tokens != "ranked":
        raise UsageError(
            f"--keep {wish.keep} keeps the first of ranked tokens: give --tokens ranked with it"
        )
    keep = parse_keep(wish.keep, patches) if wish.keep is not None else old.get("keep")
    if (keep or patches) > there or (tokens == "raster" and "keep" in old):
        raise UserError(
            f"{where} keeps the first {there} of {counted(patches, 'patch', 'patches')} "
            "of each view: give --keep of at "
            f"most {there} and --tokens ranked, or extract again"
        )
    codec = wish.codec or old["codec"]
    get_codec(codec).arrays(old["teacher"]["width"])
    if codec != old["codec"] != LOSSLESS:
        raise UserError(
            f"{where} keeps its levels in {old['codec']}, which is lossy: {codec} is derived from "
            f"levels in {LOSSLESS}; give a cache that has them, or extract again"
        )
    changed = {**identity, "tokens": tokens, "codec": codec}
    changed.pop("keep", None)
    return changed if keep is None else {**changed, "keep": keep}


def _arrays(old: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of the new part, with their checksums."""
    specs = [array_from_dict(name, facts) for name, facts in old.items()]
    specs = [spec for spec in specs if spec.name not in checksums.NAMES]
    patches, levels = identity["teacher"]["patches"], len(identity["levels"])
    tokens = 1 + identity.get("keep", patches)
    if "features" in old:
        own = level_arrays(identity["codec"], identity["teacher"]["width"], levels, tokens)
        specs = [*own, *(spec for spec in specs if spec.name not in WITH_TOKENS)]
    ranked = identity["tokens"] == "ranked"
    sums = checksums.checksum_arrays(specs, levels, tokens, ranked=ranked)
    return {spec.name: spec.as_dict() for spec in (*specs, *sums)}


def _placed(job: TransferJob, out: Path) -> TransferJob:
    """Put an addition below parts/ in a folder that ends with the digest of its new identity."""
    if job.out == out:
        return job
    old = manifests.digest(job.source.identity)[:8]
    name = job.source.path.name.removesuffix(old) + manifests.digest(job.identity)[:8]
    return replace(job, out=job.out.with_name(name))
