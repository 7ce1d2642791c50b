"""A manifest says what a cache is: its identity, its id, its arrays and its shards.

`identity` holds all that the stored numbers depend on, `provenance` what is worth knowing but
changes nothing. Every JSON of a cache carries its own checksum and is replaced atomically; none
holds a time, so the same work gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UserError, command_line, counted, one_line, short
from featcache.storage import json_file, picture_lists, schema
from featcache.storage.cross_check import cross_problem
from featcache.storage.json_file import digest
from featcache.storage.keys_digest import keys_digest as keys_digest
from featcache.storage.store import FORMAT, FORMATS, ShardForm

NAME = "manifest.json"
COPY = "manifest.copy.json"  # below shards/: what `repair` restores a damaged manifest from
LISTED_SHARDS = 1024  # more are left out of the file where they follow from the identity
MOST_SHARDS = 1 << 21  # that a file without a list may ask for


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Digest what the numbers of a shard depend on, wherever it lies: the identity but for
    pictures, store and shard size."""
    apart = ("pictures", picture_lists.APPENDED, "store", "rows_per_shard")
    return digest({key: value for key, value in manifest["identity"].items() if key not in apart})


def make(
    identity: dict[str, Any],
    provenance: dict[str, Any],
    arrays: dict[str, Any],
    shards: list[Any],
    files: Mapping[str, bytes],
    *,
    format: int = FORMAT,
) -> dict[str, Any]:
    """Make a manifest; its id is the digest of the identity alone. `files` lie beside it, and are
    noted with checksums."""
    return {
        "format": format,
        "id": digest(identity)[:16],
        "identity": identity,
        "provenance": provenance,
        "arrays": arrays,
        "shards": shards,
        "files": file_facts(files),
    }


def content_of(cache: Path) -> str:
    """Return `content_digest` of the cache at `cache`, whose manifest is read again only where its
    file is another one: it is asked for each shard, and has them all."""
    about = (cache / NAME).stat()
    return _content_of(cache, about.st_ino, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=16)
def _content_of(cache: Path, *_: int) -> str:
    return content_digest(read(cache))


