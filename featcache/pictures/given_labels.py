"""Labels that a user gives beside pictures come from a table, or from the first part of each key.

A table is CSV (.tsv: tabs, .txt: spaces), a row a picture: its key or file name, and the name of
its class. Names that are all whole numbers are in the order of numbers, others in that of text, as
class folders are. ImageNet's LOC_val_solution.csv is one: the first word of `n0399 85 1 499 272`
is the class.

n pictures.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, counted
from featcache.pictures.classes import MOST_CLASSES
from featcache.pictures.passed_over import ROWS_ALONE, Tally
from featcache.pictures.source import SUFFIXES
from featcache.pictures.spec import PREFIX, Spec
from featcache.runtime import strict_json

LARGEST_BYTES = 512 << 20  # of a table: ImageNet-22k's has 14 million rows
_DELIMITERS = {".tsv": "\t", ".txt": " "}
_KEYS = (
    "key", "__key__", "filename", "file_name", "file", "path", "filepath", "image", "image_id",
    "imageid", "image_name", "img", "id", "name",
)  # fmt: skip
_BOXES = "predictionstring"  # Kaggle's column of a class and a box, or several
_LABELS = (
    "label", "labels", "class", "class_name", "class_id", "category", "category_id", "target",
    "wnid", "synset", "y", _BOXES,
)  # fmt: skip


@dataclass(frozen=True)
class GivenLabels:
    """Hold the names of classes, and the label of each picture as an index of them (n,)."""

    names: list[str]
    numbers: npt.NDArray[np.int64] = field(repr=False)


def read_labels(spec: Spec, keys: Sequence[str], tally: Tally) -> GivenLabels:
    """Return the labels of pictures in the order of their keys. Rows of a table without a picture
    go to `tally`. Raises UserError where a picture has none, or has two."""
    if spec.labels == PREFIX:
        return _numbered(spec, _prefixes(spec, keys))
    table = _Table(Path(str(spec.labels)), spec.label_column)
    found = table.read(keys, tally)
    missing = [key for key in keys if key not in found]
    if missing:
        raise UserError(
            f"labels of {spec.path!r}: {len(missing)} of "
            f"{counted(len(keys), 'picture has', 'pictures have')} no row in "
            f"{str(table.path)!r}, the first are {_some(missing)}; its first rows are of "
            f"{_some(table.first)}; every picture needs one, by its key or its file's name"
        )
    return _numbered(spec, [found[key] for key in keys])


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"{name[:80]!r}" for name in names[:3]) or "nothing"


def _numbered(spec: Spec, names: Sequence[str]) -> GivenLabels:
    different = set(names)
    if len(different) > MOST_CLASSES:
        raise UserError(
            f"labels of {spec.path!r}: #labels={spec.labels} gives "
            f"{counted(len(different), 'class', 'classes')}, at "
            f"most {MOST_CLASSES} are allowed; give another column or separator"
        )
    ordered = sorted(different)
    if all(name.isascii() and name.isdecimal() and len(name) <= 18 for name in ordered):
        ordered.sort(key=lambda name: (int(name), name))
    number = {name: i for i, name in enumerate(ordered)}
    return GivenLabels(ordered, np.array([number[name] for name in names], np.int64))


# ------------------------------------------------------------ keys


def _prefixes(spec: Spec, keys: Sequence[str]) -> list[str]:
    """Return what stands in each key before the separator: `/`, or another in the file's name."""
    mark = spec.separator or ("/" if all("/" in key for key in keys) else "_")
    whole = "/" in mark
    parted = [(key if whole else key.rpartition("/")[2]).partition(mark) for key in keys]
    missing = [
        key for key, (name, sign, _) in zip(keys, parted, strict=True) if not (sign and name)
    ]
    if missing:
        raise UserError(
            f"labels of {spec.path!r}: {len(missing)} of "
            f"{counted(len(keys), 'key has', 'keys have')} nothing before a "
            f"{mark!r}, the first are {_some(missing)}; a class, the separator and a name are "
            "needed (n01440764_10026, cats/1): give #separator=, or a table with #labels=FILE.csv"
        )
    return [name for name, _, _ in parted]


