"""A transfer is planned: for each part of a cache that is wanted, the manifest of the copy and the
shards it comes from.

Whole, with all that was added; some shards, which are a complete cache of fewer pictures; or the
first views and some levels, which are one flat cache, wherever in the source their rows lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

import featcache
from featcache.errors import UsageError, UserError, counted
from featcache.reading.cache import Cache
from featcache.storage import checksums, codec_state, json_file, picture_lists
from featcache.storage import manifest as manifests
from featcache.storage.part import PARTS, added_parts, describe_part
from featcache.storage.store import Array, array_from_dict, hash_dtype, record_path

Range = tuple[int, int]  # numbers of shards, the end not included


class Change(Protocol):
    """What the levels of rows go through on their way."""

    @property
    def new_state(self) -> Mapping[str, Any]: ...
    def apply(self, items: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]: ...


@dataclass(frozen=True)
class TransferJob:
    """Describe one part of a cache and what becomes of it."""

    source: Cache
    out: Path
    manifest: dict[str, Any]  # of the target
    records: tuple[dict[str, Any], ...]  # of the source's shards that are wanted
    as_files: bool  # nothing changes within a shard
    recount: bool  # fewer numbers: statistics of what is kept
    state_file: bytes = b""  # of the codec, where it is not the source's
    change: Change | None = None  # of the levels, where there is one

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def store(self) -> str:
        return str(self.identity["store"])

    @property
    def arrays(self) -> list[Array]:
        return [array_from_dict(name, facts) for name, facts in self.manifest["arrays"].items()]

    @property
    def source_arrays(self) -> list[Array]:
        """Return the arrays to read, but for checksums, as the source has them of these levels."""
        levels, found = len(self.identity["levels"]), []
        for name in (spec.name for spec in self.arrays if spec.name not in checksums.NAMES):
            spec = self.source.arrays[name]
            item = (levels, *spec.item[1:]) if checksums.has_levels(spec) else spec.item
            found.append(replace(spec, item=item))
        return found

    @property
    def missing(self) -> list[dict[str, Any]]:
        """Return the records of shards that the target lacks."""
        return [
            record
            for record in self.records
            if not record_path(self.out, record["shard"]).is_file()
        ]

    def bytes(self, record: Mapping[str, Any]) -> int:
        """Count the bytes of a shard of the target; of one that is rewritten, without the store's
        own headers."""
        if self.as_files:
            return sum(facts["bytes"] for facts in record["files"].values())
        views = self.identity["views"]
        return sum(spec.item_bytes * (views if spec.per_view else 1) for spec in self.arrays) * int(
            record["rows"]
        )


@dataclass(frozen=True)
class Target:
    """Says how the target is written: its store, its format, and whether it is an archive."""

    store: str
    format: int
    compression: str = ""


def target_like(cache: Cache) -> Target:
    """Return the target that is written as a cache itself is."""
    about = cache.manifest
    return Target(cache.identity["store"], about["format"], about.get("compression", ""))


def whole_cache_jobs(
    source: Cache, out: Path, target: Target, *, shards: Range | None = None
) -> tuple[list[TransferJob], list[str]]:
    """Return (jobs of the cache and of what was added to it, what is left out in words)."""
    parts = [Cache(path) for path in added_parts(source.path)]
    jobs = [_choose(source, out, target, {}, shards)]
    jobs += [_addition(_choose(part, out, target, {}, shards)) for part in parts if part.complete]
    return jobs, [
        f"{describe_part(part.manifest)} (unfinished)" for part in parts if not part.complete
    ]


def flat_cache_jobs(
    source: Cache,
    out: Path,
    target: Target,
    *,
    views: int | None = None,
    levels: Sequence[int] | None = None,
    shards: Range | None = None,
) -> tuple[list[TransferJob], list[str]]:
    """Return (one job of the first views and these levels of the cache's own teacher, what is left
    out in words)."""
    views = source.views if views is None else views
    chosen = source.levels if levels is None else tuple(sorted(levels))
    if source.identity.get("first_view"):
        raise UsageError(
            f"{str(source.path)!r} was added to a cache: --views and --levels choose from the "
            "cache itself"
        )
    if not 1 <= views <= source.views:
        raise UsageError(
            f"--views {views}: 1 to {counted(source.views, 'view is', 'views are')} "
            f"stored in {str(source.path)!r}"
        )
    if lacking := [level for level in chosen if level not in source.levels]:
        raise UsageError(
            f"--levels: {lacking[0]} is not stored; {','.join(map(str, source.levels))} are"
        )
    others = [
        about
        for about in map(manifests.read, added_parts(source.path))
        if _teacher(about) != _teacher(source.manifest)
    ]
    changes = {"views": views, "levels": list(chosen)}
    return [_choose(source, out, target, changes, shards)], [describe_part(each) for each in others]


def _teacher(about: Mapping[str, Any]) -> str:
    return str(about["identity"]["teacher"]["name"])


def shard_rows(source: Cache, record: Mapping[str, Any]) -> slice:
    """Return the row numbers of a shard."""
    number = source.shard_names.index(record["shard"])
    first, end = source.shard_starts[number : number + 2].tolist()
    return slice(first, end)


def _choose(
    source: Cache, out: Path, target: Target, changes: dict[str, Any], shards: Range | None
) -> TransferJob:
    """Plan one part with `changes` of its identity."""
    about, numbers = source.manifest, _numbers(source, shards)
    records = _records(source, numbers)
    identity = {**source.identity, **changes, "store": target.store}
    fewer = len(numbers) < len(about["shards"])
    as_files = identity == source.identity and target == target_like(source)
    recount = not as_files and "views" in changes
    if fewer:
        keys = [key for record in records for key in source.keys[shard_rows(source, record)]]
        # Those that have a row: the source's digest covers quarantined pictures too, whose order is
        # not known here.
        identity.pop(picture_lists.APPENDED, None)
        identity["pictures"] = picture_lists.list_of(keys)
    provenance = {
        **about["provenance"],
        **_distortion(about, identity["levels"]),
        **({"copied_from": about["id"]} if fewer or recount else {}),
        **({"statistics": "of stored numbers"} if recount else {}),
    }
    arrays = _fewer(about["arrays"], identity) if recount else about["arrays"]
    if target.format != about["format"]:
        versions = provenance.get("versions", {})
        provenance["versions"] = {**versions, "featcache": featcache.__version__}
        hashes = {"dtype": hash_dtype(target.format)}
        arrays = {
            name: facts | (hashes if name == "pixel_hash" else {}) for name, facts in arrays.items()
        }
    chosen = [about["shards"][i] for i in numbers]
    made = manifests.make(identity, provenance, arrays, chosen, {}, format=target.format)
    state = _merged_state(source, made)
    made["files"] = about["files"] | manifests.file_facts(state)
    if target.compression:
        made["compression"] = target.compression
    state_file = next(iter(state.values()), b"")
    return TransferJob(source, out, made, records, as_files, recount, state_file)


def _distortion(about: Mapping[str, Any], levels: Sequence[int]) -> dict[str, Any]:
    """Return what was measured of these levels, in the place of what was of all."""
    if "distortion" not in about["provenance"]:
        return {}
    return {"distortion": manifests.distortion_of(about, levels)}


def _merged_state(source: Cache, made: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the file of the codec's state of a flat copy, where its levels are not all those of
    one part."""
    about, levels = source.manifest, made["identity"]["levels"]
    if not codec_state.needs_state(about) or set(levels) <= set(about["identity"]["levels"]):
        return {}
    state = source.codec_state(_teacher(about), levels)
    return {codec_state.file_name(about): codec_state.pack(state, levels, made["id"])}


