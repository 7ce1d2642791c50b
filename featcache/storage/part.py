"""A part is one extraction on disk: a manifest and its shards. A cache is one part, and those that
were added to it later.

n rows, V views of this part (numbers `first_view` to `first_view` + V - 1), L levels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import UnreadableError, UserError, counted, one_line
from featcache.storage import commit, json_file, manifest
from featcache.storage.files import files_of
from featcache.storage.identity import Mismatch, compare
from featcache.storage.index import INDEXED_FROM, ShardIndex, note_unused, open_index
from featcache.storage.index_file import NAME as INDEX
from featcache.storage.indexed_keys import IndexedKeys
from featcache.storage.keys import I64, Keys, key_paths, read_shard_keys
from featcache.storage.record import RecordCheck, quarantine_digest, read_quarantine
from featcache.storage.shard_records import IndexedRecords, RecordReader, stored_bytes
from featcache.storage.statistics import totals
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
    Where there is a fresh index, that is done shard by shard, when a shard is first looked at.

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
        self.absent: dict[str, str] = {}  # shard -> why
        self._seen_quarantine: list[dict[str, str]] = []  # of the records that were read
        # without it: what is missing has to be seen
        self.index = None if partial else open_index(path, self.manifest)
        self.records: Sequence[dict[str, Any]]
        if self.index is not None:
            self.records = IndexedRecords(path, self.manifest, self.index)
            self.names: list[str] = [shard["name"] for shard in self.manifest["shards"]]
            self.starts: I64 = self.index.starts
        else:
            self._use_records(list(self._complete_shards(partial)))
            self._note_index()

    def _use_records(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.names = [record["shard"] for record in records]
        self.starts = np.cumsum([0, *(record["rows"] for record in records)])

    def _note_index(self) -> None:
        """Tell that an index would save something, where there is none."""
        enough = self.complete and len(self.records) >= INDEXED_FROM
        if enough and not files_of(self.path).may_be_far and not (self.path / INDEX).exists():
            note_unused(self.path, f"{self.path} has {len(self.records)} shards and no index")

    def _complete_shards(self, partial: bool) -> Iterator[dict[str, Any]]:
        reader = RecordReader(self.path, self.manifest)
        for shard in self.manifest["shards"]:
            path = record_path(self.path, shard["name"])
            if not path.is_file():
                if partial:
                    self.absent[shard["name"]] = (
                        f"{path}: missing; not extracted yet, or its record is lost"
                    )
                continue
            try:
                record, _ = reader.read(shard)
                self._seen_quarantine += record["quarantined"]
                reader.check_files(record)
            except UnreadableError:  # who may not look cannot say that it is absent
                raise
            except UserError as error:
                if not partial:
                    raise
                self.absent[shard["name"]] = str(error)
            else:
                yield record

    @cached_property
    def quarantined(self) -> list[dict[str, str]]:
        """Pictures that could not be used, {key, reason} each; of absent shards as well, where that
        is known."""
        if self.index is None:
            found = self._seen_quarantine
            return found + self._lost_quarantine(found) if self.absent else found
        listed = self._listed_quarantine(self.index)
        if listed is not None:
            return listed
        return [row for record in self.records for row in record["quarantined"]]

    def _listed_quarantine(self, index: ShardIndex) -> list[dict[str, str]] | None:
        """Return the list beside the manifest, where it is that of the records."""
        if not index.quarantined:
            return []
        with contextlib.suppress(UserError):  # there is none, or it is damaged
            rows = read_quarantine(self.path / QUARANTINE)
            if quarantine_digest(rows) == index.facts.quarantine:
                return rows
        return None

    def _lost_quarantine(self, found: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return those of lost records, from the list that the extraction left beside the
        manifest."""
        with contextlib.suppress(UserError):  # there is none, or it is damaged as well
            known = {row["key"] for row in found}
            rows = read_quarantine(self.path / QUARANTINE)
            return [row for row in rows if row["key"] not in known]
        return []

    def drop_shards(self, shards: Collection[str]) -> None:
        """Leave these out as well: they are absent in another part of the cache."""
        if shards:
            self._use_records([each for each in self.records if each["shard"] not in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.manifest["shards"])

    @cached_property
    def _stored(self) -> tuple[int, int]:
        if self.index is not None:
            return self.index.bytes, self.index.compressed_bytes
        whole, compressed = zip((0, 0), *map(stored_bytes, self.records), strict=True)
        return sum(whole), sum(compressed)

    @property
    def bytes(self) -> int:
        """The size of all files of complete shards."""
        return self._stored[0]

    @property
    def compressed_bytes(self) -> tuple[int, int]:
        """The size of all compressed files of an archive, and of the rows in them; (0, 0) of
        another part."""
        if not self.compression:
            return 0, 0
        row = sum(spec.item_bytes * self.views for spec in self.arrays.values() if spec.split)
        return self._stored[1], row * len(self)

    @property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]:
        """The statistics of the arrays of all shards: see `statistics.totals`."""
        return totals(self.records) if self.index is None else self.index.facts.statistics

    def keys_digest(self, shard: int) -> str:
        """Return the digest of the keys of a shard, as its record has it."""
        if self.index is not None:
            return self.index.keys_digest(shard)
        digest: str = self.records[shard]["keys_digest"]
        return digest

    @property
    def view_numbers(self) -> range:
        return range(self.first_view, self.first_view + self.views)

    def holds(self, views: I64) -> npt.NDArray[np.bool_]:
        return (views >= self.first_view) & (views < self.first_view + self.views)

    def locate(self, shard: int, spec: Array, view: int, rows: I64) -> tuple[str, I64]:
        """Return the file and offsets of an array's items; rows are numbers of the whole part, all
        of one shard."""
        self._check_records(np.array([shard]))
        return self.store.locate(
            self.path,
            self.names[shard],
            spec,
            self.views,
            view - self.first_view,
            rows - self.starts[shard],
        )

    def locate_all(self, spec: Array, files: FileRows, rows: I64) -> tuple[list[str], I64]:
        """Return the path of each of `files` (f,), and the offset of each of `rows` (n,), which lie
        file after file."""
        self._check_records(files.shards)
        own = rows - np.repeat(self.starts[files.shards], files.counts)
        names = [self.names[shard] for shard in files.shards.tolist()]
        views, ends = (files.views - self.first_view).tolist(), np.cumsum(files.counts).tolist()
        bounds = zip(names, views, [0, *ends], ends, strict=False)
        found = [
            self.store.locate(self.path, name, spec, self.views, view, own[low:high])
            for name, view, low, high in bounds
        ]
        return [path for path, _ in found], np.concatenate([offsets for _, offsets in found])

    def _check_records(self, shards: I64) -> None:
        """Look at shards of which bytes are to be read, where opening did not."""
        if isinstance(self.records, IndexedRecords):
            self.records.check(shards)

    def file_record(self, path: str) -> Mapping[str, Any]:
        """Return the bytes and crc32c that are recorded for a file that `locate` gave."""
        shard, _, name = path[len(f"{self.path}/{SHARDS}/") :].partition(f".{self.store.NAME}/")
        facts: Mapping[str, Any] = self.records[self._numbers[shard]]["files"][name]
        return facts

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def keys(self) -> Keys | IndexedKeys:
        """Return the keys of all rows, of which nothing is read yet where there is an index."""
        if self.index is not None:
            return IndexedKeys(self.index, self._shard_keys, self._all_keys)
        return self._all_keys()

    def _shard_keys(self, shard: int) -> Keys:
        return Keys(*read_shard_keys(self.store, self.path, self.records[shard]))

    def _all_keys(self) -> Keys:
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
    if base.names != other.names:
        return f"it has {counted(len(other.names), 'shard')} of other names"
    counts, others = np.diff(base.starts).tolist(), np.diff(other.starts).tolist()
    for i, (here, there) in enumerate(zip(counts, others, strict=True)):
        if here != there or base.keys_digest(i) != other.keys_digest(i):
            for part in (base, other):  # an index that lies is told here
                part.records[i]
            return f"rows of shard {base.names[i]} differ: {here} and {there}"
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
