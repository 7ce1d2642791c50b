"""Targets that recipes ask for by name and no cache stores are derived from what is stored (METHODS
0.8, 10.1).

    f    gamma * h_T + beta        the teacher's final norm: CLIP's ln_post, DINO's norm
    z    f @ proj                  CLIP's projection: MILAN, CAE v2, KD
    fd   f normalised again, no affine: feature distillation
    y    h * std + mean            the residual stream itself, of any stored level
    h    as it is stored           a normalised level, decoded, of any stored level

`target` works on tensors where they are, for trainers that decode on a GPU; `read` takes rows of a
cache. h is stored with std = sqrt(var + 1e-5). A model whose final norm has another eps
divides by sqrt(var + eps), which is sqrt(std^2 - 1e-5 + eps), so h is multiplied by std over that;
of a model whose final norm is an RMS norm, or that has none, f is made of y. The formulas are in
`targets.derived`.

n rows, T tokens, D width, E width of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from featcache import errors
from featcache.reading.feature_reader import FeatureReader, HasTeachers
from featcache.reading.tensors import tail_tensors
from featcache.targets.derived import target


class ReadableCache(HasTeachers, Protocol):
    """A `Cache` as it is read here."""

    def __len__(self) -> int: ...
    def levels_of(self, teacher: str) -> tuple[int, ...]: ...
    def read(
        self,
        rows: npt.ArrayLike,
        view: int | npt.ArrayLike = 0,
        fields: Sequence[str] = ("features",),
        levels: Sequence[int] | None = None,
        tokens: int | None = None,
    ) -> dict[str, npt.NDArray[Any]]: ...


def read(
    cache: ReadableCache,
    name: str,
    rows: npt.ArrayLike | None = None,
    view: int | npt.ArrayLike = 0,
    *,
    level: int | None = None,
    tokens: int | None = None,
    teacher: str | None = None,
) -> npt.NDArray[np.float32]:
    """Read the target (n, T, E) of rows of a cache, all of them by default; tokens as `Cache.read`
    gives them, in a ranked cache by rank. `level` is of h and y alone; `teacher` is one of
    `cache.teachers`."""
    teacher = teacher or cache.teachers[0]
    if teacher not in cache.teachers:
        raise errors.UsageError(
            f"derive: teacher {teacher!r} is not in this cache; "
            f"{errors.near(teacher, cache.teachers)}"
        )
    width = int(cache.manifest_of(teacher)["identity"]["teacher"]["width"])
    tail = {} if name == "h" else tail_tensors(cache.tail(teacher))
    # what cannot be derived is refused before any read
    target(name, torch.zeros(1, width), tail, torch.ones(1, 2))
    chosen = _level(cache, name, level, teacher)
    reader = FeatureReader(cache, teacher, levels=[chosen], derive="" if name == "h" else name)
    # tokens stay as they are stored
    fields = [field for field in reader.fields if field != reader.order_field]
    rows = np.arange(len(cache)) if rows is None else rows
    arrays = {
        field: torch.from_numpy(values)
        for field, values in cache.read(rows, view, fields, [chosen], tokens).items()
    }
    h, stats = reader.decode(arrays)[:, 0], arrays.get(reader.stats_field)
    stats = None if stats is None else stats[:, 0]
    out: npt.NDArray[np.float32] = target(name, h, reader.tail, stats).numpy()
    return out


def _level(cache: ReadableCache, name: str, level: int | None, teacher: str) -> int:
    depth = int(cache.manifest_of(teacher)["identity"]["teacher"]["depth"])
    if level not in (None, depth) and name not in ("h", "y"):
        raise errors.UsageError(
            f"derive: {name!r} is of the last level, {depth}; level {level} is given: leave it out"
        )
    chosen = depth if level is None else level
    stored = cache.levels_of(teacher)
    if chosen not in stored:
        raise errors.UserError(
            f"derive: {name!r} needs level {chosen} of {teacher}, stored are "
            f"{','.join(map(str, stored))}; add it with `featcache extract --add --levels {chosen}`"
        )
    return chosen
