"""The arguments of `read` are checked before the cache is looked at: a mistake is one line, never
other rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError


def check_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """Require a list of fields, not one string, whose letters would be taken for names."""
    if isinstance(fields, str):
        raise UsageError(
            f"read: fields must be a list of names, {fields!r} is one string; give [{fields!r}]"
        )
    names = tuple(fields) if isinstance(fields, Iterable) else (fields,)
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"read: fields must be a list of names, {fields!r} is given")
    return names


def check_options(levels: Any, tokens: object, out: object, fields: Sequence[str]) -> None:
    """Check what needs no look at the cache."""
    if levels is not None and (np.ndim(levels) != 1 or isinstance(levels, str | bytes)):
        raise UsageError(f"read: levels must be a list of block numbers, {levels!r:.80} is given")
    if levels is not None and not all(_is_whole(level) for level in levels):
        raise UsageError(f"read: levels must be whole numbers, {levels!r:.80} is given")
    if tokens is not None and not _is_whole(tokens):
        raise UsageError(f"read: tokens must be a whole number, {tokens!r:.80} is given")
    if out is None:
        return
    if not isinstance(out, Mapping) or not all(
        isinstance(array, np.ndarray) for array in out.values()
    ):
        raise UsageError(
            f"read: out must be a dict of numpy arrays by field, {type(out).__name__} is given"
        )
    if strange := [name for name in out if name not in fields]:
        raise UsageError(
            f"read: out[{strange[0]!r}] is not asked for; fields are {', '.join(fields)}"
        )
    for one, other in combinations(out, 2):
        if np.may_share_memory(out[one], out[other]):
            raise UsageError(
                f"read: out[{one!r}] and out[{other!r}] share memory, and one would overwrite the "
                "other; give each an array of its own"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_numbers(name: str, given: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return whole numbers (n,); a mask of booleans or a fraction is a mistake, not a row."""
    try:
        values = np.atleast_1d(np.asarray(given))
    except ValueError as error:  # ragged
        raise UsageError(f"read: {name} must be whole numbers (n,); {error}") from error
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise UsageError(
            f"read: {name} must be whole numbers (n,), {values.dtype} {values.shape} is given"
        )
    return values.astype(np.int64)
