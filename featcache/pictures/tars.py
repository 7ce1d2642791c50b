"""Pictures of webdataset tars, and of tars of tars, are read by byte offset.

    ILSVRC2012_img_train.tar / n01440764.tar / n01440764_10026.JPEG
    key    n01440764/n01440764_10026       as in the folder that it would be unpacked to
    label  n01440764                       the inner tar's name; .cls members come first

n pictures.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, counted
from featcache.pictures.classes import LABEL_DIGITS, FolderClasses, folder_classes, parse_label
from featcache.pictures.given_labels import GivenLabels
from featcache.pictures.passed_over import HIDDEN_TAR, PassedOver, Tally, is_hidden, listed
from featcache.pictures.source import ALLOWED, SUFFIXES, check_double
from featcache.pictures.stamps import stamp_files
from featcache.pictures.tar_files import LocalTars, TarFiles
from featcache.pictures.tar_index import Member, Segments, read_members
from featcache.pictures.tar_samples import Chosen, choose_member, choose_pictures
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
    inner: GivenLabels | None = None  # by the inner tars, where all pictures lie in some
    given: GivenLabels | None = None
    files: TarFiles = field(default_factory=LocalTars, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        tar, offset, size = (int(x) for x in self.ranges[index])
        return self.files.read(self.tars[tar], offset, size, self.sparse.get(index))

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them."""
        ranges = self.ranges[np.asarray(rows, np.int64)]
        used = [self.tars[tar] for tar in np.unique(ranges[:, 0])]
        return stamp_files((self.keys[row] for row in rows), used, ranges, self.files.told)

    @cached_property
    def _folder_classes(self) -> FolderClasses:
        return folder_classes(self.spec, self.tars)

    @property
    def _named(self) -> GivenLabels | None:
        """The labels that no .cls member holds."""
        return self.given or (None if self.label_ranges else self.inner)

    @property
    def classes(self) -> list[str] | None:
        if self._named is not None:
            return self._named.names
        return self._folder_classes.names if self.label_ranges else None

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if self._named is not None:
            return self._named.numbers
        if not self.label_ranges:
            return None
        missing = [key for key in self.keys if key not in self.label_ranges]
        if missing:
            raise UserError(
                f"labels of {self.spec}: {len(missing)} of "
                f"{counted(len(self), 'picture has', 'pictures have')} no .cls "
                f"member, the first is {missing[0]!r}; every picture needs one: pack the tars "
                "again with `featcache pack`"
            )
        labels = np.array([self._label(key) for key in self.keys], np.int64)
        return self._folder_classes.number(labels, [self.label_ranges[key][0] for key in self.keys])

    def _label(self, key: str) -> int:
        tar, offset, size = self.label_ranges[key]
        text = self.files.read(self.tars[tar], offset, min(size, LABEL_BYTES))
        label = parse_label(text) if size <= LABEL_BYTES else None
        if label is None:
            raise UserError(
                f"label of {key!r} in {self.spec}: {text[:40].decode(errors='replace')!r} is "
                f"given, a decimal number from 0 on of at most {LABEL_DIGITS} digits is needed; "
                "pack the tars again with `featcache pack`"
            )
        return label


class _Part(NamedTuple):
    """What a tar holds itself, or one inner tar of it; `folder` is the inner one's name."""

    folder: str
    chosen: Chosen


def open_tars(
    spec: str,
    tars: list[str],
    tally: Tally | None = None,
    member: str | None = None,
    files: TarFiles | None = None,
) -> TarSource:
    """Index the members of tars; `tally` has what was passed over already, `member` is the suffix
    of each sample's picture. Raises UserError where they hold no pictures."""
    tally, files = tally or Tally(), files or LocalTars()
    pictures: list[tuple[str, int, Member]] = []  # key, number of the tar, member
    folders: list[str] = []
    labels: dict[str, tuple[int, int, int]] = {}
    for number, (parts, rows) in enumerate(
        files.map(lambda path: _parts(files, path, member), tars)
    ):
        tally.add_rows(rows)
        for folder, found in parts:
            start = f"{folder}/" if folder else ""
            pictures += [(start + key, number, each) for key, each in found.pictures]
            folders += [folder] * len(found.pictures)
            labels |= {start + k: (number, m.offset, m.size) for k, m in found.labels.items()}
    if not pictures:
        wanted = f" with a member KEY.{member.removeprefix('.')}" if member else ""
        raise UserError(
            f"no pictures found in {spec!r}: {counted(len(tars), 'tar holds', 'tars hold')} "
            f"none{wanted}"
            + (f", passed over {listed(tally.rows)}" if tally.rows else "")
            + f"; allowed is {ALLOWED}"
        )
    keys = [key for key, _, _ in pictures]
    check_double(
        spec,
        keys,
        lambda row: "/".join(
            [tars[pictures[row][1]]]
            + [f"{folders[row]}.tar"] * bool(folders[row])
            + [pictures[row][2].name]
        ),
    )
    ranges = np.array([(tar, each.offset, each.size) for _, tar, each in pictures], np.int64)
    sparse = {
        i: each.segments for i, (_, _, each) in enumerate(pictures) if each.segments is not None
    }
    inner = _by_folder(folders)
    return TarSource(spec, tars, keys, ranges, labels, sparse, tally.rows, inner, files=files)


def _parts(
    files: TarFiles, path: str, member: str | None
) -> tuple[list[_Part], tuple[PassedOver, ...]]:
    """Return the pictures of a tar, where it has none but tars those of each inner tar; and what
    was passed over."""
    tally = Tally()
    return list(_each_part(files, path, tally, member)), tally.rows


def _each_part(files: TarFiles, path: str, tally: Tally, member: str | None) -> Iterator[_Part]:
    members = read_members(files, path, tally)
    inner = [each for each in members if _suffix(each) == ".tar"]
    if not inner or any(_suffix(each) in SUFFIXES for each in members):
        yield _Part("", _choose(members, tally, member))
        return
    tally.add_others([each.name for each in members if _suffix(each) != ".tar"], [])
    offsets = set[int]()
    for each in inner:
        name = each.name.removeprefix("./")
        if any(map(is_hidden, name.split("/"))):
            tally.add(HIDDEN_TAR, name)
            continue
        _check_inner(path, each, offsets)
        folder = posixpath.splitext(name)[0]
        yield _Part(folder, _choose(read_members(files, path, tally, each), tally, member))


def _check_inner(path: str, inner: Member, offsets: set[int]) -> None:
    """Refuse an inner tar that lies nowhere as it is, or twice: links would multiply pictures."""
    if inner.segments is None and inner.offset not in offsets:
        offsets.add(inner.offset)
        return
    what = "links to another" if inner.segments is None else "is sparse"
    raise UserError(
        f"{path!r}: its inner tar {inner.name[:200]!r} {what}; plain tars are allowed in a tar, "
        "each once: pack it again"
    )


def _suffix(member: Member) -> str:
    return posixpath.splitext(member.name)[1].lower()


def _choose(members: list[Member], tally: Tally, member: str | None) -> Chosen:
    return choose_member(members, member, tally) if member else choose_pictures(members, tally)


def _by_folder(folders: list[str]) -> GivenLabels | None:
    """Return the inner tars as classes, where every picture lies in one."""
    if not all(folders):
        return None
    names, numbers = np.unique(folders, return_inverse=True)
    return GivenLabels(names.tolist(), numbers.astype(np.int64))
