"""Names of classes lie beside packed pictures, and say what a label's number means.

A folder of tars has classes.json, PACK.beton has PACK.beton.classes.json: a JSON list, in which a
label is the index of its name, or null where nobody named the classes. Without the file, or with
null, names are unknown. Whoever packed the pictures wrote it, so that it is checked before it is
believed.

n pictures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, raise_if_unreadable

I64 = npt.NDArray[np.int64]
NAME = "classes.json"
MOST_CLASSES = 1 << 17  # ImageNet-22k has 22 thousand; a score of each is kept for every picture
LARGEST_BYTES = 64 << 20
LABEL_DIGITS = 18  # what 64 bits hold


def read_classes(path: Path) -> list[str] | None:
    """Read the names of classes; None where there is no file, or it names none. Raises UserError
    for a file that `featcache pack` would not have written."""
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise _refusal(path, "no regular file")
        if path.stat().st_size > LARGEST_BYTES:
            raise _refusal(path, f"a file of {path.stat().st_size} bytes")
        names = json.loads(path.read_bytes())
    except OSError as error:
        raise_if_unreadable(path, error)
        raise _refusal(path, error.strerror or "a file that cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "something that is no JSON") from error
    if problem := _problem(names):
        raise _refusal(path, problem)
    return list(names) if names else None


def _problem(names: Any) -> str:
    """Say why a JSON value is no list of different names; empty where it is one, or null."""
    if names is None:
        return ""
    if not isinstance(names, list) or not names:
        return f"{'an empty list' if names == [] else type(names).__name__}"
    if len(names) > MOST_CLASSES:
        return f"{len(names)} names, more than {MOST_CLASSES},"
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            return f"{name!r:.40} as entry {i}"
        if not name.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in name):
            return f"{name!a:.80}, which is no Unicode text, as entry {i}"
    double = [name for name, count in Counter(names).items() if count > 1]
    return f"the name {double[0]!r:.80} twice" if double else ""


def _refusal(path: Path, given: str) -> UserError:
    return UserError(
        f"classes of the pictures: {str(path)!r} holds {given}; a JSON list of different names is "
        "allowed, or null, as `featcache pack` writes it: pack the pictures again, or take the "
        "file away, and labels are numbers without names"
    )


def parse_label(text: bytes) -> int | None:
    """Return the class number of a `.cls` member, or None where it is no decimal number from 0 on
    that 64 bits hold.

    >>> parse_label(b"7\\n"), parse_label(b"-1"), parse_label(b"9" * 19)
    (7, None, None)
    """
    digits = text.decode(errors="replace").strip()
    return int(digits) if digits.isdecimal() and len(digits) <= LABEL_DIGITS else None


@dataclass(frozen=True)
class FolderClasses:
    """Names the classes of tars, which may lie in several folders, each with numbers of its own."""

    spec: str
    names: list[str] | None  # of all folders: those of the first, then what the others add
    lists: list[list[str]] = field(repr=False)  # of each folder, where they are known
    folders: I64 = field(repr=False)  # (tars,): the number of each tar's folder

    def number(self, labels: I64, tars: Sequence[int]) -> I64:
        """Return labels (n,), read from the tars numbered `tars`, as indices of `names`. Raises
        UserError for a label without a name."""
        index = {name: i for i, name in enumerate(self.names or ())}
        out, folder = labels.copy(), self.folders[np.asarray(tars)]
        for i, names in enumerate(self.lists):
            here = folder == i
            check_labels(self.spec, labels[here], names)
            out[here] = np.array([index[name] for name in names], np.int64)[labels[here]]
        return out


def folder_classes(spec: str, tars: Sequence[str]) -> FolderClasses:
    """Read the names of classes beside tars. Raises UserError where one folder names them and
    another does not: a label would mean two things."""
    parents = [Path(tar).parent for tar in tars]
    folders = list(dict.fromkeys(parents))
    found = [read_classes(folder / NAME) for folder in folders]
    lists = [names for names in found if names is not None]
    if lists and len(lists) < len(found):
        known, other = (
            next(f for f, names in zip(folders, found, strict=True) if (names is None) is lacks)
            for lacks in (False, True)
        )
        raise UserError(
            f"labels of {spec!r}: {str(known / NAME)!r} names its classes, and {str(other)!r} has "
            f"no names, so a label would mean two things; put its {NAME} there, or give the tars "
            "of one folder"
        )
    merged = list(dict.fromkeys(name for names in lists for name in names))
    number = {folder: i for i, folder in enumerate(folders)}
    return FolderClasses(
        spec, merged or None, lists, np.array([number[parent] for parent in parents], np.int64)
    )


def check_labels(spec: str, labels: I64, names: Sequence[str] | None) -> I64:
    """Return labels (n,) of pictures whose classes have these names. Raises UserError for one that
    is no index of a name."""
    if names is not None and labels.size and not 0 <= labels.min() <= labels.max() < len(names):
        strange = int(labels[(labels < 0) | (labels >= len(names))][0])
        raise UserError(
            f"labels of {spec!r}: {strange} is given, its {NAME} has {len(names)} names, so that 0 "
            f"to {len(names) - 1} are allowed; pack the pictures again, or take {NAME} away, and "
            "labels are numbers without names"
        )
    return labels
