"""Recipes are found by name, one module each in this folder, or are a user's own file.

A recipe module has a docstring (paper, command, cost, expected score, what differs from the
released code), a frozen `Config`, a `Model` whose `forward(batch)` gives a dict with "loss" and its
parts, and `needs(config)`, which says what a cache must hold. A recipe is a pure function of
(weights, batch):

    images (B, 3, S, S)          features (B, L, 1 + P, D)
    ids_keep (B, V)              ids_masked (B, P - V)
    targets (B, 1 + P, E)        in place of features, where the spec says `derive`
    token_ids (B, P)             where they are among the fields
    second (B, 1 + P, E2)        of another teacher, where the spec names one
    feature_stats (B, L, 1 + P, 2)  where they are among the fields: mean and divisor of every token
    moments (L, 2)               where the spec asks for them

A `Model` may give `param_groups()`: groups of its parameters for AdamW, each with a `weight_decay`
and perhaps an `lr_scale`, which multiplies the learning rate of every step.

A `Model` may give `predictions(batch)` as well: by name, such as `cosine_12` or `cosine_z`, what is
predicted of a teacher and what it is compared with, (B, N, D) both. `student train --probe` reports
their cosine on held-out pictures; `student eval zeroshot` takes the first of N = 1 + P tokens of
`cosine_z`, `cosine_f` or the last level.

A `Model` may give `reconstruct(batch)`: the pixels (B, M, p * p * 3) that it predicts of the hidden
patches, each less its mean and over its std where the setting `norm_pix` says so, or None where it
predicts none. `student report` draws them.

>>> sorted(set(names()) & {"mae", "maskalign", "mralign"})
['mae', 'maskalign', 'mralign']
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from featcache.errors import UsageError, near
from featcache.runtime.user_file import load_module

CONTRACT = ("Config", "Model", "needs")


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Say what a recipe reads from a cache; no `fields` means that it needs no cache at all."""

    teacher: str  # "" where no field is needed
    levels: tuple[int, ...]  # teacher blocks, from 1, ascending
    fields: tuple[str, ...]  # arrays by name, the mask's own source among them
    patches: int  # P of the teacher's grid
    scale: tuple[float, float] = (0.2, 1.0)  # crop area of the publication, ends included
    jitter: float = 0.0  # change of colours of the publication, seen by teacher and student alike
    # of `features` only [CLS] and visible patches are looked at; the others may be missing
    visible_only: bool = False
    # z, f or fd: given as `targets` in place of `features`, from the one level (featcache.derive)
    derive: str = ""
    # another teacher, whose NAME/features are among the fields: given as `second`, derived likewise
    second: str = ""
    second_level: int = 0  # its block
    # mean and variance (unbiased) of each level, over channels, all tokens and the whole batch
    moments: bool = False
    vocabulary: int = 0  # token ids, of the field token_ids or NAME/token_ids, are below it


def names() -> list[str]:
    """Return the recipes of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Return the module of a recipe: a name of this folder, or the path of a .py file."""
    if name.endswith(".py"):
        return load_module(
            Path(name),
            "recipe",
            dict(zip(CONTRACT, CONTRACT, strict=True)),
            "student/recipes/mae.py",
        )
    if name not in names():
        raise UsageError(
            f"unknown recipe {name!r}: {near(name, names())}; or the path of your own file, "
            "./mine.py"
        )
    return importlib.import_module(f"{__name__}.{name}")
