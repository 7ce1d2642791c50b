"""A part is one extraction on disk: a manifest and its shards. A cache is one part, and those that
were added to it later.

n rows, V views of this part (numbers `first_view` to `first_view` + V - 1), L levels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import UnreadableError, UserError, command_line, one_line
from featcache.storage import commit, json_file, manifest
from featcache.storage.files import files_of
from featcache.storage.identity import Mismatch, compare
from featcache.storage.keys import I64, Keys, key_paths, read_shard_keys
from featcache.storage.record import RecordCheck, read_quarantine
from featcache.storage.store import (
    PARTS,
    QUARANTINE,
    SHARDS,
    Array,
    array_from_dict,
    get_store,
    record_path,
)
from featcache.storage.tail import read_tail


class FileRows(NamedTuple):
    """The files to read are listed by their `shards`, `views` and `counts` of rows (f,)."""

    shards: I64
    views: I64
    counts: I64


class Part:
    """Opens a part: manifest and records are read, and every file's existence and size are checked.

    `partial` leaves out shards of which something is missing or short, instead of an error:
    `absent` names them.
    """

    def __init__(self, path: Path, partial: bool = False) -> None:
        self.path = path
        self.manifest = manifest.read(path)
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.teacher: str = self.identity["teacher"]["name"]
        self.first_view: int = self.identity.get("first_view", 0)
        self.views: int = self.identity["views"]
        self.levels: tuple[int, ...] = tuple(self.identity["levels"])
        self.arrays: dict[str, Array] = {
            name: array_from_dict(name, f) for name, f in self.manifest["arrays"].items()
        }
        self.store = get_store(self.identity["store"])
        self.compression: str = self.manifest.get("compression", "")  # of an archive
        self._check = RecordCheck(self.manifest)
        self.absent: dict[str, str] = {}  # shard -> why
        # {key, reason} each; of absent shards as well, where that is known
        self.quarantined: list[dict[str, str]] = []
        self.records = list(self._complete_shards(partial))
        self.starts: I64 = np.cumsum([0, *(record["rows"] for record in self.records)])

    def _complete_shards(self, partial: bool) -> Iterator[dict[str, Any]]:
        for shard in self.manifest["shards"]:
            path = record_path(self.path, shard["name"])
            if not path.is_file():
                if partial:
                    self.absent[shard["name"]] = (
                        f"{path}: missing; not extracted yet, or its record is lost"
                    )
                continue
            try:
                record = self._record(path, shard)
            except UnreadableError:  # who may not look cannot say that it is absent
                raise
            except UserError as error:
                if not partial:
                    raise
                self.absent[shard["name"]] = str(error)
            else:
                yield record
        if self.absent:
            self._note_quarantined()

    def _record(self, path: Path, shard: Mapping[str, Any]) -> dict[str, Any]:
        """Read the record of a shard, and check that its files are there."""
        record = json_file.read_json(path)
        if why := self._check.problem(shard, record):
            raise UserError(
                f"cache file {path} {why}; run `{command_line('featcache', 'verify', self.path)}`"
            )
        self.quarantined += record["quarantined"]
        if problems := commit.check_shard(
            self.path, record["shard"], self.identity["store"], record, deep=False
        ):
            raise UserError(
                f"cache file {problems[0]}; run `{command_line('featcache', 'verify', self.path)}`"
            )
        return record

    def _note_quarantined(self) -> None:
        """Add those of lost records, from the list that the extraction left beside the manifest."""
        with contextlib.suppress(UserError):  # there is none, or it is damaged as well
            known = {row["key"] for row in self.quarantined}
            rows = read_quarantine(self.path / QUARANTINE)
            self.quarantined += [row for row in rows if row["key"] not in known]

    def drop_shards(self, shards: Collection[str]) -> None:
        """Leave these out as well: they are absent in another part of the cache."""
        self.records = [record for record in self.records if record["shard"] not in shards]
        self.starts = np.cumsum([0, *(record["rows"] for record in self.records)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.manifest["shards"])

    @property
    def bytes(self) -> int:
        """The size of all files of complete shards."""
        return sum(file["bytes"] for record in self.records for file in record["files"].values())

    @property
    def compressed_bytes(self) -> tuple[int, int]:
        """The size of all compressed files of an archive, and of the rows in them; (0, 0) of
        another part."""
        if not self.compression:
            return 0, 0
        every = [file for record in self.records for file in record["files"].values()]
        row = sum(spec.item_bytes * self.views for spec in self.arrays.values() if spec.split)
        return sum(file["bytes"] for file in every if "compression" in file), row * len(self)

    @property
    def view_numbers(self) -> range:
        return range(self.first_view, self.first_view + self.views)

    def holds(self, views: I64) -> npt.NDArray[np.bool_]:
        return (views >= self.first_view) & (views < self.first_view + self.views)

    def locate(self, shard: int, spec: Array, view: int, rows: I64) -> tuple[str, I64]:
        """Return the file and offsets of an array's items; rows are numbers of the whole part, all
        of one shard."""
        return self.store.locate(
            self.path,
            self.records[shard]["shard"],
            spec,
            self.views,
            view - self.first_view,
            rows - self.starts[shard],
        )

    def locate_all(self, spec: Array, files: FileRows, rows: I64) -> tuple[list[str], I64]:
        """Return the path of each of `files` (f,), and the offset of each of `rows` (n,), which lie
        file after file."""
        own = rows - np.repeat(self.starts[files.shards], files.counts)
        names = [self.records[shard]["shard"] for shard in files.shards.tolist()]
        views, ends = (files.views - self.first_view).tolist(), np.cumsum(files.counts).tolist()
        bounds = zip(names, views, [0, *ends], ends, strict=False)
        found = [
            self.store.locate(self.path, name, spec, self.views, view, own[low:high])
            for name, view, low, high in bounds
        ]
        return [path for path, _ in found], np.concatenate([offsets for _, offsets in found])

    def file_record(self, path: str) -> Mapping[str, Any]:
        """Return the bytes and crc32c that are recorded for a file that `locate` gave."""
        shard, _, name = path[len(f"{self.path}/{SHARDS}/") :].partition(f".{self.store.NAME}/")
        facts: Mapping[str, Any] = self._files[shard][name]
        return facts

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {record["shard"]: record["files"] for record in self.records}

    def keys(self) -> Keys:
        files_of(self.path).bring(
            path for record in self.records for path in key_paths(self.store, self.path, record)
        )
        parts = [read_shard_keys(self.store, self.path, record) for record in self.records]
        ends = np.cumsum([0, *(len(part.blob) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        blobs = [part.blob for part in parts]
        return Keys(
            np.concatenate([np.zeros(0, np.uint8), *blobs]),
            np.concatenate([np.zeros(1, np.int64), *offsets]),
        )

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Read gamma, beta, eps and proj of the teacher's end; empty where it has none."""
        return read_tail(self.path, self.manifest)


