"""The options of `student train` become a Run and the Loader of its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, counted
from featcache.runtime import device as devices
from featcache.runtime.compiler import check_compiler
from student import masking
from student.config import RecipeConfig
from student.data.loader import Loader
from student.setup import staging
from student.setup.batch_size import chosen_batch_size
from student.setup.first_weights import first_weights
from student.setup.options import Options, RunRequest, Say, user_settings
from student.setup.probe_inputs import probe_plan
from student.setup.target_choice import choose_targets
from student.setup.training_inputs import TrainingInputs
from student.targets import in_memory
from student.targets.assemble import draw_for_masks, draw_masks
from student.targets.cached import CachedTargets
from student.targets.contract import HostBatch, Targets
from student.targets.fallback import FallbackTargets
from student.training import optim, trackers
from student.training.train import Run

DrawMasks = Callable[[HostBatch], dict[str, Tensor]]
Bool = npt.NDArray[np.bool_]


def run_path(recipe: str, options: Options) -> Path:
    """Return the folder of a run: --out, else one named after recipe and seed."""
    return options.out or Path("runs") / f"{Path(recipe).stem}-s{options.seed}"


def build_run(
    name: str, recipe: ModuleType, acc: Accelerator, options: Options, say: Say
) -> tuple[Run, Loader]:
    """Choose what a run is trained on; returns the run and the loader of this process."""
    shown = trackers.check(options.trackers)
    if options.compiled:
        check_compiler(str(acc.device))
    settings = user_settings(recipe.Config, options)
    request = RunRequest(name, recipe, settings, options, str(acc.device), say)
    inputs = choose_targets(request)
    probe = probe_plan(request, inputs, acc)
    if options.resident:
        _load_into_memory(inputs.targets, acc, say)
    out = run_path(name, options)
    start, about = first_weights(options, out, inputs.config.img_size)
    loader = _loader(inputs, options, acc, out)
    run = Run(
        name=name,
        recipe=recipe,
        config=inputs.config,
        targets=inputs.targets,
        out=out,
        seed=options.seed,
        about={**inputs.record, **about},
        steps=options.steps,
        save_every=options.save_every,
        resume=options.resume,
        run_options=options.run_options,
        trackers=shown,
        retention=options.retention(loader.steps_per_epoch),
        watch=probe,
        start=start,
    )
    return run, loader


def _load_into_memory(targets: Targets, acc: Accelerator, say: Say) -> None:
    if not isinstance(targets, CachedTargets):
        raise UsageError(
            "--resident is about targets read from a cache, and none are read here: leave it out"
        )
    size = in_memory.load(targets, acc)
    say(
        f"note: {size / 2**30:.2f} GiB of targets were read into memory, once for all processes of "
        "a machine"
    )


def _loader(inputs: TrainingInputs, options: Options, acc: Accelerator, out: Path) -> Loader:
    _check_repeats(options.aug_repeats, inputs.targets)
    return Loader(
        source=inputs.source,
        targets=inputs.targets,
        pictures=inputs.pictures,
        digests=rng.key_digests(inputs.source.keys[i] for i in inputs.pictures),
        seed=options.seed,
        batch_size=chosen_batch_size(options, len(inputs.pictures), acc, out, options.aug_repeats),
        accumulation=options.accumulate,
        world=acc.num_processes,
        rank=acc.process_index,
        workers=options.workers,
        check_fraction=options.check_pixels,
        repeats=options.aug_repeats,
        positions=inputs.positions if staging.by_block(inputs.targets, options.sampling) else None,
        fetch_ahead=staging.stage(inputs.targets, options),
        masks=_draw_masks(inputs, options.seed),
        pin=devices.is_gpu(acc.device),
    )


def _check_repeats(repeats: int, targets: Targets) -> None:
    """Raise UsageError where a step would show more views of a picture than are stored."""
    cached = targets.cached if isinstance(targets, FallbackTargets) else targets
    if isinstance(cached, CachedTargets) and repeats > cached.cache.views:
        raise UsageError(
            f"--aug-repeats {repeats}: the cache stores "
            f"{counted(cached.cache.views, 'view')} of a picture, "
            "and as many are allowed; add views with `featcache extract --views`"
        )


def _draw_masks(inputs: TrainingInputs, seed: int) -> DrawMasks:
    """Masks are drawn with the batch where all they read is stored; else what is random in them,
    and the device orders the patches after the teacher in the loop has run."""
    targets, config = inputs.targets, inputs.config

    def draw(host: HostBatch) -> dict[str, Tensor]:
        absent = host.get("absent", np.full(len(host["at"]), not targets.is_stored))
        if not masking.fields(config.mask) or not absent.any():
            return draw_masks(config, host, targets.mask_inputs(host), seed)
        _check_stored(config, host, targets, ~absent, seed)
        return draw_for_masks(config, host, seed)

    return draw


def _check_stored(
    config: RecipeConfig, host: HostBatch, targets: Targets, stored: Bool, seed: int
) -> None:
    """Refuse stored rows that no mask can be drawn from, as the device would not."""
    some = {name: host[name][stored] for name in ("digests", "round")}
    rows = {name: rows[stored] for name, rows in targets.mask_inputs(host).items()}
    if stored.any():
        draw_masks(config, some, rows, seed)


def run_facts(run: Run, loader: Loader) -> dict[str, Any]:
    """Return what is going to be trained, and from what."""
    about = run.about
    watched = "scored" if about["kind"] == "labelled" else "probe"
    return {
        "recipe": run.name,
        "targets": _told_targets(about),
        "pictures": len(loader.pictures),
        "global_batch": loader.global_batch,
        "steps_per_epoch": loader.steps_per_epoch,
        "steps": run.total_steps(loader.steps_per_epoch),
        **({watched: run.watch.facts} if run.watch else {}),
    }


def _told_targets(about: Mapping[str, Any]) -> str:
    """Say what is learnt from."""
    if about["kind"] == "labelled":
        return "their labels"
    if about["kind"] == "cached":
        return f"cache {about['id']}"
    own = [about["teacher"]] if "teacher" in about else []
    beside = [other["teacher"] for other in about.get("others", {}).values()]
    return f"online, teacher {' and '.join([*own, *beside]) or 'not needed'}"


def rate_notes(run: Run, loader: Loader) -> list[str]:
    """Return what a person may not have meant of the learning rate."""
    peak, least = optim.peak_lr(run.config, loader.global_batch), run.config.min_lr
    notes = [_warmup_note(run, loader)]
    if least > peak:
        notes.append(
            f"note: min_lr={least:g} is above the peak of {peak:g} at this global batch: the "
            "learning rate rises to it; --set min_lr=RATE changes it"
        )
    return [note for note in notes if note]


def _warmup_note(run: Run, loader: Loader) -> str:
    """Return a note where the learning rate would never reach its peak; empty otherwise."""
    warmup = round(run.config.warmup_epochs * loader.steps_per_epoch)
    total = run.total_steps(loader.steps_per_epoch)
    if not total or warmup < total:
        return ""
    return (
        f"note: warm-up ({counted(warmup, 'step')}) is not shorter than the run "
        f"({total}): the learning rate "
        "never reaches its peak; --set warmup_epochs=N changes it"
    )
