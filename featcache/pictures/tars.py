"""Pictures of webdataset tars are read by byte offset."""

from __future__ import annotations

import glob
import os
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from featcache.errors import UserError
from featcache.pictures.classes import LABEL_DIGITS, FolderClasses, folder_classes, parse_label
from featcache.pictures.source import ALLOWED, SUFFIXES

LABEL_BYTES = 64  # read of a .cls member, of which a longer one is no number


@dataclass(frozen=True)
class TarSource:
    """Picture members of webdataset tars, in tar order; a member `KEY.cls` holds the label as a
    decimal number."""

    spec: str
    tars: list[str]
    keys: list[str] = field(repr=False)
    ranges: npt.NDArray[np.int64] = field(repr=False)  # (n, 3): tar number, byte offset, bytes
    label_ranges: dict[str, tuple[int, int, int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        return self._bytes(*(int(x) for x in self.ranges[index]))

    def _bytes(self, tar: int, offset: int, size: int) -> bytes:
        # One open per read: no file descriptor to share between threads or to lose over a fork, and
        # 10 us beside a decode.
        fd = os.open(self.tars[tar], os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    @cached_property
    def _folder_classes(self) -> FolderClasses:
        return folder_classes(self.spec, self.tars)

    @property
    def classes(self) -> list[str] | None:
        return self._folder_classes.names if self.label_ranges else None

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if not self.label_ranges:
            return None
        missing = [key for key in self.keys if key not in self.label_ranges]
        if missing:
            raise UserError(
                f"labels of {self.spec}: {len(missing)} of {len(self)} pictures have no .cls "
                f"member, the first is {missing[0]!r}; every picture needs one: pack the tars "
                "again with `featcache pack`"
            )
        labels = np.array([self._label(key) for key in self.keys], np.int64)
        return self._folder_classes.number(labels, [self.label_ranges[key][0] for key in self.keys])

    def _label(self, key: str) -> int:
        tar, offset, size = self.label_ranges[key]
        text = self._bytes(tar, offset, min(size, LABEL_BYTES))
        label = parse_label(text) if size <= LABEL_BYTES else None
        if label is None:
            raise UserError(
                f"label of {key!r} in {self.spec}: {text[:40].decode(errors='replace')!r} is "
                f"given, a decimal number from 0 on of at most {LABEL_DIGITS} digits is needed; "
                "pack the tars again with `featcache pack`"
            )
        return label


def expand_patterns(spec: str) -> list[str]:
    """Return the tars that a path, a glob or a brace pattern names. Raises UserError where there is
    none."""
    try:
        parts = list(braceexpand(spec))
    except ValueError as error:  # UnbalancedBracesError
        raise UserError(
            f"pictures {spec!r}: a brace is not closed; allowed is {ALLOWED}"
        ) from error
    tars = [path for part in parts for path in (sorted(glob.glob(part)) or [part])]  # noqa: PTH207
    missing = [path for path in tars if not Path(path).is_file()]
    if missing or not tars:
        raise UserError(
            f"no pictures found: {missing[0] if missing else spec!r} does not exist; allowed is "
            f"{ALLOWED}"
        )
    return tars


def open_tars(spec: str, tars: list[str]) -> TarSource:
    """Index the members of tars. Raises UserError where they hold no pictures."""
    keys: list[str] = []
    ranges: list[tuple[int, int, int]] = []
    labels: dict[str, tuple[int, int, int]] = {}
    for number, path in enumerate(tars):
        for key, suffix, offset, size in _tar_members(path):
            if f".{suffix.lower()}" in SUFFIXES:
                keys.append(key)
                ranges.append((number, offset, size))
            elif suffix == "cls":
                labels[key] = (number, offset, size)
    if not keys:
        raise UserError(
            f"no pictures found in {spec!r}: {len(tars)} tars hold none; allowed is {ALLOWED}"
        )
    return TarSource(spec, tars, keys, np.array(ranges, np.int64), labels)


def _tar_members(path: str) -> list[tuple[str, str, int, int]]:
    """(key, suffix, offset, bytes) of each file; webdataset's rule: the key ends at the first dot
    of the file name."""
    members, end = [], 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = unescape(f"{folder}/{stem}" if folder else stem)
                    members.append((key, suffix, member.offset_data, member.size))
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"reading {path!r} as a tar failed: {error}; allowed is {ALLOWED}"
        ) from error
    if not _ends(path, end):
        raise UserError(
            f"{path!r} is cut off: it has no end mark after its last member; fetch or pack it again"
        )
    return members


def _ends(path: str, end: int) -> bool:
    """Whether a block of zeros, a tar's end mark, stands where the last member ends."""
    with Path(path).open("rb") as file:
        file.seek(end)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def escape(key: str) -> str:
    """Return a key as a tar member's stem: dots of the file name would end the key for webdataset,
    so they are %2E there."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def unescape(stem: str) -> str:
    """Return the key of a tar member's stem.

    >>> unescape(escape("n01/a.b")), escape("n01/a.b")
    ('n01/a.b', 'n01/a%2Eb')
    """
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.replace("%2E", ".").replace("%25", "%")
