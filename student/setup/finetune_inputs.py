"""What is fine-tuned, on which pictures and how, becomes a Run and the Loader of its batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from featcache import rng, teachers
from featcache.console.config_file import FileSettings
from featcache.errors import UsageError
from featcache.models.weights import is_random, weight_hash
from featcache.runtime import device as devices
from featcache.runtime.compiler import check_compiler
from featcache.storage import identity, json_file
from featcache.views.policy import Policy
from student import checkpoint
from student.checkpoint import KEEP, Retention
from student.config import Settings, build_config, parse_settings, size
from student.data.loader import Loader
from student.features.embed import Rendering, Skipped
from student.features.frozen import digest_of, size_of
from student.features.labelled import Sets
from student.models import classifier, timm_network
from student.setup.batch_size import chosen_batch_size
from student.setup.file_settings import settings_of_file
from student.targets.labelled_views import LabelledViews
from student.training import finetune, trackers
from student.training.finetune import Config
from student.training.train import Run
from student.training.train_state import RunOptions
from student.training.validation import ValidationPlan

FACTS = ("encoder", "family", "patch_size", "conv_cls", "pixel_mean", "pixel_std", "classes")


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `student eval finetune` that a run depends on keep the names they have
    there."""

    run: Path | None
    teacher_spec: str | None
    weights: str | None
    checkpoint: int | None
    ema: bool
    out: Path | None
    epochs: int | None
    batch_size: int | None
    accumulate: int
    settings: Sequence[str]
    seed: int
    workers: int
    save_every: int | None
    eval_every: int
    crop_pct: float | None
    embed_batch: int
    skip_bad: int
    resume: bool
    keep_ema: float | None
    compiled: bool
    checkpoint_activations: bool
    skip_nonfinite: int | None
    trackers: Sequence[str]
    file_settings: FileSettings = field(default_factory=FileSettings)  # of --config

    @property
    def name(self) -> str:
        """Return what a folder is named after: the run, or the teacher without what a path
        divides."""
        return self.run.name if self.run else re.sub(r"[^\w.-]+", "-", str(self.teacher_spec))[:60]

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return self.out or Path("runs") / f"finetune-{self.name}-s{self.seed}"

    @property
    def run_options(self) -> RunOptions:
        """Return the options of running the model."""
        return RunOptions(
            self.keep_ema, self.compiled, self.checkpoint_activations, self.skip_nonfinite
        )


@dataclass(frozen=True)
class Begun:
    """Holds the network that fine-tuning begins with: its weights, and what is known of it."""

    encoder: nn.Module
    name: str
    facts: Mapping[str, Any]  # settings of the configuration
    about: Mapping[str, Any]  # identity, for config.json
    recipe: str = ""
    size: str = ""
    note: str = ""


def begin(options: FinetuneOptions) -> Begun:
    """Open what is fine-tuned."""
    return _of_teacher(options) if options.run is None else _of_run(options.run, options)


def _of_teacher(options: FinetuneOptions) -> Begun:
    spec = str(options.teacher_spec)
    teacher = teachers.load(spec, options.weights)
    network, encoder = timm_network.of_teacher(teacher, spec)
    facts = {
        "encoder": encoder,
        "family": timm_network.FAMILY,
        "img_size": teacher.input_px,
        "patch_size": teacher.input_px // math.isqrt(teacher.patches),
        "pixel_mean": list(teacher.pixel_mean),
        "pixel_std": list(teacher.pixel_std),
    }
    about = {"teacher": spec, "weights": weight_hash(teacher)}
    note = ""
    if is_random(teacher.weights):
        note = f"note: {teacher.weights} - these weights are drawn, not trained"
    return Begun(network, options.name, facts, about, note=note)


def _of_run(run: Path, options: FinetuneOptions) -> Begun:
    step = options.checkpoint
    if step is None:
        step = _begun_step(options)
    if step is None:
        step = checkpoint.latest_step(run)
    encoder, settings = checkpoint.load_encoder(run, options.ema, step)
    if classifier.is_meant(settings):
        raise UsageError(
            f"run {str(run)!r} was fine-tuned already; give the run that it began with, or its "
            "own --resume to go on"
        )
    names = ("encoder", "patch_size", "conv_cls", "img_size")
    known = {name: settings[name] for name in names if name in settings}
    recipe = str(checkpoint.read_config(run)["recipe"])
    return Begun(
        encoder,
        run.name,
        {**known, "family": settings.get("family", "mae")},
        {
            "recipe": recipe,
            "checkpoint": step,
            "ema": options.ema,
            "weights": digest_of(encoder, {}),
        },
        recipe,
        size_of(encoder) or size(settings["encoder"]),
    )


