"""Evaluations judge frozen features; each is one file, found by module name.

An eval module holds `OPTIONS: dict[str, tuple[default, help]]`, its own options, `DEFAULTS:
dict[tuple[recipe, size | None], dict[str, Any]]`, what a publication sets otherwise, and

    evaluate(task, **options) -> Outcome

with a `Task` and an `Outcome` of `student.features.task`: scores of every class for each picture of
the test sets. What becomes of scores (accuracy, interval, classes, the line in results.jsonl) is
the same for all. One that needs no training pictures says `TRAINS = False`: it scores all of
--images where no --test is given; one that pools tokens itself says `POOLS = False`.

One that trains the encoder itself says `TRAINS_ENCODER = True`. It is a run of
`student.training.finetune`, whose settings its `DEFAULTS` are, and has no `OPTIONS` and no
`evaluate`; `crop_pct(img_size)` says how test pictures are cut.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

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
