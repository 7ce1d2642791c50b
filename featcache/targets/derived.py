"""Targets that no cache stores are derived from what is stored (METHODS 0.8, 10.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from featcache import errors
from featcache.targets.levels import EPS

NAMES = ("h", "f", "z", "fd", "y")


def target(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None = None) -> Tensor:
    """Derive the target `name` from a level h (..., D); of f, z and fd it is the last level.

    `stats` (..., 2), the stored mean and std, is needed for y, and for a tail whose eps is not
    1e-5.
    """
    if name not in NAMES:
        raise errors.UsageError(f"unknown derived target {name!r}: {errors.near(name, NAMES)}")
    if name == "h":
        return h
    if name != "y":
        return derive(name, h, tail, None if stats is None else stats[..., 1:])
    if stats is None:
        raise errors.UsageError(
            "target 'y' needs `stats`, the stored mean and std; read `feature_stats` too"
        )
    mean, std = stats.split(1, -1)
    return h * std + mean


def derive(name: str, h: Tensor, tail: Mapping[str, Tensor], std: Tensor | None = None) -> Tensor:
    """Derive what a recipe asks for by name from the last level h (..., D).

    `f` = gamma * h + beta, the teacher's final LayerNorm; `z` = f @ proj, CLIP's projection; `fd` =
    f normalised again without affine. A tail whose eps is not EPS needs `std` (..., 1), the stored
    std, to use its own instead.
    """
    if name not in ("f", "z", "fd"):
        raise errors.UsageError(
            f"unknown derived target {name!r}: {errors.near(name, ('f', 'z', 'fd'))}"
        )
    missing = {"gamma", "beta", "eps", *(["proj"] if name == "z" else [])} - set(tail)
    if missing:
        lacks = "no projection" if missing == {"proj"} else f"no {', '.join(sorted(missing))}"
        raise errors.UserError(
            f"target {name!r}: this teacher's tail has {lacks}; it has "
            f"{', '.join(tail) or 'nothing'}"
        )
    if float(tail["eps"]) != float(np.float32(EPS)):
        if std is None:
            raise errors.UsageError(
                f"target {name!r}: this teacher's eps is {float(tail['eps']):g}, so `std` is needed"
            )
        h = h * std / (std**2 - EPS + tail["eps"]).sqrt()
    f = h * tail["gamma"] + tail["beta"]
    if name == "f":
        return f
    if name == "fd":
        return F.layer_norm(f, f.shape[-1:], eps=EPS)
    return f @ tail["proj"]