def cache_root(out: Path) -> Path:
    """Return the cache that a part's folder belongs to: itself, or what the part was added to."""
    return out.parent.parent if out.parent.name == PARTS else out


def previous_record(out: Path, shard: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read the record of the same rows as they were made before: of the shard that a repair has
    backed up, or in a part beside this one; None where there is none yet."""
    root = cache_root(out)
    candidates = [(out, commit.backup_path(record_path(out, shard["name"])))]
    candidates += [
        (part, record_path(part, shard["name"]))
        for part in (root, *added_parts(root))
        if part != out
    ]
    for part, path in candidates:
        try:
            record = json_file.read_json(path)
            if RecordCheck(manifest.read(part)).problem(shard, record) is None:
                return record
        except UserError:  # missing or damaged
            continue
    return None


# What is added may differ from the first part of its teacher in these fields.
ADDABLE_FIELDS = ("identity.levels", "identity.views", "identity.first_view", "identity.pixels")
# Another teacher's first part need not share these with the cache.
TEACHER_FIELDS = (
    "identity.teacher.",
    "identity.order",
    "identity.codec",
    "identity.tokens",
    "identity.keep",
)


def first_difference(
    here: Mapping[str, Any], there: Mapping[str, Any], free: tuple[str, ...]
) -> Mismatch | None:
    """Return the first field of identity, but for those in `free`, in which two manifests
    differ."""
    found = (each for each in compare(here, there) if each.field.startswith("identity."))
    return next((each for each in found if not each.field.startswith(free)), None)


def row_mismatch(base: Part, other: Part) -> str | None:
    """Say why two parts do not list the same rows; None where they do. Row i of one is then row i
    of the other."""
    free = ADDABLE_FIELDS if other.teacher == base.teacher else (*ADDABLE_FIELDS, *TEACHER_FIELDS)
    if found := first_difference(base.manifest, other.manifest, free):
        return f"{found.field} is {found.there!r} there, {found.here!r} here"
    for here, there in zip(base.records, other.records, strict=True):
        if (here["shard"], here["rows"], here["keys_digest"]) != (
            there["shard"],
            there["rows"],
            there["keys_digest"],
        ):
            return f"rows of shard {here['shard']} differ: {here['rows']} and {there['rows']}"
    return None


def added_parts(path: Path) -> list[Path]:
    """List the folders of the parts that were added to the cache at `path`, by name."""
    folders = sorted((path / PARTS).iterdir()) if (path / PARTS).is_dir() else []
    return [
        each
        for each in folders
        if (each / manifest.NAME).is_file() or (each / SHARDS / manifest.COPY).is_file()
    ]


def open_parts(path: Path, partial: bool = False) -> tuple[list[Part], list[Part]]:
    """Open the cache at `path`, then what was added to it and is complete; and the parts that are
    not, as one that is still being extracted, of which nothing is seen. With `partial` all are
    taken, and none has a shard that another lacks."""
    base = Part(path, partial)
    found = [Part(each, partial) for each in added_parts(path)] if base.complete or partial else []
    parts = [part for part in found if part.complete or partial]
    absent = {shard for part in (base, *parts) for shard in part.absent}
    for part in (base, *parts):
        part.drop_shards(absent)
    for part in parts:
        if why := row_mismatch(base, part):
            raise UserError(
                f"{str(part.path)!r} does not belong to cache {str(path)!r}: {why}; move it away"
            )
    for teacher in dict.fromkeys(part.teacher for part in parts):
        own = [part for part in (base, *parts) if part.teacher == teacher]
        pairs = [
            (level, view) for part in own for level in part.levels for view in part.view_numbers
        ]
        held = set(pairs)
        if len(pairs) != len(held):
            raise UserError(
                f"cache {str(path)!r}: two parts hold the same levels and views of {teacher}"
            )
        if len(held) != len({level for level, _ in held}) * (max(view for _, view in held) + 1):
            raise UserError(
                f"cache {str(path)!r}: of teacher {teacher} some views have levels that others "
                f"lack; move what was added last out of {path / PARTS}"
            )
    return [base, *parts], [part for part in found if part not in parts]


def describe_part(manifest: Mapping[str, Any]) -> str:
    """Describe one part in a few words."""
    identity = manifest["identity"]
    first = identity.get("first_view", 0)
    last = first + identity["views"] - 1
    views = f"view {first}" if first == last else f"views {first} to {last}"
    return one_line(
        f"{identity['teacher']['name']}  levels {','.join(map(str, identity['levels']))}  {views}"
    )
