"""`student.train` does what the command of this name does, which is a thin layer over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from featcache.api.progress import ProgressCallback
from featcache.console import keywords
from featcache.console.params import images_variable
from featcache.errors import counted
from student import recipes
from student.api.settings import SETTINGS_FILE, SettingsGiven, setting_texts, with_file
from student.api.voice import voice
from student.data.loader import Loader
from student.setup import build, recorded_options, train_parameters
from student.setup.console import Console, Told, Voice
from student.setup.options import Options
from student.setup.run_to_end import measure_run, run_to_end
from student.training import accelerator, run_folder
from student.training.set_aside import generators_kept
from student.training.train import Run

Text = str | os.PathLike[str]
Tracker = Literal["json", "tensorboard", "wandb"]


@dataclass(frozen=True)
class TrainResult:
    """Says what a training came to; `facts` are plain JSON, all that --json prints."""

    run: Path | None  # the run folder; None of a dry run, which writes nothing
    steps: int  # optimiser steps of the whole run
    loss: float | None  # of the last step; None where no step was made
    facts: dict[str, Any] = field(repr=False)


def train(
    *,
    recipe: Text = "mralign",
    cache: Text | None = None,
    images: Text | None = None,
    labels: Text | None = None,
    image_member: str | None = None,
    out: Text | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    aug_repeats: int = 1,
    sampling: Literal["random", "block"] | None = None,
    stage: Text | None = None,
    stage_limit: int | str | None = None,
    resident: bool = False,
    seed: int = 0,
    init: Text | None = None,
    teacher: Literal["cached", "online"] = "cached",
    fallback: Literal["online"] | None = None,
    fallback_limit: float | None = None,
    weights: Text | None = None,
    other_weights: Text | Sequence[Text] = (),
    teacher_name: str | None = None,
    views: int | None = None,
    policy: Text | None = None,
    size: int | None = None,
    config: Text | None = None,
    settings: SettingsGiven = (),
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str | None = None,
    decoder: Literal["pillow", "ffcv"] | None = None,
    exif: bool = False,
    match: Literal["key", "content"] = "key",
    workers: int = 2,
    save_every: int | None = None,
    keep_checkpoints: str | int = "2",
    check_pixels: float = 1 / 16,
    pixel_tolerance: float = 0.0,
    scale: str | tuple[float, float] | None = None,
    without_view: float = 0.001,
    decode: bool = False,
    direct: bool = False,
    verify_rows: float = 1.0,
    read_threads: int | None = None,
    resume: bool = False,
    ema: float | None = None,
    compile: bool = False,
    checkpoint_activations: bool = False,
    deterministic: bool = False,
    skip_nonfinite: int | None = None,
    tracker: Tracker | Sequence[Tracker] = ("json",),
    probe: Text | None = None,
    probe_every: int | None = None,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> TrainResult:
    """Train a student by a recipe, from cached targets or with the teacher in the loop.

    Each keyword is the option of `student train` of this name, with its meaning, range and default;
    `student train --help` says them. `settings` are those of --set, as a mapping or as texts:
    `{"drop_path": 0}` or `["drop_path=0"]`. `progress` is called after every step with a `Progress`
    of stage "train", in steps, with the newest loss that is known; what it raises ends the run, of
    which the last checkpoint stays. Notes go to the logger "student".

    One training runs in a process at a time, each by an Accelerate state of its own: the precision
    may change from call to call. Under `accelerate launch` every process makes the same call, and
    the first one calls back. torch's generators and flags are afterwards as they were.

    Raises UsageError for what cannot be meant, UserError where the work cannot be done,
    IdentityError where pictures are not those of the cache, and StoppedError after Ctrl-C or
    SIGTERM in the main thread, when a checkpoint is saved and `resume=True` goes on; an OSError of
    the machine passes through.
    """
    given = dict(locals())  # the keywords, which are all there is yet
    callback = given.pop("progress")
    given["settings"] = setting_texts(settings)
    values = keywords.read([*train_parameters.parameters(), SETTINGS_FILE], given)
    told = carry_out(with_file(values), voice(callback))
    facts = told.facts
    run = None if dry_run else Path(facts["run"])
    return TrainResult(run, facts["steps"], facts.get("loss"), facts)


# --- the work, for the command too ----------------------------------------------------------------


def carry_out(given: Mapping[str, Any], voice: Voice) -> Told:
    """Train, or measure with --dry-run what it would cost; every process takes part. `given` are
    the options by click's names."""
    options = dict(given)
    name, dry, device = (options.pop(key) for key in ("recipe_name", "dry_run", "device"))
    options.pop("config")  # whose settings are those of `file_settings`
    with accelerator.own_state(), accelerator.kernels(deterministic=options.pop("deterministic")):
        recipe = recipes.load(name)
        acc = accelerator.accelerator(options["precision"], device)
        options["images"] = options["images"] or images_variable()
        console = Console(acc.is_main_process, voice)
        with console.notes_of_one(), generators_kept(acc.device):
            file = options.get("file_settings")
            if file is not None and file.option == "--resume":
                console.say(f"note: {file}: {recorded_options.told(file.taken)}")
            chosen = Options(**options)
            if acc.is_main_process and not dry and not chosen.resume:
                # before a cache is read, which may take minutes
                run_folder.check_new(build.run_path(name, chosen))
            run, loader = build.build_run(name, recipe, acc, chosen, console.say)
            for note in build.rate_notes(run, loader):
                console.say(note)
            return (measure_run if dry else _train)(run, loader, acc, console)


def _train(run: Run, loader: Loader, acc: Accelerator, console: Console) -> Told:
    """Train, and note in the ledger how far the run came, however it ended."""
    summary = run_to_end(run, loader, acc, console)
    text = f"{summary['run']}: {counted(summary['steps'], 'step')} done"
    loss = summary["loss"]
    if loss is not None:  # NaN is a text, as in the metrics that it was read from
        text += f", loss {loss:.4f}" if isinstance(loss, float) else f", loss {loss}"
    return Told(summary, text, console.speaks)
