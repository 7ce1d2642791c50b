"""Targets that no cache stores are derived from what is stored (METHODS 0.8, 10.1).

A teacher's end, its `tail`, is the norm that its last block's output y goes through, in one of
three forms, and perhaps a projection:

    gamma, beta, eps    a LayerNorm:  f = gamma * (y - mean) / sqrt(var + eps) + beta
    rms_gamma, eps      an RMS norm:  f = rms_gamma * y / sqrt(mean of y^2 + eps)
    identity            no norm:      f = y
    proj                              z = f @ proj

The stored h is normalised with an eps of 1e-5. Only a LayerNorm of that eps is a function of h
alone; the others are made of y = h * std + mean, so that they need the stored statistics.

D width, E width of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from featcache import errors
from featcache.targets.levels import EPS

NAMES = ("h", "f", "z", "fd", "y")
_LAYER_NORM, _RMS_NORM, _NO_NORM = ("gamma", "beta", "eps"), ("rms_gamma", "eps"), ("identity",)


def target(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None = None) -> Tensor:
    """Derive the target `name` from a level h (..., D); of f, z and fd it is the last level.

    `stats` (..., 2), the stored mean and std, is needed for y, and where `needs_stats`.
    """
    if name not in NAMES:
        raise errors.UsageError(f"unknown derived target {name!r}: {errors.near(name, NAMES)}")
    if name == "h":
        return h
    if name != "y":
        return derive(name, h, tail, stats)
    if stats is None:
        raise errors.UsageError(
            "target 'y' needs `stats`, the stored mean and std; read `feature_stats` too"
        )
    return _residual(h, stats)


def derive(name: str, h: Tensor, tail: Mapping[str, Tensor], stats: Tensor | None = None) -> Tensor:
    """Derive what a recipe asks for by name from the last level h (..., D).

    `f` is the output of the teacher's final norm; `z` = f @ proj, CLIP's projection; `fd` = f
    normalised again without affine. `stats` (..., 2), the stored mean and std, is needed where
    `needs_stats`.
    """
    if name not in ("f", "z", "fd"):
        raise errors.UsageError(
            f"unknown derived target {name!r}: {errors.near(name, ('f', 'z', 'fd'))}"
        )
    _check_tail(name, tail)
    if needs_stats(tail):
        if stats is None:
            raise errors.UsageError(
                f"target {name!r}: {_why_stats(tail)}, so `stats`, the stored mean and std, are "
                "needed; read `feature_stats` too"
            )
        f = _output_of_level(h, tail, stats)
    else:
        f = h * tail["gamma"] + tail["beta"]
    if name == "f":
        return f
    if name == "fd":
        return F.layer_norm(f, f.shape[-1:], eps=EPS)
    return f @ tail["proj"]


def has_output(tail: Mapping[str, Any]) -> bool:
    """Return whether a tail tells how the teacher's output f is made of y."""
    return set(_norm_parts(tail)) <= set(tail)


def needs_stats(tail: Mapping[str, Any]) -> bool:
    """Return whether f takes the stored statistics: of any norm but a LayerNorm of the cache's own
    eps."""
    parts = _norm_parts(tail)
    return parts != _LAYER_NORM or ("eps" in tail and float(tail["eps"]) != float(np.float32(EPS)))


def output(y: Tensor, tail: Mapping[str, Tensor]) -> Tensor:
    """Compute the teacher's output f (..., D) of its last block's y (..., D), in at least
    float32."""
    parts = _norm_parts(tail)
    if parts == _NO_NORM:
        return y
    if parts == _RMS_NORM:
        square = y.square().mean(-1, keepdim=True)
        return y * (square + tail["eps"]).rsqrt() * tail["rms_gamma"]
    return F.layer_norm(y, y.shape[-1:], tail["gamma"], tail["beta"], float(tail["eps"]))


def _output_of_level(h: Tensor, tail: Mapping[str, Tensor], stats: Tensor) -> Tensor:
    """Compute f (..., D) from h (..., D) and its statistics (..., 2)."""
    if _norm_parts(tail) != _LAYER_NORM:
        return output(_residual(h, stats), tail)
    # the variance is known: the mean need not go in, and come out again
    std = stats[..., 1:]
    return h * std / (std**2 - EPS + tail["eps"]).sqrt() * tail["gamma"] + tail["beta"]


def _residual(h: Tensor, stats: Tensor) -> Tensor:
    mean, std = stats.split(1, -1)
    return h * std + mean


def _norm_parts(tail: Mapping[str, Any]) -> tuple[str, ...]:
    if "identity" in tail:
        return _NO_NORM
    return _RMS_NORM if "rms_gamma" in tail else _LAYER_NORM


def _why_stats(tail: Mapping[str, Tensor]) -> str:
    if "identity" in tail:
        return "this teacher has no final norm"
    if "rms_gamma" in tail:
        return "this teacher's final norm is an RMS norm"
    return f"this teacher's eps is {float(tail['eps']):g}"


def _check_tail(name: str, tail: Mapping[str, Tensor]) -> None:
    missing = {*_norm_parts(tail), *(["proj"] if name == "z" else [])} - set(tail)
    if missing:
        lacks = "no projection" if missing == {"proj"} else f"no {', '.join(sorted(missing))}"
        raise errors.UserError(
            f"target {name!r}: this teacher's tail has {lacks}; it has "
            f"{', '.join(tail) or 'nothing'}"
        )
