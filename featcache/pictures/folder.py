"""Pictures of a folder are listed and read; class folders are labels."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures.source import ALLOWED, SUFFIXES, Source
from featcache.pictures.tars import open_tars


@dataclass(frozen=True)
class FolderSource:
    """Picture files below a folder, in the order of their paths; class folders are labels, as in
    ImageFolder."""

    spec: str
    root: Path
    files: list[str] = field(repr=False)
    keys: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()

    @cached_property
    def classes(self) -> list[str] | None:
        if not all("/" in key for key in self.keys):
            return None
        return sorted({key.split("/", 1)[0] for key in self.keys})

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if self.classes is None:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[key.split("/", 1)[0]] for key in self.keys], np.int64)


def open_folder(spec: str, root: Path) -> Source:
    """List the pictures below a folder, or open the tars in it. Raises UserError where there is
    neither."""
    files = sorted(
        (Path(directory) / name).relative_to(root).as_posix()
        for directory, _, names in os.walk(root, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )
    tars = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))  # noqa: PTH118,PTH207 (the text is kept as given)
    if not files and tars:
        return open_tars(spec, tars)
    if not files:
        raise UserError(f"no pictures found in the folder {spec!r}; allowed is {ALLOWED}")
    return FolderSource(spec, root, files, [file[: -len(Path(file).suffix)] for file in files])
