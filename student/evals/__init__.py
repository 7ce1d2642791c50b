"""Evaluations judge frozen features; each is one file, found by module name.

An eval module holds `OPTIONS: dict[str, tuple[default, help]]`, its own options, and

    evaluate(frozen, train, test, *, seed, device, batch_size_embed, crop_pct, progress,
             **options) -> dict[str, Any]

whose result is plain JSON; accuracies are in per cent, as the papers print them.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UsageError, near


def names() -> list[str]:
    """Return the names of the evals, the modules of this folder.

    >>> "knn" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Import the module of an eval by name."""
    if name not in names():
        raise UsageError(f"unknown eval {name!r}: {near(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def hits(scores: Tensor, labels: Tensor, first: int) -> Tensor:
    """Return (n,) bool: is the label of each row of `scores` (n,C) among its `first` best classes?

    Equal scores rank the smaller class number first, so that a tie is the same on every device.
    """
    own = scores.gather(1, labels[:, None])  # (n,1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return rank < first


def percent(hit: Tensor) -> float:
    """Return the share of true entries, in per cent.

    >>> percent(torch.tensor([True, False, False, False]))
    25.0
    """
    return float(np.round(100.0 * hit.sum().item() / hit.numel(), 4))
