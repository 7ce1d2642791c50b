"""A run as a report shows it: its number on the page, its record, its curves, and its model where
that can be built."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from featcache.errors import UserError, counted, printable
from featcache.models import architecture
from featcache.models.hooks import normalise_pixels
from student import checkpoint, config, masking
from student.reporting import comparison, metric_curves, run_facts
from student.reporting.metric_curves import Curves
from student.training import trainable

NAME = 40  # characters of a name on the page: the end, by which runs differ


@dataclass(frozen=True)
class Mask:
    """Says how a run's masks are drawn: by what, how many of grid x grid patches are seen, under
    which seed."""

    name: str
    ratio: float
    visible: int
    grid: int
    seed: int


@dataclass
class ReportedRun:
    """Holds what a report knows of a run; `number` counts from 1. `missing` collects what could
    not be shown of it, and why."""

    number: int
    path: Path
    record: dict[str, Any]
    facts: dict[str, Any]
    curves: Curves
    environment: dict[str, Any]
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return its number and the end of its folder's name."""
        name = printable(self.path.absolute().name, keep="")
        return f"{self.number}: {name if len(name) <= NAME else '...' + name[3 - NAME :]}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the recipe's settings."""
        settings: dict[str, Any] = self.record["config"]
        return settings

    @cached_property
    def model(self) -> nn.Module | None:
        """Return the model of the newest checkpoint in eval mode, or for a recipe of the user's
        own, whose code is not run here, its encoder as `model.encoder`; None where neither can be
        had, which `missing` then tells."""
        if self.record["recipe"] not in trainable.names():
            self.missing.append(
                "its matrix W and reconstructions: the code of a recipe of one's own is not run "
                "for a report"
            )
        try:
            return load_model(self.path, self.record)
        except UserError as error:
            self.missing.append(f"all that the model would show: {error}")
            return None

    @property
    def encoder(self) -> Any:
        """Return the encoder of the model; None where there is none."""
        return None if self.model is None else self.model.encoder

    @property
    def pixel_stats(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the channels' mean and std by which its pixels are normalised."""
        own: Any = getattr(self.model, "config", None)
        if hasattr(own, "pixel_mean"):  # of a fine-tuned teacher
            return own.pixel_mean, own.pixel_std
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def images(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """Normalise views (n, S, S, 3) for its model: (n, 3, S, S) float32."""
        return normalise_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2), *self.pixel_stats)

    @property
    def img_size(self) -> int:
        """Return the pixels a side of its views; 0 where its settings do not say so."""
        size = self.settings.get("img_size")
        return size if type(size) is int and 0 < size <= architecture.MAX_PX else 0

    @property
    def patch_px(self) -> int:
        """Return the pixels a side of a patch; 0 where its settings do not say so."""
        patch = self.settings.get("patch_size")
        return patch if type(patch) is int and 0 < patch <= self.img_size else 0

    @property
    def grid(self) -> int:
        """Return the patches a side of its views; 0 where its settings do not say so."""
        return self.img_size // self.patch_px if self.patch_px else 0

    @property
    def mask(self) -> Mask | None:
        """Return how its masks are drawn; None where it has none, or its settings cannot be
        meant."""
        keys = ("mask", "mask_ratio", "mask_count")
        name, ratio, counted = (self.settings.get(key) for key in keys)
        if not isinstance(name, str) or not isinstance(counted, str) or not self.grid:
            return None
        if name not in masking.MASKS or counted not in masking.COUNTS:
            return None
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            return None
        seed = self.record.get("seed")
        count = masking.kept_count(self.grid**2, ratio, counted)
        return Mask(name, ratio, count, self.grid, seed if type(seed) is int else 0)


def read(number: int, run: Path) -> ReportedRun:
    """Read a run. Raises UserError where its folder is damaged; rows of metrics that are none are
    counted."""
    record = checkpoint.read_config(run)
    try:
        curves = metric_curves.read(run)
        row = _as_text(curves.last or {"step": 0})
        facts = run_facts.read(run, record, time.time(), row)
    except OSError as error:
        raise UserError(
            f"{str(error.filename or run)!r}: {error.strerror}; restore it, or leave this run out"
        ) from error
    found = ReportedRun(number, run, record, facts, curves, comparison.environment(run))
    found.missing += _told(curves)
    return found


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with NaN and infinities as the texts that they are in the file."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _told(curves: Curves) -> list[str]:
    """Say what of metrics.jsonl is not on the page."""
    told = []
    if curves.broken:
        told.append(
            f"{curves.broken} of {counted(curves.lines, 'line')} of metrics.jsonl are "
            "no rows, and are passed "
            f"over; the first is {curves.first_broken}"
        )
    if curves.left_out:
        first = ", ".join(printable(name[:40], keep="") for name in sorted(curves.left_out)[:3])
        told.append(
            f"curves of columns beyond the first {metric_curves.COLUMNS} of metrics.jsonl, such as "
            f"{first}"
        )
    return told


def load_model(run: Path, record: dict[str, Any]) -> nn.Module:
    """Load the newest checkpoint of a run into its recipe's model, or into its encoder alone where
    the recipe is not one of ours. Raises UserError where they do not fit."""
    name = record["recipe"]
    if name not in trainable.names():
        encoder, _ = checkpoint.load_encoder(run)
        return nn.ModuleDict({"encoder": encoder})
    recipe = trainable.load(name)
    built = config_of(recipe.Config, record["config"])
    return checkpoint.load_model(run, lambda: recipe.Model(built))


def config_of(kind: Any, given: dict[str, Any]) -> Any:
    """Build a recipe's configuration from a run's settings, without those that it does not know."""
    names = {each.name for each in dataclasses.fields(kind)}
    known = {key: value for key, value in given.items() if key in names}
    return config.build_config(kind, config.read_settings(kind, known))


def last_step(runs: list[ReportedRun]) -> int:
    """Return the last step that any of the runs has a row of."""
    return max([int(each.curves.last["step"]) for each in runs if each.curves.last], default=0)
