"""Labels of parquet files are read: numbers of a ClassLabel of `datasets`, other numbers, or names.

n pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, counted
from featcache.pictures.classes import MOST_CLASSES, check_labels
from featcache.pictures.parquet_columns import Columns, read_column
from featcache.pictures.parquet_groups import ParquetFile

I64 = npt.NDArray[np.int64]
NO_LABEL = -1  # as `datasets` has it in test sets


def read_labels(
    spec: str, files: Sequence[ParquetFile], columns: Columns
) -> tuple[list[str] | None, I64 | None]:
    """Return the names of classes, None where numbers have no names, and labels (n,), None where
    the files have none. Raises UserError where some rows have none, or columns are ambiguous."""
    if columns.label is None:
        if columns.labels:
            raise UserError(
                f"labels of {spec!r}: {counted(len(columns.labels), 'column')} hold classes, "
                f"{', '.join(map(repr, columns.labels[:10]))}; give one with #label-column=NAME"
            )
        return None, None
    values = [value for file in files for value in read_column(file, columns.label)]
    missing = sum(value is None or value == NO_LABEL for value in values)
    if missing == len(values):
        return None, None
    if missing:
        raise UserError(
            f"labels of {spec!r}: {missing} of "
            f"{counted(len(values), 'row has', 'rows have')} none in the column "
            f"{columns.label!r}; every picture needs one: give a table with #labels=FILE.csv"
        )
    return _text(spec, values) if isinstance(values[0], str) else _numbers(spec, columns, values)


def _text(spec: str, values: list[str]) -> tuple[list[str], I64]:
    names = sorted(set(values))
    if len(names) > MOST_CLASSES:
        raise UserError(
            f"labels of {spec!r}: {len(names)} different texts, at most {MOST_CLASSES} classes are "
            "allowed; give another column with #label-column=NAME"
        )
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[value] for value in values], np.int64)


def _numbers(spec: str, columns: Columns, values: list[int]) -> tuple[list[str] | None, I64]:
    strange = next((value for value in values if not 0 <= value < 1 << 63), None)
    if strange is not None:
        raise UserError(
            f"labels of {spec!r}: {strange} is given in {columns.label!r}, numbers from 0 on are "
            "allowed; write the files again"
        )
    names = None if columns.names is None else list(columns.names)
    return names, check_labels(spec, np.array(values, np.int64), names)
