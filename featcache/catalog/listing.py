"""Caches below $FEATCACHE_HOME are described from their manifests and records alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.storage import manifest, picture_lists
from featcache.storage.part import added_parts
from featcache.storage.record import read_record
from featcache.storage.store import record_path


def describe(path: Path, last_uses: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of one cache as plain data; a damaged one is {path, damaged: the reason}.
    `last_uses` are those of the ledgers, which are read once for all caches."""
    try:
        cache_manifest = manifest.read(path)
        records, total = _records(path, cache_manifest)
        parts = [
            (manifest.read(part), _records(part, manifest.read(part))) for part in added_parts(path)
        ]
    except UserError as error:
        return {"path": str(path), "damaged": str(error)}
    except OSError as error:
        return {"path": str(path), "damaged": f"{error.filename}: {error.strerror}"}
    identity = cache_manifest["identity"]
    every = [*records, *(record for _, (found, _) in parts for record in found)]
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
        "bytes": sum(file["bytes"] for record in every for file in record["files"].values()),
        "shards": total,
        "shards_complete": len(records),
        "parts": len(parts),
        "parts_complete": sum(len(found) == wanted for _, (found, wanted) in parts),
        "last_used": max(
            (last_uses[each] for each in picture_lists.ids(identity) if each in last_uses),
            default=None,
        ),
        "random_weights": manifest.is_random(cache_manifest),
    }


def _records(part: Path, part_manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(records of complete shards, shards there are to be)."""
    paths = [record_path(part, shard["name"]) for shard in part_manifest["shards"]]
    return [read_record(path) for path in paths if path.is_file()], len(paths)


def _own(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [identity, *(part for part in parts if part["teacher"] == identity["teacher"])]


def _views(identity: dict[str, Any], parts: list[dict[str, Any]]) -> int:
    return max(each.get("first_view", 0) + int(each["views"]) for each in _own(identity, parts))


def _levels(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[int]:
    return sorted({level for each in _own(identity, parts) for level in each["levels"]})