def file_facts(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what a manifest notes of files beside it."""
    return {
        name: {"bytes": len(data), "crc32c": f"{crc32c(data):08x}"} for name, data in files.items()
    }


def read(cache: Path) -> dict[str, Any]:
    """Read the manifest of the cache at `cache`; one line says what is wrong when there is none or
    it is another format."""
    path = cache / NAME
    if not path.is_file() and (cache / "shards" / COPY).is_file():
        raise UserError(
            f"{str(path)!r} is missing, but its copy is there; run "
            f"`{command_line('featcache', 'repair', cache)}`"
        )
    if not path.is_file():
        raise UserError(
            f"no cache at {str(cache)!r}: {NAME} is missing; give the folder that `featcache "
            "extract` wrote"
        )
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """Read a manifest, or its copy, from a file; everything in it is checked here, and may be
    trusted afterwards."""
    manifest = json_file.read_json(path)
    check_format(json_file.cache_of(path), manifest)
    parts = {"id", "identity", "provenance", "arrays", "files"}
    why = ""
    if not parts <= manifest.keys() or manifest["id"] != digest(manifest["identity"])[:16]:
        why = "its id is not that of its identity"
    why = why or schema.schema_problem(schema.Manifest, manifest) or _list_shards(manifest)
    why = why or cross_problem(manifest)
    if why:
        raise UserError(
            f"{str(path)!r} is no manifest as extraction writes it: {why}; use the version of "
            "featcache that wrote it, or extract again into another folder"
        )
    return manifest


def _list_shards(manifest: dict[str, Any]) -> str:
    """Add the shards that a file leaves out; say why where that cannot be."""
    if "shards" in manifest:
        return ""
    identity = manifest["identity"]
    lists, rows = picture_lists.lists(identity), identity["rows_per_shard"]
    number = sum(-(-each["count"] // rows) for each in lists)
    if not 1 <= number <= MOST_SHARDS:
        return f"shards are missing, and {number} follow from its pictures; {MOST_SHARDS} may"
    manifest["shards"] = picture_lists.shards(lists, rows)
    return ""


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, or its copy. A long list of shards is left out where it follows from the
    identity, so that the file does not grow with the pictures."""
    shards = manifest["shards"]
    follows = len(shards) > LISTED_SHARDS and picture_lists.is_computed(
        shards, manifest["identity"]
    )
    left_out = ("shards",) if follows else ()
    json_file.write_json(
        path, {key: value for key, value in manifest.items() if key not in left_out}
    )


def check_format(cache: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError for a format that this version does not read; of a newer one it names the
    version that wrote it."""
    given = manifest.get("format")
    if type(given) is int and given in FORMATS:
        return
    readable = f"this version reads formats {' and '.join(map(str, FORMATS))}"
    if type(given) is int and given > FORMAT:
        todo = f"install a version that does: pip install --upgrade {_writer(manifest)}"
    else:
        todo = "extract again, or use the version of featcache that wrote it"
    raise UserError(f"cache {str(cache)!r} has format {short(given)}, {readable}; {todo}")


def _writer(manifest: Mapping[str, Any]) -> str:
    """Return what to give pip for the version that a manifest of another format names."""
    provenance = manifest.get("provenance")
    versions = provenance.get("versions") if isinstance(provenance, dict) else None
    version = versions.get("featcache") if isinstance(versions, dict) else None
    if isinstance(version, str) and re.fullmatch(r"[0-9]+(\.[0-9]+){1,3}", version):
        return f"'featcache>={version}'"
    return "featcache"


def shard_form(manifest: Mapping[str, Any]) -> ShardForm:
    """Return how the files of a cache's shards are written."""
    identity = manifest["identity"]
    first_view = identity.get("first_view", 0)
    version = manifest["provenance"].get("versions", {}).get("featcache", "")
    return ShardForm(
        format=manifest["format"],
        compression=manifest.get("compression", ""),
        coordinates={
            "level": identity["levels"],
            "view": range(first_view, first_view + identity["views"]),
        },
        attributes={
            "teacher": identity["teacher"]["name"],
            "levels": identity["levels"],
            "codec": identity["codec"],
            "tokens": identity["tokens"],
            "policy": identity["policy"],
            "format": manifest["format"],
        },
        created_by=f"featcache {version}".strip(),
    )


def check_files(cache: Path, manifest: Mapping[str, Any]) -> list[str]:
    """List the problems of the files beside the manifest."""
    problems = []
    for name, facts in manifest["files"].items():
        path = cache / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {facts['bytes']} recorded")
        elif f"{crc32c(path.read_bytes()):08x}" != facts["crc32c"]:
            problems.append(f"{path}: checksum differs")
    return problems


def distortion_of(manifest: Mapping[str, Any], levels: Sequence[int]) -> dict[str, Any]:
    """Return what was measured of some levels as a part was begun: its numbers are one for each.
    Nothing where one of them was not among those."""
    facts = manifest["provenance"].get("distortion", {})
    stored = manifest["identity"]["levels"]
    if not set(levels) <= set(stored):
        return {}
    at = [stored.index(level) for level in levels]
    return {
        name: [value[i] for i in at] if isinstance(value, list) and value else value
        for name, value in facts.items()
    }


def is_random(manifest: Mapping[str, Any]) -> bool:
    """Return whether the teacher's weights were drawn, not trained; every command that shows the
    cache says so."""
    return str(manifest["provenance"]["weights"]).startswith("random:")


def title(manifest: Mapping[str, Any], rows: int | None = None, views: int | None = None) -> str:
    """Describe a cache in one line for people: teacher, levels, pictures, views, and a warning when
    the weights are random. `rows` that are stored, where they are known, and `views` with those
    that were added."""
    identity = manifest["identity"]
    note = (
        f"  [RANDOM WEIGHTS {manifest['provenance']['weights']}: no meaning in these features]"
        if is_random(manifest)
        else ""
    )
    return one_line(
        f"{identity['teacher']['name']}  levels {','.join(map(str, identity['levels']))}  "
        f"{counted(picture_lists.count(identity) if rows is None else rows, 'picture')} x "
        f"{counted(views or identity['views'], 'view')}  id {manifest['id']}{note}"
    )