# ------------------------------------------------------------ tables


class _Table:
    """Reads the rows of a table."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path, self.column = path, column
        self.first: list[str] = []  # keys of rows, for messages

    def read(self, keys: Sequence[str], tally: Tally) -> dict[str, str]:
        """Return key -> name of the class."""
        known = frozenset(keys)
        rows = self._rows()
        key_at, label_at, boxes = self._columns(rows[0][1], known)
        found, double = dict[str, str](), list[str]()
        for line, row in rows if key_at is None else rows[1:]:
            given, label = self._cells(line, row, key_at or 0, label_at)
            key = _key(given, known)
            if len(self.first) < 3:
                self.first.append(given)
            if key is None:
                tally.add(ROWS_ALONE, given)
            elif key in found:
                double.append(given)
            else:
                found[key] = label.split()[0] if boxes else label
        if double:
            raise self._refusal(
                f"{counted(len(double), 'picture stands', 'pictures stand')} in it twice, the "
                f"first are {_some(double)}",
                "one row a picture is allowed: take the others out",
            )
        return found

    def _rows(self) -> list[tuple[int, list[str]]]:
        """Return the rows that are not empty, with the numbers of their lines."""
        try:
            text = strict_json.read_bytes(self.path, LARGEST_BYTES).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._refusal(
                f"it cannot be read as text ({reason})",
                "give a CSV file, or prefix for the first part of each key",
            ) from error
        mark = _DELIMITERS.get(self.path.suffix.lower(), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            raise self._refusal(f"line {reader.line_num}: {error}", "write it again") from error
        if not rows:
            raise self._refusal("it has no rows", "a row a picture is needed: KEY,CLASS")
        return rows

    def _columns(self, head: list[str], known: frozenset[str]) -> tuple[int | None, int, bool]:
        """Return the columns of key (None without a header) and label, and whether the label has
        boxes behind it."""
        names = [cell.strip().lower() for cell in head]
        named = any(name in (*_KEYS, *_LABELS) for name in names)
        if self.column is None and (not named or _key(head[0].strip(), known) is not None):
            if len(head) != 2:
                raise self._refusal(
                    f"its first row has {counted(len(head), 'column')} and no names that are known",
                    "KEY,CLASS are allowed, or a header that names a column label",
                )
            return None, 1, False
        key_at = next((names.index(name) for name in _KEYS if name in names), 0)
        label_at = self._label_column(head, names, key_at)
        return key_at, label_at, names[label_at] == _BOXES

    def _label_column(self, head: list[str], names: list[str], key_at: int) -> int:
        if self.column is not None and self.column in head:
            return head.index(self.column)
        found = next((names.index(name) for name in _LABELS if name in names), None)
        if self.column is None and found is None and len(head) == 2:
            found = 1 - key_at
        if self.column is not None or found is None or found == key_at:
            asked = "column of labels" if self.column is None else f"column {self.column!r}"
            raise self._refusal(
                f"its header has no {asked}, it names {_some(head)}", "give #label-column=NAME"
            )
        return found

    def _cells(self, line: int, row: list[str], key_at: int, label_at: int) -> tuple[str, str]:
        if len(row) <= max(key_at, label_at):
            raise self._refusal(f"line {line} has {counted(len(row), 'column')}", "write it again")
        key, label = row[key_at].strip(), row[label_at].strip()
        if not key or not label:
            raise self._refusal(
                f"line {line} has no {'label' if key else 'key'}", "give it one, or take it out"
            )
        return key, label

    def _refusal(self, what: str, remedy: str) -> UserError:
        return UserError(f"labels {str(self.path)!r}: {what}; {remedy}")


def _key(given: str, known: frozenset[str]) -> str | None:
    """Return the picture's key that a row names, by the key or its file's name."""
    given = given.removeprefix("./")
    if given in known:
        return given
    stem, suffix = posixpath.splitext(given)
    return stem if suffix.lower() in SUFFIXES and stem in known else None
