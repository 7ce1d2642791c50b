"""From the options of `student train` to a Job and its Loader.

Here it is decided where views and targets come from: a cache that was given or found, or the teacher in the loop. What
a person should know before training goes through `say`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from torch import Tensor

from featcache import images, joining, manifest, replay, rng, running, teachers, views
from featcache.crops import Scale
from featcache.errors import IdentityError, UsageError, UserError
from featcache.images import Source
from student import config, resident, resolve, shown, trackers
from student.learner import Ways
from student.loader import Loader
from student.recipes import TargetSpec
from student.resolve import Found, Reading
from student.targets import Cached, Host, Online, Targets, draw_masks
from student.train import Job

BATCH_SIZE = 64  # per process where none is given, or all pictures where there are fewer

I64 = npt.NDArray[np.int64]
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
    ema: float | None
    compiled: bool
    checkpoint_activations: bool
    skip_nonfinite: int | None
    trackers: Sequence[str]

    @property
    def ways(self) -> Ways:
        return Ways(self.ema, self.compiled, self.checkpoint_activations, self.skip_nonfinite)

    @property
    def reading(self) -> Reading:
        return Reading(self.read_threads, self.verify_rows, "direct" if self.direct else "auto")


@dataclass(frozen=True)
class _Chosen:
    """Where a run's views and targets come from."""

    config: config.RecipeConfig
    source: Source
    targets: Targets
    pictures: I64  # numbers of the training pictures in the source
    about: dict[str, Any]  # for config.json

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(n,) where each training picture lies: its row in the cache, or its number in the source."""
        return self.targets.rows if isinstance(self.targets, Cached) else self.pictures


def _masks(chosen: _Chosen, seed: int) -> Callable[[Host], dict[str, Tensor]] | None:
    """Masks are drawn with the batch where all they read is stored; else after the teacher in the loop has run."""
    targets = chosen.targets
    if not targets.is_stored:
        return None
    return lambda host: draw_masks(chosen.config, host, targets.sources(host), seed)


def _make_resident(targets: Targets, acc: Accelerator, say: Say) -> None:
    if not isinstance(targets, Cached):
        raise UsageError("--resident is about targets read from a cache, and none are read here: leave it out")
    size = resident.load(targets, acc)
    say(f"note: {size / 2**30:.2f} GiB of targets were read into memory, once for all processes of a machine")


def _check_moments(targets: Targets, accumulate: int) -> None:
    if accumulate > 1 and isinstance(targets, Online) and targets.spec.moments:
        raise UsageError(
            f"--accumulate {accumulate} with --teacher online: these targets are normalised over the whole batch, of "
            "which the teacher has seen one part only; allowed: --accumulate 1, or a cache in place of the teacher"
        )


def _repeats(given: int, targets: Targets) -> int:
    if isinstance(targets, Cached) and given > targets.cache.views:
        raise UsageError(
            f"--aug-repeats {given}: the cache stores {targets.cache.views} views of a picture, and as many are "
            "allowed; add views with `featcache extract --views`"
        )
    return given


def build(name: str, recipe: ModuleType, acc: Accelerator, options: Options, say: Say) -> tuple[Job, Loader]:
    """The job and the loader of this process."""
    if options.epochs is not None and options.steps is not None:
        raise UsageError(
            f"--epochs {options.epochs} and --steps {options.steps}: one of them is allowed; leave one out"
        )
    overrides = [*_file_settings(options.config), *options.settings]
    if options.epochs is not None:
        overrides.append(f"epochs={options.epochs}")
    _say_deviation(recipe, config.from_overrides(recipe.Config, overrides), say)  # or a wrong setting, told at once
    source = images.open_source(options.images, options.decoder or "pillow") if options.images else None
    found = _cache(name, recipe, overrides, source, options)
    if found is not None:
        resolve.verify_small(found.cache)
    if options.teacher == "online" or found is None:
        source = _like(source or _source_of(found, options.decoder), found, options)
        chosen = _online(recipe, overrides, found, source, str(acc.device), options, say)
    else:
        chosen = _cached(found, source, options, say)
    _check_moments(chosen.targets, options.accumulate)
    if options.resident:
        _make_resident(chosen.targets, acc, say)
    repeats = _repeats(options.aug_repeats, chosen.targets)
    fitting = max(len(chosen.pictures) // acc.num_processes // options.accumulate, 1) * repeats
    loader = Loader(
        chosen.source,
        chosen.targets,
        chosen.pictures,
        rng.key_digests(chosen.source.keys[i] for i in chosen.pictures),
        options.seed,
        options.batch_size or min(BATCH_SIZE // repeats * repeats or repeats, fitting),
        options.accumulate,
        acc.num_processes,
        acc.process_index,
        options.workers,
        options.check_pixels,
        repeats,
        chosen.places if options.sampling == "block" else None,
        _masks(chosen, options.seed),
        pin=acc.device.type == "cuda",
    )
    out = options.out or Path("runs") / f"{Path(name).stem}-s{options.seed}"
    limits: dict[str, Any] = {"steps": options.steps, "save_every": options.save_every, "resume": options.resume}
    limits |= {"ways": options.ways, "trackers": trackers.check(options.trackers)}
    return Job(name, recipe, chosen.config, chosen.targets, out, options.seed, chosen.about, **limits), loader


def _file_settings(path: Path | None) -> list[str]:
    """Settings from a JSON object, or from a run's config.json."""
    if path is None:
        return []
    try:
        fields = json.loads(path.read_text())
        return [f"{key}={json.dumps(value)}" for key, value in fields.get("config", fields).items()]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--config {str(path)!r}: {error}; a JSON object of settings is needed, such as a run's config.json"
        ) from error