def _fewer(arrays: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of a cache with other levels, their checksums too."""
    levels = len(identity["levels"])
    specs = [
        array_from_dict(name, facts)
        for name, facts in arrays.items()
        if name not in checksums.NAMES
    ]
    specs = [
        replace(spec, item=(levels, *spec.item[1:])) if checksums.has_levels(spec) else spec
        for spec in specs
    ]
    tokens = array_from_dict("features", arrays["features"]).item[1]
    sums = checksums.checksum_arrays(specs, levels, tokens, ranked=identity["tokens"] == "ranked")
    return {spec.name: spec.as_dict() for spec in (*specs, *sums)}


def _addition(job: TransferJob) -> TransferJob:
    """Put a part below parts/, in a folder that ends, as everywhere, with the digest of its
    identity."""
    here, there = (json_file.digest(each)[:8] for each in (job.source.identity, job.identity))
    name = job.source.path.name
    return replace(
        job,
        out=job.out / PARTS / (name.removesuffix(here) + there if name.endswith(here) else name),
    )


def _numbers(source: Cache, shards: Range | None) -> range:
    count = len(source.manifest["shards"])
    low, high = shards or (0, count)
    if not 0 <= low < high <= count:
        raise UsageError(
            f"--shards {low}:{high}: A:B with A < B <= {count} is allowed, the cache has "
            f"{counted(count, 'shard')}"
        )
    return range(low, high)


def _records(source: Cache, numbers: range) -> tuple[dict[str, Any], ...]:
    """Return the records of the shards that are wanted, all of which must be there."""
    wanted = [source.manifest["shards"][i]["name"] for i in numbers]
    records = {record["shard"]: record for record in source.records}
    if lacking := [name for name in wanted if name not in records]:
        raise UserError(
            f"cache {str(source.path)!r} is incomplete: {len(lacking)} of "
            f"{counted(len(wanted), 'shard is', 'shards are')} "
            f"missing, the first {lacking[0]}; finish it with the command that made it, or "
            "take those that are there: `featcache copy --shards A:B`"
        )
    return tuple(records[name] for name in wanted)
