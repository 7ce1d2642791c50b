"""From the options of `student train` to a Job and its Loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError
from student.data.loader import Loader
from student.setup import target_choice
from student.setup.options import Options, Say, file_settings
from student.setup.target_choice import TrainingInputs
from student.targets import in_memory
from student.targets.assemble import draw_masks
from student.targets.cached import CachedTargets
from student.targets.contract import HostBatch, Targets
from student.targets.fallback import FallbackTargets
from student.training import trackers
from student.training.train import Run

BATCH_SIZE = 64  # per process where none is given, or all pictures where there are fewer


def _masks(
    chosen: TrainingInputs, seed: int
) -> Callable[[HostBatch], dict[str, Tensor] | None] | None:
    """Masks are drawn with the batch where all they read is stored; else after the teacher in the
    loop has run."""
    targets = chosen.targets
    if not targets.is_stored:
        return None

    def draw(host: HostBatch) -> dict[str, Tensor] | None:
        if "absent" in host and host["absent"].any():
            return None
        return draw_masks(chosen.config, host, targets.sources(host), seed)

    return draw


def _make_resident(targets: Targets, acc: Accelerator, say: Say) -> None:
    if not isinstance(targets, CachedTargets):
        raise UsageError(
            "--resident is about targets read from a cache, and none are read here: leave it out"
        )
    size = in_memory.load(targets, acc)
    say(
        f"note: {size / 2**30:.2f} GiB of targets were read into memory, once for all processes of "
        "a machine"
    )


def _repeats(given: int, targets: Targets) -> int:
    cached = targets.cached if isinstance(targets, FallbackTargets) else targets
    if isinstance(cached, CachedTargets) and given > cached.cache.views:
        raise UsageError(
            f"--aug-repeats {given}: the cache stores {cached.cache.views} views of a picture, and "
            "as many are allowed; add views with `featcache extract --views`"
        )
    return given


def build_run(
    name: str, recipe: ModuleType, acc: Accelerator, options: Options, say: Say
) -> tuple[Run, Loader]:
    """The run and the loader of this process."""
    if options.epochs is not None and options.steps is not None:
        raise UsageError(
            f"--epochs {options.epochs} and --steps {options.steps}: one of them is allowed; leave "
            "one out"
        )
    overrides = [*file_settings(options.config), *options.settings]
    if options.epochs is not None:
        overrides.append(f"epochs={options.epochs}")
    chosen = target_choice.choose_targets(name, recipe, overrides, options, str(acc.device), say)
    if options.resident:
        _make_resident(chosen.targets, acc, say)
    repeats = _repeats(options.aug_repeats, chosen.targets)
    fitting = max(len(chosen.pictures) // acc.num_processes // options.accumulate, 1) * repeats
    loader = Loader(
        source=chosen.source,
        targets=chosen.targets,
        pictures=chosen.pictures,
        digests=rng.key_digests(chosen.source.keys[i] for i in chosen.pictures),
        seed=options.seed,
        batch_size=options.batch_size or min(BATCH_SIZE // repeats * repeats or repeats, fitting),
        accumulation=options.accumulate,
        world=acc.num_processes,
        rank=acc.process_index,
        workers=options.workers,
        check_fraction=options.check_pixels,
        repeats=repeats,
        places=chosen.places if options.sampling == "block" else None,
        masks=_masks(chosen, options.seed),
        pin=acc.device.type == "cuda",
    )
    out = options.out or Path("runs") / f"{Path(name).stem}-s{options.seed}"
    limits: dict[str, Any] = {
        "steps": options.steps,
        "save_every": options.save_every,
        "resume": options.resume,
    }
    limits |= {"run_options": options.run_options, "trackers": trackers.check(options.trackers)}
    return Run(
        name, recipe, chosen.config, chosen.targets, out, options.seed, chosen.about, **limits
    ), loader


def run_facts(run: Run, loader: Loader) -> dict[str, Any]:
    """What is going to be trained, from what."""
    cached = run.about["kind"] == "cached"
    return {
        "recipe": run.name,
        "targets": f"cache {run.about['id']}"
        if cached
        else f"online, teacher {run.about.get('teacher', 'not needed')}",
        "pictures": len(loader.pictures),
        "global_batch": loader.global_batch,
        "steps_per_epoch": loader.steps_per_epoch,
        "steps": run.total_steps(loader.steps_per_epoch),
    }


def warmup_note(run: Run, loader: Loader) -> str:
    """What to say when the rate would never reach its peak; empty otherwise."""
    warmup, total = (
        round(run.config.warmup_epochs * loader.steps_per_epoch),
        run.total_steps(loader.steps_per_epoch),
    )
    if not total or warmup < total:
        return ""
    return (
        f"note: warm-up ({warmup} steps) is not shorter than the run ({total}): the rate never "
        "reaches its peak; --set warmup_epochs=N changes it"
    )
