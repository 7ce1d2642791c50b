"""What a run trains is found by the name in its config.json: a recipe, or fine-tuning."""

from __future__ import annotations

from types import ModuleType

from student import recipes
from student.training import finetune


def names() -> list[str]:
    """Return the names that need no file of the user's own.

    >>> "mae" in names(), "finetune" in names()
    (True, True)
    """
    return sorted([*recipes.names(), finetune.NAME])


def load(name: str) -> ModuleType:
    """Return the module, with its `Config` and `Model`; a path of a .py file is a recipe's."""
    return finetune if name == finetune.NAME else recipes.load(name)
