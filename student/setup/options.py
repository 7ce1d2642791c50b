"""The options of `student train` are frozen values, and with a recipe they ask for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from featcache.console.config_file import FileSettings
from featcache.errors import UsageError
from featcache.reading.crop_range import Scale
from featcache.runtime.numbers import is_whole
from student.checkpoint import KEEP, Retention
from student.config import RecipeConfig
from student.settings import Settings, build_config, parse_settings
from student.setup.cache_match import ReadOptions
from student.setup.file_settings import settings_of_file
from student.training.train_state import RunOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The options of `student train`, beside the recipe, keep the names they have there."""

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
    teacher_name: str | None
    views: int | None
    policy: str | None
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
    sampling: str | None
    aug_repeats: int
    resident: bool
    fallback: str | None
    fallback_limit: float | None
    ema: float | None
    compiled: bool
    checkpoint_activations: bool
    skip_nonfinite: int | None
    trackers: Sequence[str]
    keep_checkpoints: str = str(KEEP)
    stage: Path | None = None  # folder that rows of an object store are fetched to
    stage_limit: int | None = None  # bytes
    size: int | None = None  # pixels of a view
    init: Path | None = None  # a run or its encoder, whose weights are the first
    exif: bool = False
    match: str = "key"  # how pictures find their rows
    other_weights: Sequence[str] = ()  # NAME=..., of networks beside the teacher
    probe: str | None = None
    probe_every: int | None = None  # epochs
    file_settings: FileSettings = field(default_factory=FileSettings)  # of --config

    def retention(self, steps_per_epoch: int) -> Retention:
        """Return which checkpoints stay, by --keep-checkpoints N or every:E of epochs."""
        what, _, number = self.keep_checkpoints.rpartition(":")
        if what not in ("", "every") or not is_whole(number) or int(number) < 1:
            raise UsageError(
                f"--keep-checkpoints {self.keep_checkpoints}: a number of newest ones is allowed, "
                f"or every:E, those of every E epochs beside the newest {KEEP}; give {KEEP} or "
                "every:10"
            )
        if not what:
            return Retention(int(number))
        every = int(number) * steps_per_epoch
        if every % (self.save_every or steps_per_epoch):
            raise UsageError(
                f"--keep-checkpoints {self.keep_checkpoints} --save-every {self.save_every}: "
                f"{number} epochs have "
                f"{every} steps, which {self.save_every} does not divide, so "
                "that no checkpoint is of that step; change one of them"
            )
        return Retention(KEEP, every)

    @property
    def run_options(self) -> RunOptions:
        """Return the options of running the model."""
        return RunOptions(self.ema, self.compiled, self.checkpoint_activations, self.skip_nonfinite)

    @property
    def reading(self) -> ReadOptions:
        """Return the options of reading a cache."""
        io = "direct" if self.direct else "auto"
        return ReadOptions(self.read_threads, self.verify_rows, io, self.fallback is not None)


@dataclass(frozen=True)
class RunRequest:
    """A run is asked for by a recipe, its settings and the options; notes for the user go to
    `say`."""

    name: str  # of the recipe
    recipe: ModuleType
    settings: Settings
    options: Options
    device: str
    say: Say

    @property
    def config(self) -> RecipeConfig:
        """Return the recipe's configuration without the facts of a cache."""
        config: RecipeConfig = build_config(self.recipe.Config, self.settings)
        return config


def user_settings(kind: type[RecipeConfig], options: Options) -> Settings:
    """Read the settings of the --config file, then those of --set, then --epochs; later ones
    win."""
    if options.epochs is not None and options.steps is not None:
        raise UsageError(
            f"--epochs {options.epochs} and --steps {options.steps}: one of them is allowed; leave "
            "one out"
        )
    settings = settings_of_file(kind, options.file_settings)
    settings = settings.merged(parse_settings(kind, options.settings))
    return (
        settings
        if options.epochs is None
        else settings.updated({"epochs": options.epochs}, "option")
    )
