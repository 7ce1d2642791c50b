"""student: light trainers for masked image modelling from a featcache cache, one recipe a file.

`student.train(...)`, `student.evaluate(...)` and `student.export(...)` do what the commands do.
What the package offers is imported when it is first asked for. Notes go to the logger "student",
which says nothing unless a program sets it up.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student.api.evaluate import EvalResult, Score, evaluate
    from student.api.export import ExportResult, export
    from student.api.train import TrainResult, train

__all__ = ["EvalResult", "ExportResult", "Score", "TrainResult", "evaluate", "export", "train"]

_HOMES = {
    "EvalResult": "student.api.evaluate",
    "ExportResult": "student.api.export",
    "Score": "student.api.evaluate",
    "TrainResult": "student.api.train",
    "evaluate": "student.api.evaluate",
    "export": "student.api.export",
    "train": "student.api.train",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
