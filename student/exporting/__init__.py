"""Formats write a trained encoder as another library reads it; each is one file, found by module
name.

A format module holds `LIBRARY`, the library's name on the hub; `FAMILIES`, the families of encoders
that it may have; `COMPARISON`, how it is compared with the run (`student.features.comparison`); and

    check(given)                  UserError for what the format cannot express, or a missing package
    write(given, folder)          config and weights
    reload(folder, classes)       read both back by the library: images (B,3,S,S) float64 ->
                                  {"tokens": (B,1+P,D), "logits": (B,C) of a classifier}, or what
                                  COMPARISON expects in their place
    usage(given)                  Python that loads the folder DIR, for the model card

with an `Exported` of `student.features.exported`. The folder, the card and the comparison are the
same for all: `student.features.export_folder`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from featcache.errors import UsageError, near


def names() -> list[str]:
    """Return the names of the formats, the modules of this folder.

    >>> "timm" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Import the module of a format by name."""
    if name not in names():
        raise UsageError(f"unknown format {name!r}: {near(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
