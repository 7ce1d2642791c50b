"""The recipes: one module each, found by its name in this folder, or a user's own file.

A recipe module has a docstring (paper, command, cost, expected score, what differs from the released code), a frozen
`Config`, a `Model` whose `forward(batch)` gives a dict with "loss" and its parts, and `needs(config)`, which says what
a cache must hold. A recipe is a pure function of (weights, batch):

    images (B,3,H,W)   features (B,L,1+P,D)   ids_keep (B,V)   ids_masked (B,P-V)
    targets (B,1+P,E) in place of features where the spec says `derive`;   token_ids (B,P) where it is among the fields
    second (B,1+P,E2) of another teacher, where the spec names one
    feature_stats (B,L,1+P,2) where it is among the fields: mean and divisor of every token; moments (L,2) where the
    spec asks for them

>>> sorted(set(names()) & {"mae", "maskalign", "mralign"})
['mae', 'maskalign', 'mralign']
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from featcache.errors import UsageError, near

CONTRACT = ("Config", "Model", "needs")


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What a recipe reads from a cache; no `fields` means that it needs no cache at all."""

    teacher: str  # "" where no field is needed
    levels: tuple[int, ...]  # teacher blocks, from 1, ascending
    fields: tuple[str, ...]  # arrays by name, the mask's own source among them
    patches: int  # P of the teacher's grid
    scale: tuple[float, float] = (0.2, 1.0)  # crop area of the publication, ends included
    jitter: float = 0.0  # change of colours of the publication, seen by teacher and student alike
    visible_only: bool = False  # of `features` only [CLS] and visible patches are looked at; the others may be missing
    derive: str = ""  # z, f or fd: given as `targets` in place of `features`, from the one level (featcache.derive)
    second: str = ""  # another teacher, whose NAME/features are among the fields: given as `second`, derived likewise
    second_level: int = 0  # its block
    moments: bool = False  # mean and variance (unbiased) of each level, over channels, all tokens and the whole batch
    vocabulary: int = 0  # token ids, of the field token_ids or NAME/token_ids, are below it


def names() -> list[str]:
    """The recipes of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a recipe: a name of this folder, or the path of a .py file."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name not in names():
        raise UsageError(f"unknown recipe {name!r}: {near(name, names())}; or the path of your own file, ./mine.py")
    return importlib.import_module(f"{__name__}.{name}")


def _from_file(path: Path) -> ModuleType:
    """Run a user's file as a module; it is kept in sys.modules, where dataclasses look up their annotations."""
    if not path.is_file():
        raise UsageError(
            f"cannot load recipe {str(path)!r}: no such file; allowed: a name ({', '.join(names())}) or the path of a "
            ".py file; check the path"
        )
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"student_recipe_{path.stem}_{digest}", path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    missing = [part for part in CONTRACT if not hasattr(module, part)]
    if missing:
        raise UsageError(
            f"cannot use recipe {str(path)!r}: it lacks {', '.join(missing)}; needed: {', '.join(CONTRACT)}; add them, "
            "as student/recipes/mae.py has them"
        )
    return module
