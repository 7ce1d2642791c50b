"""Pictures of webdataset tars are read by byte offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures.classes import LABEL_DIGITS, FolderClasses, folder_classes, parse_label
from featcache.pictures.passed_over import PassedOver, Tally, listed
from featcache.pictures.regular_file import read_range
from featcache.pictures.source import ALLOWED
from featcache.pictures.stamps import stamp_files
from featcache.pictures.tar_index import Member, Segments, read_members
from featcache.pictures.tar_samples import choose_pictures
from featcache.pictures.tar_samples import escape as escape
from featcache.pictures.tar_samples import unescape as unescape

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
    sparse: dict[int, Segments] = field(default_factory=dict, repr=False)  # by picture
    passed_over: tuple[PassedOver, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        tar, offset, size = (int(x) for x in self.ranges[index])
        return read_range(self.tars[tar], offset, size, self.sparse.get(index))

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them."""
        ranges = self.ranges[np.asarray(rows, np.int64)]
        used = [self.tars[tar] for tar in np.unique(ranges[:, 0])]
        return stamp_files((self.keys[row] for row in rows), used, ranges)

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
        text = read_range(self.tars[tar], offset, min(size, LABEL_BYTES))
        label = parse_label(text) if size <= LABEL_BYTES else None
        if label is None:
            raise UserError(
                f"label of {key!r} in {self.spec}: {text[:40].decode(errors='replace')!r} is "
                f"given, a decimal number from 0 on of at most {LABEL_DIGITS} digits is needed; "
                "pack the tars again with `featcache pack`"
            )
        return label


def open_tars(spec: str, tars: list[str], tally: Tally | None = None) -> TarSource:
    """Index the members of tars; `tally` has what was passed over already. Raises UserError where
    they hold no pictures."""
    tally = tally or Tally()
    pictures: list[tuple[str, int, Member]] = []  # key, number of the tar, member
    labels: dict[str, tuple[int, int, int]] = {}
    for number, path in enumerate(tars):
        found = choose_pictures(read_members(path, tally), tally)
        pictures += [(key, number, member) for key, member in found.pictures]
        labels |= {key: (number, each.offset, each.size) for key, each in found.labels.items()}
    if not pictures:
        raise UserError(
            f"no pictures found in {spec!r}: {len(tars)} tars hold none"
            + (f", passed over {listed(tally.rows)}" if tally.rows else "")
            + f"; allowed is {ALLOWED}"
        )
    keys = [key for key, _, _ in pictures]
    ranges = np.array([(tar, member.offset, member.size) for _, tar, member in pictures], np.int64)
    sparse = {
        i: member.segments
        for i, (_, _, member) in enumerate(pictures)
        if member.segments is not None
    }
    return TarSource(spec, tars, keys, ranges, labels, sparse, tally.rows)
