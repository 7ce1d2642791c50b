"""One view of one row is read, teacher by teacher and level by level, so that what is damaged takes
nothing else with it: what could not be read is told in `problems`.

P patches in image order, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import UserError, counted
from featcache.reading.cache import Cache
from featcache.reading.feature_reader import FeatureReader

F32 = npt.NDArray[np.float32]
_CPU = torch.device("cpu")
DRAWN = ("crop", "flip", "area", "jitter", "source_size")


@dataclass(frozen=True)
class StoredView:
    """Holds what a cache has of one view for one of its teachers."""

    attention: F32 | None = None  # (P,)
    order: npt.NDArray[np.int64] | None = None  # (P,), a permutation
    # (1 + P, D) of each level; NaN where a token is not stored
    levels: Mapping[int, F32] = field(default_factory=dict)
    # (1 + P, 2): mean and std of the residual stream
    stats: Mapping[int, F32] = field(default_factory=dict)
    token_ids: npt.NDArray[np.int64] | None = None  # (P,)
    problems: Sequence[str] = ()


class TeacherReader:
    """Reads what a cache has of one of its teachers, view by view. Raises UserError for a teacher
    whose patches are no square grid."""

    def __init__(self, cache: Cache, teacher: str, levels: Sequence[int] | None = None) -> None:
        self.cache, self.teacher = cache, teacher
        self.about = cache.manifest_of(teacher)
        self.patches: int = self.about["identity"]["teacher"]["patches"]
        if round(self.patches**0.5) ** 2 != self.patches:
            raise UserError(
                f"cache {str(cache.path)!r}: "
                f"{counted(self.patches, 'patch', 'patches')} of {teacher} are no square "
                "grid, and only those can be drawn; show another cache"
            )
        self.prefix = "" if teacher == cache.teachers[0] else f"{teacher}/"
        self.views = cache.views_of(teacher)
        stored = cache.levels_of(teacher) if f"{self.prefix}features" in cache.fields else ()
        self.levels = tuple(stored if levels is None else levels)
        with_stats = f"{self.prefix}feature_stats" in cache.fields
        self._readers = {
            level: FeatureReader(cache, teacher, levels=[level], stats=with_stats)
            for level in self.levels
        }

    def read(self, row: int, view: int, *, levels: bool = True) -> StoredView:
        """Read a view of a row; without `levels`, all but those."""
        problems: list[str] = []
        small = {
            name: self._field(name, row, view, problems)
            for name in ("attention", "mask_order", "token_ids")
        }
        found = {
            level: self._level(level, row, view, problems)
            for level in (self.levels if levels else ())
        }
        order, ids = small["mask_order"], small["token_ids"]
        return StoredView(
            attention=small["attention"],
            order=None if order is None else order.astype(np.int64),
            levels={level: both[0] for level, both in found.items() if both},
            stats={level: both[1] for level, both in found.items() if both and both[1] is not None},
            token_ids=None if ids is None else ids.astype(np.int64),
            problems=problems,
        )

    def patches_of(self, level: int, row: int, view: int) -> F32:
        """Read the patches (P, D) of a level. Raises UserError where the row is damaged."""
        return self._decoded(level, row, view)[0][1:]

    def _field(
        self, name: str, row: int, view: int, problems: list[str]
    ) -> npt.NDArray[Any] | None:
        name = f"{self.prefix}{name}"
        if name not in self.cache.fields:
            return None
        try:
            values: npt.NDArray[Any] = self.cache.read([row], view, (name,))[name][0]
        except UserError as error:
            problems.append(str(error))
            return None
        return values

    def _level(
        self, level: int, row: int, view: int, problems: list[str]
    ) -> tuple[F32, F32 | None] | None:
        try:
            return self._decoded(level, row, view)
        except UserError as error:
            problems.append(str(error))
            return None

    def _decoded(self, level: int, row: int, view: int) -> tuple[F32, F32 | None]:
        reader = self._readers[level]
        host = self.cache.read([row], view, reader.fields, [level])
        arrays = reader.to_device(host, _CPU)
        stats = reader.stats(arrays)
        tokens: F32 = reader.features(arrays)[0, 0].numpy()
        return tokens, None if stats is None else stats[0, 0].numpy()


def read_drawn(cache: Cache, row: int, view: int) -> dict[str, npt.NDArray[Any]]:
    """Read how a view was drawn: crop (4,), flip, area, jitter (4,) and source_size (2,). Raises
    UserError where the row is damaged."""
    names = [name for name in DRAWN if name in cache.fields]
    return {name: values[0] for name, values in cache.read([row], view, names).items()}
