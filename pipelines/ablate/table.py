"""A table as plain data: what is compared, by which numbers, and which order is expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featcache.errors import UsageError, near


@dataclass(frozen=True)
class Row:
    """Describe what is evaluated: a student of a recipe, trained or not, or the teacher itself."""

    name: str
    title: str
    recipe: str = ""  # none: the teacher
    trained: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the recipe, over the scale's
    # Options of `featcache extract` over the scale's. Rows with the same ones read one cache.
    extract: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """Describe one number of a row: a protocol of `student eval`, what it pools, its options."""

    name: str
    title: str
    protocol: str
    pool: str = ""  # none: the protocol reads all tokens
    options: Mapping[str, Any] = field(default_factory=dict)  # over the scale's
    trains: bool = False  # the encoder is trained, in a run of its own


@dataclass(frozen=True)
class Ordering:
    """Expect one row above another in a column; `source` says where it comes from."""

    higher: str
    lower: str
    column: str
    source: str


@dataclass(frozen=True)
class Table:
    """Hold a table. Raises UsageError where an ordering names a row or a column that is not in
    it."""

    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    orderings: tuple[Ordering, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows, columns = [row.name for row in self.rows], [each.name for each in self.columns]
        for each in self.orderings:
            for name, known in ((each.higher, rows), (each.lower, rows), (each.column, columns)):
                if name not in known:
                    raise UsageError(f"an ordering names {name!r}: {near(name, known)}")
