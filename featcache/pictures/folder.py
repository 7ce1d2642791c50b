"""Pictures of a folder are listed and read; class folders are labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures import regular_file
from featcache.pictures.given_labels import GivenLabels
from featcache.pictures.listing import Listing, list_folder
from featcache.pictures.parquet import ParquetSource, is_parquet, open_parquet
from featcache.pictures.passed_over import TARS, PassedOver, Tally, listed
from featcache.pictures.source import ALLOWED, check_double
from featcache.pictures.spec import Spec
from featcache.pictures.stamps import stamp_files
from featcache.pictures.tars import TarSource, open_tars


@dataclass(frozen=True)
class FolderSource:
    """Picture files below a folder, in the order of their paths; class folders are labels, as in
    ImageFolder."""

    spec: str
    root: Path
    files: list[str] = field(repr=False)
    keys: list[str] = field(repr=False)
    passed_over: tuple[PassedOver, ...] = ()
    given: GivenLabels | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return regular_file.read_file(self.root / self.files[index])

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them."""
        root = str(self.root)
        return stamp_files(
            (self.keys[row] for row in rows),
            (os.path.join(root, self.files[row]) for row in rows),  # noqa: PTH118 (as in stamps)
        )

    @cached_property
    def classes(self) -> list[str] | None:
        if self.given is not None:
            return self.given.names
        if not all("/" in key for key in self.keys):
            return None
        return sorted({key.split("/", 1)[0] for key in self.keys})

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if self.given is not None:
            return self.given.numbers
        if self.classes is None:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[key.split("/", 1)[0]] for key in self.keys], np.int64)


def open_folder(spec: Spec) -> FolderSource | TarSource | ParquetSource:
    """List the pictures below a folder, or open the tars in it, or its parquet files. Raises
    UserError where there are none, and where a part of it cannot be listed."""
    text = spec.path
    found = list_folder(text)
    if found.pictures:
        return _pictures(spec, found)
    tars = sorted(name for name in found.tars if "/" not in name)
    if tars:
        spec.check_kind("tars")
        tally = _finish(found, tars, [name for name in found.tars if "/" in name])
        return open_tars(text, _joined(text, tars), tally, spec.image_member)
    parquet = sorted(name for name in found.others if is_parquet(name) and "/" not in name)
    rows = _finish(found, parquet, found.tars)
    if parquet:
        return open_parquet(spec, _joined(text, parquet), rows)
    raise UserError(
        f"no pictures found in the folder {text!r}"
        + (f": passed over {listed(rows.rows)}" if rows.rows else "")
        + f"; allowed is {ALLOWED}"
    )


def _joined(folder: str, names: list[str]) -> list[str]:
    return [os.path.join(folder, name) for name in names]  # noqa: PTH118 (the text is kept as given)


def _pictures(spec: Spec, found: Listing) -> FolderSource:
    spec.check_kind("a folder")
    files = sorted(found.pictures)
    rows = _finish(found, files, found.tars).rows
    keys = [os.path.splitext(file)[0] for file in files]  # noqa: PTH122 (a Path a file costs as much as all else)
    check_double(spec.path, keys, files.__getitem__)
    return FolderSource(spec.path, Path(spec.path), files, keys, rows)


def _finish(found: Listing, used: list[str], tars: list[str]) -> Tally:
    """Count the tars and other files that are passed over."""
    for name in sorted(tars):
        found.tally.add(TARS, name)
    found.tally.add_others(sorted(found.others), used)
    return found.tally
