"""What recipes ask for by name and no cache stores, because it follows from what is stored (METHODS 0.8, 10.1).

    f    gamma * h_T + beta        the teacher's final LayerNorm: CLIP's ln_post, DINO's norm
    z    f @ proj                  CLIP's projection: MILAN, CAE v2, KD
    fd   f normalised again, no affine: feature distillation
    y    h * std + mean            the residual stream itself, of any stored level

`target` works on tensors where they are, for trainers that decode on a GPU; `read` takes rows of a cache. h is stored
with the divisor std = sqrt(var + 1e-5). A model whose final norm has another eps divides by sqrt(var + eps), which is
sqrt(std^2 - 1e-5 + eps), so h is multiplied by std over that.

n rows, T tokens, D width, E width of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache import codecs, errors
from featcache.targets import EPS

if TYPE_CHECKING:
    from featcache.reader import Cache

NAMES = ("f", "z", "fd", "y")


def target(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None = None) -> Tensor:
    """A level h (..., D) -> the target of that name; of f, z and fd it is the last level.

    `stats` (..., 2), the stored mean and divisor, is needed for y, and for a tail whose eps is not 1e-5.
    """
    _check(name, tail)
    if name == "y":
        mean, std = _needed(name, stats).split(1, -1)
        return h * std + mean
    f = _own_eps(name, h, tail, stats) * tail["gamma"] + tail["beta"]
    if name == "fd":
        return F.layer_norm(f, f.shape[-1:], eps=EPS)
    return f @ tail["proj"] if name == "z" else f


def _own_eps(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None) -> Tensor:
    """h as the model's own final norm would have divided it."""
    if not _is_rescaled(tail):
        return h
    std = _needed(name, stats)[..., 1:]
    return h * (std / (std**2 - EPS + tail["eps"]).sqrt())


def _is_rescaled(tail: Mapping[str, Tensor] | Mapping[str, npt.NDArray[np.float32]]) -> bool:
    return float(tail["eps"]) != float(np.float32(EPS))


def _needed(name: str, stats: Tensor | None) -> Tensor:
    if stats is None:
        raise errors.UsageError(f"target {name!r} needs `stats`, the stored mean and divisor; read `feature_stats` too")
    return stats


def _check(name: str, tail: Mapping[str, Tensor] | Mapping[str, npt.NDArray[np.float32]]) -> None:
    if name not in NAMES:
        raise errors.UsageError(f"unknown derived target {name!r}: {errors.near(name, NAMES)}")
    wanted = {
        "f": ("gamma", "beta", "eps"),
        "fd": ("gamma", "beta", "eps"),
        "z": ("gamma", "beta", "eps", "proj"),
        "y": (),
    }
    if missing := [part for part in wanted[name] if part not in tail]:
        raise errors.UserError(
            f"target {name!r}: this teacher's tail has no {', '.join(missing)}; it has {', '.join(tail) or 'nothing'}"
        )


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
    _check(name, tail)
    chosen = _level(cache, name, level, teacher)
    place = "" if teacher == cache.teachers[0] else f"{teacher}/"
    codec = codecs.CODECS[identity["codec"]]
    coded = [f"{place}{part}" for part in codec.arrays(identity["teacher"]["width"])]
    stats = [f"{place}feature_stats"] if name == "y" or _is_rescaled(tail) else []
    rows = np.arange(len(cache)) if rows is None else rows
    host = {
        field.removeprefix(place): torch.from_numpy(values[:, 0])
        for field, values in cache.read(rows, view, [*coded, *stats], [chosen], tokens).items()
    }
    tensors = {part: torch.from_numpy(values) for part, values in tail.items()}
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
