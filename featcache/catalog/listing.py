"""Caches below $FEATCACHE_HOME are described from their manifests and records alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from featcache.errors import UserError
from featcache.storage import manifest, picture_lists
from featcache.storage.index import open_index
from featcache.storage.part import added_parts
from featcache.storage.record import read_record
from featcache.storage.shard_records import stored_bytes
from featcache.storage.store import record_path


def describe(path: Path, last_uses: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of one cache as plain data; a damaged one is {path, damaged: the reason}.
    Records are read where no index says what they say together.
    `last_uses` are those of the ledgers, which are read once for all caches."""
    try:
        cache_manifest = manifest.read(path)
        own = _stored(path, cache_manifest)
        parts = [
            (about, _stored(part, about))
            for part in added_parts(path)
            for about in [manifest.read(part)]
        ]
    except UserError as error:
        return {"path": str(path), "damaged": str(error)}
    except OSError as error:
        return {"path": str(path), "damaged": f"{error.filename}: {error.strerror}"}
    identity = cache_manifest["identity"]
    return {
        "path": str(path),
        "id": cache_manifest["id"],
        "teacher": identity["teacher"]["name"],
        "pictures": picture_lists.count(identity),
        "views": _views(identity, [part["identity"] for part, _ in parts]),
        "levels": _levels(identity, [part["identity"] for part, _ in parts]),
        "codec": identity["codec"],
        "store": identity["store"],
        "format": cache_manifest["format"],
        "compression": cache_manifest.get("compression", ""),
        "tokens": identity["tokens"],
        "bytes": own.bytes + sum(stored.bytes for _, stored in parts),
        "shards": len(cache_manifest["shards"]),
        "shards_complete": own.shards,
        "parts": len(parts),
        "parts_complete": sum(stored.shards == len(about["shards"]) for about, stored in parts),
        "last_used": max(
            (last_uses[each] for each in picture_lists.ids(identity) if each in last_uses),
            default=None,
        ),
        "random_weights": manifest.is_random(cache_manifest),
    }


class _Stored(NamedTuple):
    """Counts complete shards, and the bytes of their files."""

    shards: int
    bytes: int


def _stored(part: Path, about: dict[str, Any]) -> _Stored:
    index = open_index(part, about)
    if index is not None:
        return _Stored(index.facts.shards, index.bytes)
    paths = (record_path(part, shard["name"]) for shard in about["shards"])
    sizes = [stored_bytes(read_record(path))[0] for path in paths if path.is_file()]
    return _Stored(len(sizes), sum(sizes))


def _own(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [identity, *(part for part in parts if part["teacher"] == identity["teacher"])]


def _views(identity: dict[str, Any], parts: list[dict[str, Any]]) -> int:
    return max(each.get("first_view", 0) + int(each["views"]) for each in _own(identity, parts))


def _levels(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[int]:
    return sorted({level for each in _own(identity, parts) for level in each["levels"]})