def _begun_step(options: FinetuneOptions) -> int | None:
    """Return the checkpoint that the resumed run began with: RUN may have a newer one by now."""
    if not (options.resume and (options.folder / checkpoint.CONFIG).is_file()):
        return None
    known = dict(identity.flatten({"run": checkpoint.read_config(options.folder)}))
    step = known.get("run.targets.begun.checkpoint")
    return step if type(step) is int and step >= 0 else None


def configure(options: FinetuneOptions, begun: Begun, protocol: ModuleType, classes: int) -> Config:
    """Return the configuration: the recipe's own publication, then what the user set."""
    given = settings_of_file(Config, options.file_settings)
    given = given.merged(parse_settings(Config, options.settings))
    for name in FACTS:
        if name in given.values:
            raise UsageError(
                f"--set {name}: it is a fact of {begun.name} and of the labels; leave it out"
            )
    published = protocol.DEFAULTS.get(
        (begun.recipe, begun.size), protocol.DEFAULTS.get((begun.recipe, None), {})
    )
    settings = Settings().updated({**published, **begun.facts, "classes": classes}, "fact")
    settings = settings.merged(given)
    if options.epochs is not None:
        settings = settings.updated({"epochs": options.epochs}, "option")
    return build_config(Config, settings)


def build(
    options: FinetuneOptions,
    begun: Begun,
    config: Config,
    sets: Sets,
    acc: Accelerator,
    crop_pct: float,
) -> tuple[Run, Loader]:
    """Return the run and the loader of this process; `crop_pct` is of test pictures."""
    shown = trackers.check(options.trackers)
    if options.compiled:
        check_compiler(str(acc.device))
    targets = LabelledViews(
        Policy(
            size=config.img_size,
            scale=config.crop_scale,
            filter="bicubic",
            flip=config.flip,
            seed=options.seed,
        ),
        sets.train.labels,
        config.classes,
        config.augmentation,
        config.pixel_mean,
        config.pixel_std,
    )
    loader = _loader(options, sets, targets, acc)
    validation = ValidationPlan(
        sets.tests,
        Rendering(config.img_size, crop_pct),
        config.pixel_mean,
        config.pixel_std,
        config.classes,
        options.embed_batch,
        options.eval_every,
        Skipped(options.skip_bad),
    )
    run = Run(
        name=finetune.NAME,
        recipe=finetune,
        config=config,
        targets=targets,
        out=options.folder,
        seed=options.seed,
        about=_about(begun, sets, options, crop_pct),
        save_every=options.save_every,
        resume=options.resume,
        run_options=options.run_options,
        trackers=shown,
        retention=Retention(KEEP),
        watch=validation,
        start=lambda model: model.load_encoder(begun.encoder),  # type: ignore[operator]
    )
    return run, loader


def mix_notes(config: Config, loader: Loader) -> list[str]:
    """Return what a person may not have meant of batches of an odd number, whose last picture has
    no neighbour."""
    mixes = config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)
    if not mixes or loader.batch_size % 2 == 0:
        return []
    left = "no picture is" if loader.batch_size == 1 else "the last one of each is not"
    return [
        f"note: batches of {loader.batch_size} a process: {left} mixed, and another number of "
        "processes mixes other pairs; give an even --batch-size, or --set mix_prob=0"
    ]


def _loader(
    options: FinetuneOptions, sets: Sets, targets: LabelledViews, acc: Accelerator
) -> Loader:
    source = sets.train.source
    return Loader(
        source=source,
        targets=targets,
        pictures=np.arange(len(source)),
        digests=rng.key_digests(source.keys),
        seed=options.seed,
        batch_size=chosen_batch_size(options, len(source), acc, options.folder),
        accumulation=options.accumulate,
        world=acc.num_processes,
        rank=acc.process_index,
        workers=options.workers,
        pin=devices.is_gpu(acc.device),
    )


def _about(begun: Begun, sets: Sets, options: FinetuneOptions, crop_pct: float) -> dict[str, Any]:
    """Return what else the numbers of the run depend on, for config.json."""
    return {
        "kind": "labelled",
        "begun": dict(begun.about),
        "labels": json_file.digest(sets.train.labels.tolist()),
        "classes": json_file.digest(list(sets.names)),
        "tests": {test.name: len(test) for test in sets.tests},
        "crop_pct": crop_pct,
        # where it lies may change
        "reading": {"run": str(options.run.absolute()) if options.run else ""},
    }
