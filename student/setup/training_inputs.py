"""A run's inputs hold its configuration with the facts of what is read, the pictures and the
targets.

n training pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError
from featcache.pictures.source import Source
from student.config import RecipeConfig
from student.setup import view_choice
from student.setup.cache_match import MatchedCache
from student.setup.options import Options, RunRequest
from student.setup.view_choice import ViewSelection
from student.targets.cached import CachedTargets
from student.targets.contract import Targets

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a run hold the configuration with the facts of what is read, the targets and
    the training pictures."""

    config: RecipeConfig
    source: Source
    targets: Targets
    pictures: I64  # (n,) indices of the training pictures in the source
    record: dict[str, Any]  # for config.json

    @property
    def positions(self) -> I64:
        """Return the positions (n,) of the training pictures in storage: rows of the cache, or
        indices in the source."""
        return self.targets.rows if isinstance(self.targets, CachedTargets) else self.pictures


def select_views(
    request: RunRequest, found: MatchedCache, pictures: I64, rows: I64
) -> ViewSelection:
    """Choose the views of a cache that are shown, and say what the user should know of them."""
    options = request.options
    selection = view_choice.choose_views(
        found.cache, pictures, rows, found.spec.scale, options.scale, options.without_view
    )
    for note in selection.notes:
        request.say(f"note: {note}")
    return selection


def refuse_view_options(options: Options) -> None:
    """Raise UsageError for options that draw views anew: a cache has views of its own."""
    refuse({"--views": options.views, "--policy": options.policy, "--size": options.size})


def refuse(given: dict[str, Any]) -> None:
    """Raise UsageError for the first option that was given although a cache decides it."""
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} {value} does not go with a cache, which has its own: leave one of them "
                "out"
            )