def _cache(
    name: str, recipe: ModuleType, overrides: Sequence[str], source: Source | None, options: Options
) -> Found | None:
    """The cache that was given; else, unless the teacher is in the loop, the one that serves."""
    if options.cache is not None:
        return resolve.open_given(options.cache, recipe, name, overrides, options.reading)
    return resolve.find(recipe, name, overrides, source, options.reading) if options.teacher == "cached" else None


def _like(source: Source, found: Found | None, options: Options) -> Source:
    """The pictures through the decoder that was asked for, else through that of the cache."""
    return source if found is None or options.decoder else images.like(source, found.cache.identity["pixel_path"])


def _source_of(found: Found | None, decoder: str | None) -> Source:
    """The pictures a cache was made from, where it says and they are still there."""
    if found is None:
        raise UsageError(f"no pictures given: --images SRC is {images.ALLOWED}; FEATCACHE_IMAGES sets a default")
    return images.open_source(found.cache.manifest["provenance"]["source"], decoder or "pillow")


def _cached(found: Found, given: Source | None, options: Options, say: Say) -> _Chosen:
    _refuse({"--weights": options.weights, "--views": options.views, "--policy": options.policy})
    cache = found.cache
    stored = joining.stores_pixels(cache) and not options.decode
    if stored and options.decoder:
        raise UsageError(
            f"--decoder {options.decoder} is about decoding pictures, and the cache stores pixels: leave it out, or "
            "give --decode with it"
        )
    source = given or (joining.Stored(cache) if stored else _source_of(found, options.decoder))
    source = source if stored else _like(source, found, options)
    pictures, rows, skipped = joining.join(cache, source, decodes=not stored)
    _say_skipped(skipped, say)
    _say_about(found, say)
    show = _shown(found, pictures, rows, options, say)
    if stored:
        say("note: pixels come from the cache, nothing is decoded; --decode decodes the pictures in place of them")
    elif joining.stores_pixels(cache):
        say(f"note: pixels are decoded from {source.spec}, those in the cache are left alone")
    about = {"kind": "cached", "id": cache.manifest["id"], "identity": cache.identity, "views": cache.views}
    about |= show.about
    about["pixel_tolerance"] = options.pixel_tolerance
    # What was read, and how: of no effect on any number, so that a resumed run may change it.
    about["reading"] = {
        **asdict(options.reading),
        "tokens": found.tokens or "all",
        "pixels": "stored" if stored else "decoded",
    }
    targets = Cached(cache, found.spec, show.rows, options.pixel_tolerance, found.tokens, stored, show.turns)
    return _Chosen(found.config, source, targets, show.pictures, about)


def _shown(found: Found, pictures: I64, rows: I64, options: Options, say: Say) -> shown.Shown:
    """The views that are shown, and what is said of them."""
    show = shown.choose(found.cache, pictures, rows, found.spec.scale, options.scale, options.without_view)
    for note in show.notes:
        say(f"note: {note}")
    return show


def _say_about(found: Found, say: Say) -> None:
    """What a person should know of the cache that serves."""
    about, policy = found.cache.manifest, found.cache.identity["policy"]
    if manifest.is_random(about) and found.spec.fields:
        say(f"note: {manifest.title(about)}")
    if policy["jitter"] != found.spec.jitter and found.spec.fields:
        say(f"note: colours jittered by {policy['jitter']:g}; the recipe was published with {found.spec.jitter:g}")
    for note in found.notes:
        say(f"note: {note}")


def _say_deviation(recipe: ModuleType, asked: config.RecipeConfig, say: Say) -> None:
    """What of the views was set otherwise than the recipe was published with."""
    published, jitter = recipe.needs(recipe.Config()).jitter, recipe.needs(asked).jitter
    if jitter != published:
        say(f"note: jitter={jitter:g} deviates from the recipe, which was published with {published:g}")


def _say_skipped(skipped: int, say: Say) -> None:
    if skipped:
        say(f"note: {skipped} pictures are in the cache's quarantine and are skipped")


def _refuse(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} {value} does not go with a cache, which has its own: leave one of them out")


