"""A cache is derived from another without its pictures and its teacher: in another codec, with
ranked tokens, with fewer of them, of fewer levels or views.

From levels in fp16 it is byte for byte what an extraction with these options writes on the same
machine. `transfer` does the work, so a derivation that was killed continues where it stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from featcache.errors import UserError, command_line
from featcache.extraction import codec_sample
from featcache.extraction.options import file_name
from featcache.extraction.target_folder import existing_manifest
from featcache.maintenance import transfer
from featcache.maintenance.derive_plan import LevelChange, Wish, derive_jobs, job_again
from featcache.maintenance.transfer_plan import TransferJob
from featcache.reading.cache import Cache
from featcache.storage import codec_state, manifest, picture_lists
from featcache.storage.part import cache_root


def derive(
    cache: Path, out: Path, wish: Wish, *, progress: transfer.TransferProgress | None = None
) -> list[str]:
    """Derive the cache at `out`. Returns what was left out, in words."""
    transfer.check_apart(cache, out)
    with Cache(cache) as source:
        if not len(source):
            raise UserError(f"derive: {str(cache)!r} has no pictures; finish it, or extract again")
        jobs, left = derive_jobs(source, out, wish)
        transfer.run(jobs, progress or transfer.TransferProgress(), prepare=_with_change)
    return left


@contextlib.contextmanager
def again(
    part: Path, about: dict[str, Any], parent: Path
) -> Iterator[tuple[dict[str, bytes], Callable[[str], None]]]:
    """Yield what writes shards of a derived part again: the files beside its manifest, and a
    function of a shard's name. UserError where `parent` is not the cache that it was derived
    from."""
    wanted, where = about["identity"], f"cannot repair {str(part)!r}"
    with Cache(parent) as source:
        if wanted["parent"] not in picture_lists.ids(source.identity):
            raise UserError(
                f"{where}: {str(parent)!r} is cache {source.manifest['id']}, it was derived from "
                f"{wanted['parent']}; give that one with --parent CACHE"
            )
        found = job_again(source, part, _wish_of(part, about), about)
        if found is None:
            raise UserError(
                f"{where}: no part of {str(parent)!r} gives it any more; derive it again into "
                "another folder"
            )
        job = _with_change(found)
        tail = codec_state.tail_name(about)
        files = {tail: _tail(job, tail, about)} if tail else {}
        records = {record["shard"]: record for record in job.records}
        yield (
            files,
            lambda name: transfer.rewrite_shard(job, records[name], transfer.TransferProgress()),
        )


def _tail(job: TransferJob, name: str, about: dict[str, Any]) -> bytes:
    """Read the teacher's end beside the source, which is the one that was derived with it."""
    path, facts = job.source.path / name, about["files"][name]
    if why := codec_state.problem(path, facts):
        raise UserError(
            f"cannot repair {name} from cache file {path}: {why}; run "
            f"`{command_line('featcache', 'repair', job.source.path)}` first"
        )
    return path.read_bytes()


def _wish_of(part: Path, about: dict[str, Any]) -> Wish:
    """Return what a part was derived with, and copied with since."""
    identity, provenance = about["identity"], about["provenance"]
    copied = "copied_from" in provenance and part == cache_root(part)
    merged = copied or provenance.get("merged", False)
    keep = identity.get("keep")
    return Wish(
        levels=tuple(identity["levels"]) if merged else None,
        views=identity["views"] if merged else None,
        tokens=identity["tokens"],
        keep=None if keep is None else str(keep),
        codec=identity["codec"],
    )


def _with_change(job: TransferJob) -> TransferJob:
    """Return the job with the change of its levels, which needs the state of the new codec: that of
    the cache that is there, or the source's where the codec stays, else one made from the first
    views."""
    about, source = job.manifest, job.source
    if "features" not in about["arrays"]:
        return job
    old = source.codec_state(source.teachers[0], about["identity"]["levels"])
    change = LevelChange(source.identity, about["identity"], old, old)
    if not codec_state.needs_state(about):
        return replace(job, change=change)
    tail = codec_state.tail_name(source.manifest) or file_name(about["identity"]["teacher"]["name"])
    name = f"{tail.removesuffix('.safetensors')}{codec_state.ending(about)}"
    there = existing_manifest(about, job.out, transfer.WORDS)
    if there is not None:
        data = codec_state.read_file(job.out, there)
    else:
        state = _new_state(job, change)
        data = codec_state.pack(state, about["identity"]["levels"], about["id"])
        data = codec_state.begin(job.out, about, name, data)
    state = codec_state.unpack(data, about, f"the state {name}")
    files = {**about["files"], **manifest.file_facts({name: data})}
    lost = _lost(job, change, state) if there is None else _measured(there)
    provenance = {**about["provenance"], **lost}
    about = {**about, "files": files, "provenance": provenance}
    return replace(job, manifest=about, change=replace(change, new_state=state), state_file=data)


def _measured(there: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured as a part was begun."""
    return {name: facts for name, facts in there["provenance"].items() if name == "distortion"}


def _lost(job: TransferJob, change: LevelChange, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the new codec loses of the first views; one that stays loses nothing more."""
    if change.old["codec"] == change.new["codec"]:
        return {}
    first = islice(_first_levels(job, change), codec_sample.MEASURED)
    views = [view.clone() for view in first]  # whose memory is used again
    return {"distortion": codec_sample.measure_codec(change.new["codec"], state, views)}


def _new_state(job: TransferJob, change: LevelChange) -> dict[str, Tensor]:
    if change.old["codec"] == change.new["codec"]:
        return dict(change.old_state)
    known = codec_sample.known_state(cache_root(job.out), job.manifest)
    return codec_sample.make_state(job.manifest, known, lambda: _first_levels(job, change))


def _first_levels(job: TransferJob, change: LevelChange) -> Iterator[Tensor]:
    """Yield the levels (L, T, D) float16 of the first views, as an extraction would encode them."""
    every = (
        pair
        for record in job.records
        for keys, items in transfer.blocks(job, record)
        for pair in zip(keys, change.levels(items), strict=True)
    )
    for key, view in islice(every, codec_sample.VIEWS):
        if not view.isfinite().all():
            raise UserError(
                f"cache {str(job.source.path)!r}: features of {key!r} are not finite, which no "
                "extraction writes; extract it again"
            )
        yield view
