"""What `student train` was told, beside the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import UserError
from featcache.reading.crop_range import Scale
from student.setup.cache_match import ReadOptions
from student.training.train_state import RunOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `student train` was told, beside the recipe; names are those of the options."""

    cache: Path | None
    images: str | None
    out: Path | None
    epochs: int | None
    steps: int | None
    batch_size: int | None
    accumulate: int
    seed: int
    teacher: str
    weights: str | None
    views: int | None
    policy: str | None
    config: Path | None
    settings: Sequence[str]
    precision: str
    decoder: str | None
    workers: int
    save_every: int | None
    check_pixels: float
    pixel_tolerance: float
    decode: bool
    direct: bool
    verify_rows: float
    scale: Scale | None
    without_view: float
    read_threads: int | None
    resume: bool
    sampling: str
    aug_repeats: int
    resident: bool
    fallback: str | None
    fallback_limit: float | None
    ema: float | None
    compiled: bool
    checkpoint_activations: bool
    skip_nonfinite: int | None
    trackers: Sequence[str]

    @property
    def run_options(self) -> RunOptions:
        return RunOptions(self.ema, self.compiled, self.checkpoint_activations, self.skip_nonfinite)

    @property
    def reading(self) -> ReadOptions:
        io = "direct" if self.direct else "auto"
        return ReadOptions(self.read_threads, self.verify_rows, io, self.fallback is not None)


def file_settings(path: Path | None) -> list[str]:
    """Settings from a JSON object, or from a run's config.json."""
    if path is None:
        return []
    try:
        fields = json.loads(path.read_text())
        return [f"{key}={json.dumps(value)}" for key, value in fields.get("config", fields).items()]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--config {str(path)!r}: {error}; a JSON object of settings is needed, such as a "
            "run's config.json"
        ) from error
