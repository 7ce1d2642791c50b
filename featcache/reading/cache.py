"""A cache is read by row number, its keys are matched with rows, and its bytes come by pread.

n rows asked for, V views, L levels, T tokens, D width. Row ranges are read straight into the
caller's arrays; Zarr's own machinery is not entered. Every item is compared with its stored crc32c;
`verify_rows` lowers the share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError, counted, near
from featcache.objects.url import is_object_url
from featcache.objects.url import parse as parse_url
from featcache.reading import far_ranges, request, reused_memory, wanted
from featcache.reading.byte_ranges import RangeBatch, RowChecksumError
from featcache.reading.compressed_rows import note_archive
from featcache.reading.locations import locate_rows
from featcache.reading.range_reader import RangeReader, choose_io
from featcache.reading.read_plan import ReadPlan
from featcache.reading.row_error import row_error
from featcache.reading.value_check import check_values
from featcache.runtime.local_path import local_path
from featcache.storage import checksums, codec_state, manifest
from featcache.storage.files import address, files_of
from featcache.storage.indexed_keys import IndexedKeys
from featcache.storage.keys import I64, Keys
from featcache.storage.mount import mount
from featcache.storage.part import describe_part, open_parts
from featcache.storage.statistics import merge_totals
from featcache.storage.store import Array


class Cache:
    """Opens a cache for reading. `read` is safe to call from several threads, after a fork, and in
    spawned processes.

    `threads` that read at the same time (default: 4, or fewer cores). `verify_rows` from 0 to 1:
    the share of rows that are checked as they are read. `io`: `buffered` leaves what is read in the
    page cache, `streaming` takes it out again, `direct` never puts it there (O_DIRECT); `auto`
    streams a cache larger than the machine's memory, of which nothing would still be there when it
    is wanted again. `partial` opens a cache without the shards of which something is missing or
    short, instead of an error: `absent` says which and why, and their pictures are not among the
    rows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify_rows: float = 1.0,
        io: str = "auto",
        partial: bool = False,
    ) -> None:
        if not isinstance(verify_rows, int | float) or not 0 <= verify_rows <= 1:
            raise UsageError(f"verify_rows {verify_rows!r}: a share from 0 to 1 is allowed")
        given = os.fspath(path)
        if is_object_url(given):
            self.path = mount(parse_url(given))
        else:
            self.path = Path(local_path(given, "cache"))
        self._absolute_path = self.path.absolute()  # the working directory may change
        self._options = {
            "threads": threads,
            "verify_rows": verify_rows,
            "io": io,
            "partial": partial,
        }
        self._parts, unfinished = open_parts(self._absolute_path, partial)
        # added, not whole: not read
        self.unfinished = [describe_part(part.manifest) for part in unfinished]
        self._base = self._parts[0]
        self.absent: dict[str, str] = {
            shard: why for part in self._parts for shard, why in part.absent.items()
        }
        self.manifest = self._base.manifest
        self.identity = self._base.identity
        self.records: Sequence[dict[str, Any]] = self._base.records
        self.verify_rows, self._calls = verify_rows, 0
        self.notes_archive = self.is_archive  # whether it is said once that this is slow
        self.views: int = self.views_of(self._base.teacher)
        self.levels: tuple[int, ...] = self.levels_of(self._base.teacher)
        self.arrays: dict[str, Array] = dict(self._all_arrays())
        self._reader = RangeReader(threads, choose_io(io, self.bytes))

    def _all_arrays(self) -> Iterator[tuple[str, Array]]:
        """Yield arrays by the names that `read` takes, with the levels of all parts; another
        teacher's as TEACHER/NAME."""
        for teacher in dict.fromkeys(part.teacher for part in self._parts):
            first = next(part for part in self._parts if part.teacher == teacher)
            levels = len(self.levels_of(teacher))
            for name, spec in first.arrays.items():
                if name in checksums.NAMES:
                    continue
                if name == "pixel_hash":  # whatever it is stored as
                    spec = replace(spec, dtype="<u8")
                if checksums.has_levels(spec):
                    spec = replace(spec, item=(levels, *spec.item[1:]))
                if first is self._base:
                    yield name, spec
                elif checksums.has_levels(spec) or name in ("attention", "mask_order", "token_ids"):
                    yield f"{teacher}/{name}", spec

    def levels_of(self, teacher: str) -> tuple[int, ...]:
        """Return the stored levels of one of the cache's teachers, ascending."""
        return tuple(
            sorted(
                {level for part in self._parts if part.teacher == teacher for level in part.levels}
            )
        )

    def views_of(self, teacher: str) -> int:
        """Return the number of stored views of one of the cache's teachers."""
        return max(part.view_numbers.stop for part in self._parts if part.teacher == teacher)

    def manifest_of(self, teacher: str) -> dict[str, Any]:
        """Return the manifest of a teacher's first part."""
        if teacher not in self.teachers:
            raise UsageError(f"unknown teacher {teacher!r}; {near(str(teacher), self.teachers)}")
        return next(part.manifest for part in self._parts if part.teacher == teacher)

    def statistics_of(self, teacher: str) -> dict[str, dict[str, Any]]:
        """Return the statistics of the arrays of a teacher's parts."""
        return merge_totals(part.statistics for part in self._parts if part.teacher == teacher)

    @property
    def teachers(self) -> list[str]:
        """The teacher of the cache itself, then those that were added."""
        return list(dict.fromkeys(part.teacher for part in self._parts))

    def __len__(self) -> int:
        return len(self._base)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}: {manifest.title(self.manifest)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": address(self._absolute_path), **self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("path"), **state)  # type: ignore[misc]

    @property
    def fields(self) -> list[str]:
        """Names that `read` takes."""
        return list(self.arrays)

    @property
    def complete(self) -> bool:
        return self._base.complete

    @property
    def is_archive(self) -> bool:
        """Whether rows are compressed, and slow to read."""
        return any(part.compression for part in self._parts)

    @property
    def bytes(self) -> int:
        """The size of all files of complete shards."""
        return sum(part.bytes for part in self._parts)

    @property
    def compressed_bytes(self) -> tuple[int, int]:
        """The size of all compressed files, and of the rows in them; (0, 0) where none is."""
        files, rows = zip(*(part.compressed_bytes for part in self._parts), strict=True)
        return sum(files), sum(rows)

    @property
    def parts(self) -> list[str]:
        """The extractions that make up this cache, in words: itself first, then what was added."""
        return [describe_part(part.manifest) for part in self._parts]

    @property
    def quarantined(self) -> list[dict[str, str]]:
        """Pictures that could not be used: {key, reason} each."""
        return self._base.quarantined

    @property
    def shard_names(self) -> Sequence[str]:
        """The names of complete shards."""
        return self._base.names

    @property
    def shard_starts(self) -> I64:
        """(s + 1,) the first row of each complete shard, and the end of the last."""
        return self._base.starts

    @cached_property
    def keys(self) -> Keys | IndexedKeys:
        """The key of every row; `keys.find(list)` gives rows."""
        return self._base.keys()

    def tail(self, teacher: str | None = None) -> dict[str, npt.NDArray[np.float32]]:
        """Read gamma, beta, eps and proj of a teacher's end, kept beside the shards; of the cache's
        own by default."""
        if teacher not in (None, *self.teachers):
            raise UsageError(
                f"tail: unknown teacher {teacher!r}; {near(str(teacher), self.teachers)}"
            )
        teacher = teacher or self._base.teacher
        return next(part for part in self._parts if part.teacher == teacher).tail()

    def codec_state(self, teacher: str, levels: Sequence[int]) -> dict[str, Any]:
        """Read the state (tensors) that decodes these levels of a teacher, in their order."""
        parts = [part for part in self._parts if part.teacher == teacher]
        return codec_state.read_levels(self.path, parts, levels)

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
        """Read arrays (n, ...) of the rows, as stored (`features` stays encoded).

        `view`: one number or one per row. `levels`: the teacher's 1-based block numbers, as in
        `--levels`; `tokens`: the first so many of T ([CLS] first; in ranked caches then by rank);
        both apply to arrays (L, T, ...), and to no other field. `out` is filled where it names a
        field; other arrays take the memory of earlier ones that are gone. `check=False` compares
        nothing. Raises UserError when bytes are missing or not those that were written.
        """
        result = self._read(rows, view, fields, levels, tokens, out, check, self._fill)
        for name in result:
            self._check_values(name, result[name])
        return result

    def read_ahead(
        self,
        rows: npt.ArrayLike,
        view: int | npt.ArrayLike = 0,
        fields: Sequence[str] = ("features",),
        levels: Sequence[int] | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Fetch what `read` would, from an object store to its stage; False where there is no room
        for it yet. Does nothing where files are here."""
        fetched = True

        def fill(batches: Sequence[RangeBatch], rows: I64, views: I64) -> None:
            nonlocal fetched
            fetched = far_ranges.fetch(batches) and fetched

        self._read(rows, view, fields, levels, tokens, None, True, fill)
        return fetched

    def _read(
        self,
        rows: npt.ArrayLike,
        view: int | npt.ArrayLike,
        fields: Sequence[str],
        levels: Sequence[int] | None,
        tokens: int | None,
        out: Mapping[str, npt.NDArray[Any]] | None,
        check: bool,
        fill: Callable[[Sequence[RangeBatch], I64, I64], None],
    ) -> dict[str, npt.NDArray[Any]]:
        rows, views, fields = (
            request.check_numbers("rows", rows),
            request.check_numbers("view", view),
            request.check_fields(fields),
        )
        request.check_options(levels, tokens, out, fields)
        if len(views) not in (1, len(rows)):
            raise UsageError(
                f"read: {counted(len(views), 'view')} for {counted(len(rows), 'row')}; "
                "one view, or one for each row, is "
                "needed"
            )
        views = np.broadcast_to(views, rows.shape) if len(views) == 1 else views
        wanted.check_request(self, rows, views, fields)
        checked = self._choose_rows(rows, views) if check else np.zeros(len(rows), bool)
        locations = locate_rows(self._base.starts, rows, views)
        plan = ReadPlan(self._parts, rows, locations, checked)
        tables, batches = plan.checksum_batches(fields, tokens)
        fill(batches, rows, views)
        result: dict[str, npt.NDArray[Any]] = {}
        batches = []
        for name in fields:
            chosen = wanted.wanted_levels(self, name, levels)
            count = wanted.wanted_tokens(self, name, tokens)
            target = result[name] = self._target(name, len(rows), len(chosen), count, out)
            if checked.any() and wanted.must_read_whole(self, name, count):
                whole = self._read(rows, views, (name,), chosen, None, None, check, fill)
                target[:] = whole[name][:, :, :count]
            else:
                batches += plan.field_batches(
                    name, self.arrays[name], target, chosen, count, tables
                )
        fill(batches, rows, views)
        return result

    def _fill(self, batches: Sequence[RangeBatch], rows: I64, views: I64) -> None:
        if self.notes_archive and any(batch.chunks for batch in batches):
            note_archive(str(self.path))
        try:
            self._reader.read(batches)
        except RowChecksumError as bad:
            row, view = int(rows[bad.row]), int(views[bad.row])
            key = self.keys[row]
            raise row_error(self.path, self._parts, bad.path, row, key, view) from bad

    def set_stage(self, folder: Path, limit: int | None = None, shares: int = 1) -> None:
        """Let `read_ahead` keep what it fetches in a folder: at most `limit` bytes, half of what is
        free there by default, shared by so many processes. UsageError where rows are here
        already."""
        files_of(self._absolute_path).set_stage(folder, limit, shares)

    def derive(self, name: str, *args: Any, **options: Any) -> npt.NDArray[np.float32]:
        """Read `h`, `f`, `z`, `fd` or `y` (n, T, width), see `featcache.derive.read`."""
        from featcache.reading.derived import read  # needs torch, which reading does without

        return read(self, name, *args, **options)

    # ------------------------------------------------------------ the request

    def _target(
        self,
        name: str,
        rows: int,
        levels: int,
        tokens: int,
        out: Mapping[str, npt.NDArray[Any]] | None,
    ) -> npt.NDArray[Any]:
        spec = self.arrays[name]
        shape = (
            rows,
            *((levels, tokens, *spec.item[2:]) if checksums.has_levels(spec) else spec.item),
        )
        if out is None or name not in out:
            return reused_memory.shared.empty(shape, spec.dtype)
        target = out[name]
        if target.shape != shape or target.dtype != spec.dtype or not target.flags.carray:
            raise UsageError(
                f"read: out[{name!r}] must be C-contiguous, writable {spec.dtype} {shape}"
            )
        return target

    def _choose_rows(self, rows: I64, views: I64) -> npt.NDArray[np.bool_]:
        """Choose the rows of this call that are checked: others at the next."""
        if self.verify_rows == 1:
            return np.ones(len(rows), bool)
        self._calls += 1
        mixed = (rows * 2 + views * 3 + self._calls).astype(np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.verify_rows

    # ------------------------------------------------------------ errors

    def _check_values(self, name: str, values: npt.NDArray[Any]) -> None:
        """Raise UserError where what was read of a field is not what an extraction writes."""
        teacher, _, plain = name.rpartition("/")
        about = self.manifest_of(teacher) if teacher else self.manifest
        check_values(f"cache {str(self.path)!r}: {name}", plain, values, about["identity"])

    def close(self) -> None:
        """Close all files, and give kept memory back; the next `read` opens them again."""
        self._reader.close()
        reused_memory.shared.clear()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # then names are gone, even those of modules, and files close anyway
        if hasattr(self, "_reader") and not is_finalizing():
            self._reader.close()
