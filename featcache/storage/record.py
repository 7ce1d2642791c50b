"""A shard's record, and the list of pictures that could not be used, are read and compared with the
manifest they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.errors import counted, short
from featcache.storage import json_file, manifest, schema
from featcache.storage.store import FileShape, array_from_dict, get_store


def read_record(path: Path) -> dict[str, Any]:
    """Read a shard's record; UserError, which names the file and the field, where it is none."""
    record = json_file.read_json(path)
    schema.check(schema.Record, record, path, json_file.advice(path))
    return record


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """Read the list {key, reason} of a quarantine.json; UserError where it is none."""
    value = json_file.read_json(path)
    schema.check(schema.Quarantine, value, path, json_file.advice(path))
    pictures: list[dict[str, str]] = value["pictures"]
    return pictures


def quarantine_digest(pictures: Sequence[Mapping[str, str]]) -> str:
    """Digest the list of a quarantine.json."""
    return json_file.digest({"pictures": [dict(row) for row in pictures]})


@dataclass(frozen=True)
class RecordCheck:
    """Compares the records of one manifest with it; what they have in common is worked out once."""

    about: Mapping[str, Any]  # the manifest

    @cached_property
    def _content(self) -> str:
        return manifest.content_digest(self.about)

    @cached_property
    def _shapes(self) -> Mapping[str, FileShape | None]:
        """The files of a shard, by what the manifest says of its arrays."""
        identity, arrays = self.about["identity"], self.about["arrays"]
        specs = [array_from_dict(name, facts) for name, facts in arrays.items()]
        shapes: Mapping[str, FileShape | None] = get_store(identity["store"]).file_shapes(
            specs, identity["views"], manifest.shard_form(self.about)
        )
        return shapes

    def problem(self, shard: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
        """Say why an intact JSON is not the record of this shard of this cache; None where it
        is."""
        if record.get("shard") != shard["name"]:
            return f"is the record of shard {short(record.get('shard'))}"
        if why := schema.schema_problem(schema.Record, record):
            return f"is not the record of a shard: {why}"
        rows, quarantined = record["rows"], record["quarantined"]
        if rows + len(quarantined) != shard["count"]:
            return (
                f"has {counted(rows, 'row')} and {len(quarantined)} in quarantine, "
                f"the manifest {counted(shard['count'], 'picture')}"
            )
        if record.get("content", self._content) != self._content:
            return "is of a shard of another cache"
        return self._file_problem(rows, record["files"])

    def _file_problem(self, rows: int, files: Mapping[str, Any]) -> str | None:
        if files.keys() != self._shapes.keys():
            strange = sorted(files.keys() ^ self._shapes.keys())
            return (
                f"is not the record of a shard: it lists other files, such as {short(strange[0])}"
            )
        for name, shape in self._shapes.items():
            wanted = {} if shape is None else shape.facts(rows)
            for fact in ("bytes", "chunks", "compression"):
                stated = files[name].get(fact)
                if stated != wanted.get(fact, stated if fact == "bytes" else None):
                    return (
                        f"is not the record of a shard: {name} has {fact} {stated}, of "
                        f"{counted(rows, 'row')} "
                        f"{wanted.get(fact)}"
                    )
        return None
