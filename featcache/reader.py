"""Reading a cache: rows by number, keys to rows, bytes by pread.

n rows asked for, V views, L levels, T tokens, D width. Row ranges are read straight into the caller's arrays; Zarr's
own machinery is not entered. All rows of `features` are checked against their stored crc32c as they come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from featcache import manifest as manifests
from featcache import rng
from featcache.errors import UsageError, UserError, near
from featcache.store import Array, array, record_path, store

_MAX_OPEN = 512


class Keys(Sequence[str]):
    """The keys of all rows as one block of bytes and its offsets: no Python object per row."""

    def __init__(self, blob: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        self._blob, self._offsets = blob, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def digests(self) -> rng.U64:
        """(n, 2) key digests in row order."""
        return rng.key_digests(self)

    @cached_property
    def _sorted(self) -> npt.NDArray[np.int64]:
        return np.lexsort((self.digests[:, 1], self.digests[:, 0]))

    def find(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """(m,) row of each key, -1 where it is not here."""
        wanted = rng.key_digests(keys)
        if not len(self) or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        pairs = np.ascontiguousarray(self.digests[self._sorted]).view([("a", "u8"), ("b", "u8")])[:, 0]
        sought = np.ascontiguousarray(wanted).view(pairs.dtype)[:, 0]
        at = np.minimum(np.searchsorted(pairs, sought), len(self) - 1)
        return np.where(pairs[at] == sought, self._sorted[at], -1)


class Cache:
    """An opened cache. `read` is safe to call from several threads and after a fork."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = manifests.read(self.path)
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.views: int = self.identity["views"]
        self.levels: tuple[int, ...] = tuple(self.identity["levels"])
        self.arrays: dict[str, Array] = {name: array(name, f) for name, f in self.manifest["arrays"].items()}
        self.store = store(self.identity["store"])
        self.records = self._complete_shards()
        self._starts = np.cumsum([0, *(record["rows"] for record in self.records)])
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _complete_shards(self) -> list[dict[str, Any]]:
        paths = (record_path(self.path, shard["name"]) for shard in self.manifest["shards"])
        records = [manifests.read_json(path) for path in paths if path.is_file()]
        for record in records:
            problems = self.store.check(self.path, record["shard"], record, deep=False)
            if problems:
                raise UserError(f"cache file {problems[0]}; run `featcache verify {self.path}`")
        return records

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}: {manifests.title(self.manifest)})"

    @property
    def fields(self) -> list[str]:
        """Names that `read` takes."""
        return [name for name in self.arrays if name not in ("key", "key_offsets")]

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.manifest["shards"])

    @property
    def quarantined(self) -> list[dict[str, str]]:
        """Pictures that could not be used: {key, reason} each."""
        return [row for record in self.records for row in record["quarantined"]]

    @cached_property
    def keys(self) -> Keys:
        """The key of every row; `keys.find(list)` gives rows."""
        blobs, offsets, end = [], [np.zeros(1, np.int64)], 0
        for record in self.records:
            local = self._whole("key_offsets", record["shard"], record["rows"] + 1)
            blobs.append(self._whole("key", record["shard"], int(local[-1])))
            offsets.append(local[1:] + end)
            end += int(local[-1])
        return Keys(np.concatenate([np.zeros(0, np.uint8), *blobs]), np.concatenate(offsets))

    def _whole(self, name: str, shard: str, count: int) -> npt.NDArray[Any]:
        spec = self.arrays[name]
        out = np.empty((count, *spec.item), spec.dtype)
        path, _ = self.store.locate(self.path, shard, spec, self.views, 0, np.zeros(1, np.int64))
        self._pread(path, out, 0)
        return out

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """gamma, beta, eps and proj of the teacher's end, kept beside the shards."""
        from safetensors.numpy import load_file

        problems = manifests.check_files(self.path, self.manifest)
        if problems:
            raise UserError(f"cache file {problems[0]}; run the same `featcache extract` again to write it")
        return load_file(self.path / next(iter(self.manifest["files"])))

    def read(
        self,
        rows: npt.ArrayLike,
        view: int | npt.ArrayLike = 0,
        fields: Sequence[str] = ("features",),
        levels: Sequence[int] | None = None,
        tokens: int | None = None,
        out: Mapping[str, npt.NDArray[Any]] | None = None,
        check: bool = True,
    ) -> dict[str, npt.NDArray[Any]]:
        """Arrays (n, ...) of the rows, as stored (`features` stays encoded).

        `view`: one number or one per row. `levels`: the teacher's 1-based block numbers, as in `--levels`; `tokens`:
        the first so many of T ([CLS] first); both apply to arrays (L, T, ...). `out` is filled where it names a field.
        `check` compares whole levels with their crc32c. Raises UserError when bytes are missing or changed.
        """
        rows, views = _numbers("rows", rows), _numbers("view", view)
        if len(views) not in (1, len(rows)):
            raise UsageError(f"read: {len(views)} views for {len(rows)} rows; one view, or one for each row, is needed")
        views = np.broadcast_to(views, rows.shape) if len(views) == 1 else views
        self._check_request(rows, views, fields, levels, tokens)
        slots = [self.levels.index(level) for level in (self.levels if levels is None else levels)]
        result = {}
        for name in fields:
            spec = self.arrays[name]
            parts = self._parts(spec, slots, tokens)
            shape = _selected(spec, len(slots), tokens)
            target = out[name] if out is not None and name in out else np.empty((len(rows), *shape), spec.dtype)
            if target.shape != (len(rows), *shape) or target.dtype != spec.dtype or not target.flags.c_contiguous:
                raise UsageError(f"read: out[{name!r}] must be C-contiguous {spec.dtype} {(len(rows), *shape)}")
            self._fill(target, spec, rows, views, parts)
            result[name] = target
        if check and "features" in fields and (tokens is None or tokens == self.arrays["features"].item[1]):
            self._check_rows(result["features"], rows, views, slots)
        return result

    def _check_request(
        self,
        rows: npt.NDArray[np.int64],
        views: npt.NDArray[np.int64],
        fields: Sequence[str],
        levels: Sequence[int] | None,
        tokens: int | None,
    ) -> None:
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise UsageError(f"read: rows must be numbers from 0 to {len(self) - 1}")
        if views.size and (views.min() < 0 or views.max() >= self.views):
            raise UsageError(f"read: view must be from 0 to {self.views - 1}")
        for name in fields:
            if name not in self.fields:
                raise UsageError(f"read: unknown field {name!r}; {near(name, self.fields)}")
        for level in levels or ():
            if level not in self.levels:
                raise UsageError(f"read: level {level} is not stored; stored are {list(self.levels)}")
        most = self.identity["teacher"]["patches"] + 1
        if tokens is not None and not 1 <= tokens <= most:
            raise UsageError(f"read: tokens must be from 1 to {most}, {tokens} given")

    def _parts(self, spec: Array, slots: Sequence[int], tokens: int | None) -> list[tuple[int, int]]:
        """(offset, bytes) inside one item, in the order of the output; neighbours are joined."""
        if not _has_tokens(spec):
            return [(0, spec.item_bytes)]
        per_token = spec.item_bytes // (spec.item[0] * spec.item[1])
        level_bytes, wanted = per_token * spec.item[1], per_token * (tokens or spec.item[1])
        parts: list[tuple[int, int]] = []
        for slot in slots:
            if parts and parts[-1][0] + parts[-1][1] == slot * level_bytes:
                parts[-1] = (parts[-1][0], parts[-1][1] + wanted)
            else:
                parts.append((slot * level_bytes, wanted))
        return parts

    def _fill(
        self,
        target: npt.NDArray[Any],
        spec: Array,
        rows: npt.NDArray[np.int64],
        views: npt.NDArray[np.int64],
        parts: list[tuple[int, int]],
    ) -> None:
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        flat = target.reshape(len(rows), -1).view(np.uint8) if target.size else target
        groups = np.unique(np.stack([shards, views], 1), axis=0) if len(rows) else np.zeros((0, 2), np.int64)
        for shard, view in groups.tolist():
            at = np.flatnonzero((shards == shard) & (views == view))
            path, offsets = self.store.locate(
                self.path, self.records[shard]["shard"], spec, self.views, view, rows[at] - self._starts[shard]
            )
            for i, offset in zip(at.tolist(), offsets.tolist(), strict=True):
                done = 0
                for start, count in parts:
                    self._pread(path, flat[i, done : done + count], offset + start)
                    done += count

    def _pread(self, path: Path, out: npt.NDArray[Any], offset: int) -> None:
        """Fill `out` (contiguous) from the file; short or missing is an error, never zeros."""
        view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
        fd, keep = self._handle(path)
        try:
            while view:
                got = os.preadv(fd, [view], offset)
                if not got:
                    raise UserError(f"cache file {path}: ends before byte {offset + len(view)}; run `featcache verify`")
                view, offset = view[got:], offset + got
        finally:
            if not keep:
                os.close(fd)

    def _handle(self, path: Path) -> tuple[int, bool]:
        """An open file and whether it stays open; beyond the bound files are opened for one read."""
        fd = self._handles.get(path)
        if fd is not None:
            return fd, True
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cache file {path}: {error.strerror}; run `featcache verify {self.path}`") from error
        with self._lock:
            if path in self._handles or len(self._handles) >= _MAX_OPEN:
                return fd, False
            self._handles[path] = fd
        return fd, True

    def _check_rows(
        self,
        features: npt.NDArray[Any],
        rows: npt.NDArray[np.int64],
        views: npt.NDArray[np.int64],
        slots: Sequence[int],
    ) -> None:
        stored = self.read(rows, views, ("row_crc",))["row_crc"][:, list(slots)]
        for i, slot in np.ndindex(stored.shape):
            if crc32c.crc32c(features[i, slot].reshape(-1).view(np.uint8).data) != stored[i, slot]:
                raise UserError(
                    f"cache {self.path}: row {rows[i]} ({self.keys[int(rows[i])]!r}), view {views[i]}, level "
                    f"{self.levels[slots[slot]]} differs from its checksum; run `featcache verify {self.path}`"
                )

    def close(self) -> None:
        with self._lock:
            for fd in self._handles.values():
                os.close(fd)
            self._handles.clear()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


def _numbers(name: str, given: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(n,) whole numbers; a mask of booleans or a fraction is a mistake, not a row."""
    values = np.atleast_1d(np.asarray(given))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise UsageError(f"read: {name} must be whole numbers (n,), {values.dtype} {values.shape} is given")
    return values.astype(np.int64)


def _has_tokens(spec: Array) -> bool:
    """Whether an item is (L, T, ...), so that levels and tokens can be chosen from it."""
    return spec.dimensions[2:4] == ("level", "token")


def _selected(spec: Array, levels: int, tokens: int | None) -> tuple[int, ...]:
    if not _has_tokens(spec):
        return spec.item
    return (levels, tokens or spec.item[1], *spec.item[2:])