def _refuse_reading(options: Options) -> None:
    """Options of reading a cache where none is read."""
    given = {
        "--direct": options.direct,
        "--verify-rows": options.verify_rows != 1,
        "--read-threads": options.read_threads is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise UsageError(f"{option} is about reading targets from a cache, and none are read here: leave it out")


def _online(
    recipe: ModuleType,
    overrides: Sequence[str],
    found: Found | None,
    source: Source,
    device: str,
    options: Options,
    say: Say,
) -> _Chosen:
    """The teacher in the loop: over a cache's own views and pictures where one is given, else over fresh ones."""
    identity = found.cache.identity if found else None
    _refuse_reading(options)
    if found:
        _refuse({"--views": options.views, "--policy": options.policy})
        overrides = found.overrides
    elif options.scale is not None:
        raise UsageError("--scale chooses among the views of a cache, and none is read here: give --policy, or --cache")
    plain = config.from_overrides(recipe.Config, overrides)
    path = images.pixel_path(source)
    policy = views.from_dict(identity["policy"]) if identity else _fresh(options.policy, recipe.needs(plain), path)
    if found:
        images.check_path(source, found.cache.identity["pixel_path"], f"cache {str(found.cache.path)!r}")
    replay.check(path, policy.filter)
    count = options.views or (found.cache.views if found else None)
    teacher = None
    if recipe.needs(plain).fields:
        given = options.weights or (found.cache.manifest["provenance"]["weights"] if found else None)
        teacher = teachers.load(identity["teacher"]["name"] if identity else plain.teacher, given, device)
        if identity and teachers.weight_hash(teacher) != identity["teacher"]["weight_hash"]:
            raise IdentityError(
                f"weights {given!r} have hash {teachers.weight_hash(teacher)}, the cache was made with "
                f"{identity['teacher']['weight_hash']}; give those with --weights, or leave --cache out"
            )
        teacher = running.like(teacher, identity) if identity else teacher
        if teachers.is_random(teacher.weights):
            say(f"note: {teacher.weights} - these weights are drawn, not trained")
    settings = resolve.with_facts(recipe.Config, overrides, _online_facts(identity, policy, teacher))
    if teacher is not None and recipe.needs(settings).derive == "z":
        resolve.check_projection(teacher.tail(), f"teacher {teacher.name!r}")
    show = shown.Shown(np.arange(len(source)), np.arange(len(source)))
    if found:
        pictures, rows, skipped = joining.join(found.cache, source)
        _say_skipped(skipped, say)
        show = _shown(found, pictures, rows, options, say)
    about = {"kind": "online", "policy": policy.as_dict(), "views": count, "pixel_path": path, **show.about}
    if teacher is not None:
        about |= {"teacher": teacher.name, "weight_hash": teachers.weight_hash(teacher)}
    order = identity["order"] if identity else "attentive"
    targets = Online(policy, recipe.needs(settings), teacher, count, order, show.turns)
    return _Chosen(settings, source, targets, show.pictures, about)


def _fresh(name: str | None, spec: TargetSpec, path: dict[str, Any]) -> views.Policy:
    """The policy that was named, or the crops of the recipe's publication, with the filter of the pixel path."""
    filter = {"filter": views.AREA} if path["decoder"] == "ffcv" else {}
    return views.policy(name, **filter) if name else views.policy(scale=spec.scale, jitter=spec.jitter, **filter)


def _online_facts(
    identity: dict[str, Any] | None, policy: views.Policy, teacher: teachers.Teacher | None
) -> dict[str, Any]:
    if teacher is None:
        return resolve.facts(identity) if identity else {"img_size": policy.size}
    return {
        "img_size": policy.size,
        "patch_size": resolve.patch_size(policy.size, teacher.patches),
        "teacher": teacher.name,
        "teacher_depth": teacher.depth,
        "teacher_width": teacher.width,
        **resolve.output_facts(teacher.tail(), teacher.width),
    }


def facts(job: Job, loader: Loader) -> dict[str, Any]:
    """What is going to be trained, from what."""
    cached = job.about["kind"] == "cached"
    return {
        "recipe": job.name,
        "targets": f"cache {job.about['id']}"
        if cached
        else f"online, teacher {job.about.get('teacher', 'not needed')}",
        "pictures": len(loader.pictures),
        "global_batch": loader.global_batch,
        "steps_per_epoch": loader.steps_per_epoch,
        "steps": job.total_steps(loader.steps_per_epoch),
    }


def warmup_note(job: Job, loader: Loader) -> str:
    """What to say when the rate would never reach its peak; empty otherwise."""
    warmup, total = round(job.config.warmup_epochs * loader.steps_per_epoch), job.total_steps(loader.steps_per_epoch)
    if not total or warmup < total:
        return ""
    return (
        f"note: warm-up ({warmup} steps) is not shorter than the run ({total}): the rate never reaches its peak; "
        "--set warmup_epochs=N changes it"
    )
