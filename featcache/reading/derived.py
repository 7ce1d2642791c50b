"""What recipes ask for by name and no cache stores, because it follows from what is stored (METHODS 0.8, 10.1).

    f    gamma * h_T + beta        the teacher's final LayerNorm: CLIP's ln_post, DINO's norm
    z    f @ proj                  CLIP's projection: MILAN, CAE v2, KD
    fd   f normalised again, no affine: feature distillation
    y    h * std + mean            the residual stream itself, of any stored level

`target` works on tensors where they are, for trainers that decode on a GPU; `read` takes rows of a cache. h is stored
with the divisor std = sqrt(var + 1e-5). A model whose final norm has another eps divides by sqrt(var + eps), which is
sqrt(std^2 - 1e-5 + eps), so h is multiplied by std over that; the formulas are `targets.derive`.

n rows, T tokens, D width, E width of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import errors
from featcache.targets import codecs
from featcache.targets import levels as targets

if TYPE_CHECKING:
    from featcache.reading.cache import Cache

NAMES = ("f", "z", "fd", "y")


def target(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None = None) -> Tensor:
    """A level h (..., D) -> the target of that name; of f, z and fd it is the last level.

    `stats` (..., 2), the stored mean and divisor, is needed for y, and for a tail whose eps is not 1e-5.
    """
    if name not in NAMES:
        raise errors.UsageError(f"unknown derived target {name!r}: {errors.near(name, NAMES)}")
    if name != "y":
        return targets.derive(name, h, tail, None if stats is None else stats[..., 1:])
    if stats is None:
        raise errors.UsageError("target 'y' needs `stats`, the stored mean and divisor; read `feature_stats` too")
    mean, std = stats.split(1, -1)
    return h * std + mean


def read(
    cache: Cache,
    name: str,
    rows: npt.ArrayLike | None = None,
    view: int | npt.ArrayLike = 0,
    *,
    level: int | None = None,
    tokens: int | None = None,
    teacher: str | None = None,
) -> npt.NDArray[np.float32]:
    """(n, T, E) of rows of a cache, all of them by default; tokens as `Cache.read` gives them, in a ranked cache by
    rank. `level` is of y alone; `teacher` is one of `cache.teachers`."""
    teacher = teacher or cache.teachers[0]
    if teacher not in cache.teachers:
        raise errors.UsageError(
            f"derive: teacher {teacher!r} is not in this cache; {errors.near(teacher, cache.teachers)}"
        )
    identity = cache.manifest_of(teacher)["identity"]
    tail = cache.tail(teacher)
    tensors = {part: torch.from_numpy(values) for part, values in tail.items()}
    width = int(identity["teacher"]["width"])
    target(name, torch.zeros(1, width), tensors, torch.ones(1, 2))  # what cannot be derived is told before any read
    chosen = _level(cache, name, level, teacher)
    place = "" if teacher == cache.teachers[0] else f"{teacher}/"
    codec = codecs.CODECS[identity["codec"]]
    coded = [f"{place}{part}" for part in codec.arrays(width)]
    needs_stats = name == "y" or ("eps" in tail and float(tail["eps"]) != float(np.float32(targets.EPS)))
    stats = [f"{place}feature_stats"] if needs_stats else []
    rows = np.arange(len(cache)) if rows is None else rows
    host = {
        field.removeprefix(place): torch.from_numpy(values[:, 0])
        for field, values in cache.read(rows, view, [*coded, *stats], [chosen], tokens).items()
    }
    out: npt.NDArray[np.float32] = target(name, codec.decode(host), tensors, host.get("feature_stats")).numpy()
    return out


def _level(cache: Cache, name: str, level: int | None, teacher: str) -> int:
    depth = int(cache.manifest_of(teacher)["identity"]["teacher"]["depth"])
    if level not in (None, depth) and name != "y":
        raise errors.UsageError(f"derive: {name!r} is of the last level, {depth}; level {level} is given: leave it out")
    chosen = depth if level is None else level
    stored = cache.levels_of(teacher)
    if chosen not in stored:
        raise errors.UserError(
            f"derive: {name!r} needs level {chosen} of {teacher}, stored are {','.join(map(str, stored))}; add it with "
            f"`featcache extract --add --levels {chosen}`"
        )
    return chosen
