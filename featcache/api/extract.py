"""`featcache.extract` does what the command of this name does, which is a thin layer over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featcache.api import progress as api_progress
from featcache.api.begun_cache import with_shards
from featcache.api.planned_jobs import plan_again, plan_jobs
from featcache.api.progress import Progress, ProgressCallback
from featcache.catalog.account import account
from featcache.console import (
    append_options,
    config_file,
    extract_parameters,
    extract_report,
    for_recipes,
    keywords,
)
from featcache.console.engine_options import LOCAL, check_engine, engine_options
from featcache.console.extract_options import ExtractOptions, Inputs, build_plans, check_names
from featcache.console.params import require_images
from featcache.console.progress_bar import WaitingNote
from featcache.errors import StoppedError
from featcache.pictures.open_source import open_source
from featcache.runtime import variables
from featcache.storage import files, manifest, picture_lists
from featcache.storage.files import files_of

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob, Plan
    from featcache.extraction.progress import ExtractProgress
    from featcache.runtime.meter import Counts

Say = Callable[[str], None]
Watch = Callable[[], AbstractContextManager["ExtractProgress"]]
Text = str | os.PathLike[str]
Pair = str | tuple[float, float]  # LOW,HIGH


@dataclass(frozen=True)
class ExtractResult:
    """Says what there is after an extraction; `facts` are plain JSON, all that --json prints."""

    # the folder, which in this process stands for the URL of one in an object store, that `facts`
    # has; None where the recipes of for_ read no cache
    cache: Path | None
    complete: bool  # every shard is there
    new_pictures: int  # of this call; of a dry run, those that it would extract
    facts: dict[str, Any] = field(repr=False)


def extract(
    *,
    teacher: str | Sequence[str] = (),
    for_: str | None = None,
    images: Text | None = None,
    labels: Text | None = None,
    image_member: str | None = None,
    out: Text | None = None,
    views: int = 1,
    levels: str | Sequence[str] | Sequence[int] = (),
    policy: Text = "default",
    size: int | None = None,
    scale: Pair | None = None,
    ratio: Pair | None = None,
    filter: Literal["bicubic", "bilinear", "lanczos", "area"] | None = None,
    flip: float | None = None,
    jitter: float | None = None,
    seed: int | None = None,
    order: Literal["attentive", "topk", "uniform"] | None = None,
    codec: Literal["fp16", "q8", "t4", "t3"] = "fp16",
    store: Literal["zarr", "webdataset"] = "zarr",
    tokens: Literal["raster", "ranked"] = "raster",
    keep: str | float | None = None,
    pixels: Literal["raw"] | None = None,
    decoder: Literal["pillow", "ffcv"] = "pillow",
    exif: bool = False,
    weights: Text | Sequence[Text] = (),
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    check_teacher: Text | None = None,
    rows_per_shard: int | str = "auto",
    batch_size: int = 32,
    workers: int = os.cpu_count() or 1,
    device: str | None = None,
    devices: str | None = None,
    shard: str | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    actors: str | int | None = None,
    gpus_per_actor: float | None = None,
    add: bool = False,
    append: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> ExtractResult:
    """Run a teacher over augmented views of pictures, and store its targets in a cache.

    Each keyword is the option of `featcache extract` of this name, with its meaning, range and
    default; `featcache extract --help` says them. `for_` is --for. Several teachers, levels or
    weights are a list of what is typed after each option: `levels=["last:5", "dino-b16=-1"]`;
    `levels=[8, 10, 12]` are blocks. A `batch_size` other than 32 is kept to, as one that is typed;
    32 leaves a cache the batch size that it was begun with. With `append` all that is left to its
    default is as in the cache. `progress` is called after every batch
    with a `Progress` of stage "extract", in pictures; what it raises ends the work in order, and
    the same call continues. Notes go to the logger "featcache".

    Raises UsageError for what cannot be meant, UserError where the work cannot be done,
    IdentityError where the cache is of other weights, pictures or views, and StoppedError after
    Ctrl-C; an OSError of the machine passes through.

    Examples:
        >>> import featcache
        >>> featcache.extract(teacher="synthetic", images="photos", workers=0)
        Traceback (most recent call last):
        ...
        featcache.errors.UsageError: Invalid value for workers: 0 is not in the range 1<=x<=4096.
    """
    given = dict(locals())  # the keywords, which are all there is yet
    callback = given.pop("progress") or api_progress.ignore
    values = keywords.read(extract_parameters.parameters(), given)
    options = ExtractOptions(**values, as_json=True)
    say = api_progress.log_to("featcache")
    facts, _ = carry_out(
        options,
        _watched(callback, say),
        say,
        keeps_batch=batch_size != 32,
    )
    cache = None if facts["cache"] is None else Path(facts["cache"])
    if cache is not None and files_of(cache.absolute()).may_be_far:
        facts["cache"] = files.address(cache)
    return ExtractResult(cache, facts["complete"], facts.get("new_pictures", 0), facts)


def _watched(callback: ProgressCallback, say: Say) -> Watch:
    """Return what gives a progress that calls back."""

    def report(now: ExtractProgress) -> None:
        callback(Progress("extract", now.there + now.pictures, now.there + now.total, now.rate))

    @contextmanager
    def watch() -> Iterator[ExtractProgress]:
        from featcache.extraction.progress import ExtractProgress

        yield ExtractProgress(report, WaitingNote(say), lambda text: say(f"note: {text}"))

    return watch


# --- the work, for the command too ----------------------------------------------------------------


def carry_out(
    options: ExtractOptions,
    watch: Watch,
    say: Say,
    *,
    keeps_batch: bool,
) -> tuple[dict[str, Any], str]:
    """Extract, or say with --dry-run what would be; return what is known afterwards, and the text
    of it.

    `watch` gives the progress while shards are made. `keeps_batch`: the batch size was asked for.
    """
    from featcache.models.precision import keep_freed_memory

    check_engine(options)
    choice = for_recipes.choose(options, say)
    options = choice.options
    if options.append:
        options = append_options.with_options_of_cache(options)
    if why := choice.nothing_to_extract:
        return {"cache": None, "complete": True, **choice.record}, why
    check_names(options)
    keep_freed_memory()
    plans, inputs = build_plans(options, say)
    if options.rows_per_shard == "auto" and not options.append:
        plans = with_shards(plans, options.out)
    for_recipes.check_plans(choice, plans)
    _note_random_weights(plans, say)
    if options.labelled is not None:
        _check_teachers(plans, options.labelled, inputs, options.batch_size, say)
    jobs = plan_jobs(plans, options)
    if not jobs:
        facts = {"cache": str(options.out), "new_pictures": 0, "complete": True, **choice.record}
        return facts, f"{options.out}: has all of this already; nothing to add"
    work = _Work(jobs, options, inputs.devices, watch, say, keeps_batch)
    return work.report(choice.record)


def _note_random_weights(plans: list[Plan], say: Say) -> None:
    from featcache.models.weights import is_random

    for plan in plans:
        if is_random(given := plan.teacher.weights):
            say(
                f"note: {given} - these weights are drawn, not trained; the features carry no "
                "meaning"
            )


def _check_teachers(
    plans: list[Plan], labelled: str, inputs: Inputs, batch_size: int, say: Say
) -> None:
    """Say a score before hours are spent; at chance level it is a UserError."""
    from featcache.extraction import teacher_check

    for plan in plans:
        found = teacher_check.check(plan.teacher, open_source(labelled), inputs.policy, batch_size)
        say(found.text)
        found.refuse()


@dataclass(frozen=True)
class _Work:
    """Holds what is to be extracted, and how it is told."""

    jobs: list[ExtractJob]
    options: ExtractOptions
    devices: list[str]
    watch: Watch
    say: Say
    keeps_batch: bool

    def report(self, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Preview the extraction with --dry-run; else run it and report what is there now."""
        from featcache.extraction.options import parse_share

        jobs, options = self.jobs, self.options
        share = parse_share(options.share)
        shards = jobs[0].plan.shards[share[0] :: share[1]]
        summary = extract_report.summary(jobs, options.out, shards)
        summary |= {
            "added": options.add,
            "appended": options.append,
            "share": options.share,
            **record,
        }
        if options.dry_run:
            summary |= extract_report.remaining_facts(jobs, shards)
            processes = len(self.devices)
            if options.engine != LOCAL:  # whose pace a batch of this machine's says nothing of
                summary["engine"], processes = options.engine, 0
            summary |= extract_report.cost_facts(
                jobs, summary, options.batch_size, options.workers, processes
            )
            return summary, extract_report.dry_run_text(summary, jobs[0].out)
        summary |= self._run(share, summary)
        if note := extract_report.exif_note(summary):
            self.say(note)
        return summary, extract_report.summary_text(summary, jobs)

    def _run(self, share: tuple[int, int], summary: dict[str, Any]) -> dict[str, Any]:
        """Extract on every device, and note it in the ledger; returns what is known afterwards."""
        from featcache.extraction import launcher

        facts = {**summary, "device": self.devices[0], "processes": len(self.devices)}
        facts |= {"batch_size": self._batch_size(), "workers": self.options.workers}
        facts["variables"] = variables.recorded()
        facts["options"] = config_file.given_options()
        if self.options.append:
            _, *before = picture_lists.ids(self.jobs[0].plan.manifest()["identity"])
            facts |= {"from_id": before[0]} if before else {}
        if self.options.engine != LOCAL:
            return self._run_engine(facts)
        self._begin()
        others: list[Counts] = []
        with account("extract", **facts) as line:
            try:
                with launcher.worker_processes(self.devices[1:], self._words()) as others:
                    found = self._extract(facts["batch_size"], share)
                line.update(found)
            finally:
                line["counted"] = 1 + len(others)
        return found

    def _begin(self) -> None:
        """Write the list of appended pictures into the manifest: nothing else is left to fail."""
        from featcache.extraction import append

        if self.options.append:
            append.begin(
                self.jobs[0],
                lambda: self.say(
                    f"note: waiting for another process that changes {self.jobs[0].out}"
                ),
            )

    def _run_engine(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Extract by the processes of an engine, and note it in the ledger."""
        from featcache.extraction.engine import EngineReport, EngineWork, get_engine

        options, done = self.options, EngineReport()
        facts |= {"engine": options.engine, "device": options.device or "of the cluster"}
        with account("extract", **facts) as line, self.watch() as progress:
            work = EngineWork(
                jobs=self.jobs,
                words=self._engine_words(),
                plan_again=plan_again,
                begin=self._begin,
                batch_size=facts["batch_size"],
                workers=options.workers,
                strict=options.strict,
                progress=progress,
                say=self.say,
            )
            try:
                get_engine(options.engine).run(work, engine_options(options), done)
            except KeyboardInterrupt:
                raise StoppedError(extract_report.stopped_text(self.jobs)) from None
            finally:
                line["counted"] = line["processes"] = 1 + done.processes
            found = extract_report.result(self.jobs, progress)
            line.update(found)
        return found

    def _engine_words(self) -> list[str]:
        """Return the options of a process on another machine: what this one was told by variables,
        or chose by itself, is said."""
        options, job = self.options, self.jobs[0]
        chosen = {
            "images_spec": require_images(options.images_spec),
            "out": files.address(options.out or job.out),
            "rows_per_shard": job.plan.rows_per_shard,
        }
        return self._words(**chosen)[1:]

    def _words(self, **chosen: Any) -> list[str]:
        """Return the command line of another process, for another device or of an engine, which
        repeats no check: what this process was started with may be another program's, or a
        file's."""
        values = {**vars(self.options), "recipes": None, "device": None, "devices": None}
        values |= {"engine": LOCAL, "address": None, "actors": None, "gpus_per_actor": None}
        values |= dict.fromkeys(("labelled", "batch_size", "labels", "image_member"))
        out = self.options.out
        if out is not None and files_of(out.absolute()).may_be_far:  # a folder of this process
            values["out"] = files.address(out)
        values |= chosen
        words = keywords.words(extract_parameters.parameters(), values)
        size = [f"--batch-size={self.options.batch_size}"] if self.keeps_batch else []
        return ["extract", *words, *size]

    def _batch_size(self) -> int:
        """Return the size that a cache was begun with, since a real network gives other bits at
        another; who asks for another size gets it, and is told."""
        from featcache.extraction.target_folder import recorded_batch_size

        out, asked = self.jobs[0].out, self.options.batch_size
        begun = (out / manifest.NAME).is_file()
        size = recorded_batch_size(manifest.read(out), asked) if begun else asked
        if size == asked or not self.keeps_batch:
            return size
        self.say(
            f"note: --batch-size {asked}: {out} was begun with {size}; the same numbers but for "
            "their last bits"
        )
        return asked

    def _extract(self, batch_size: int, share: tuple[int, int]) -> dict[str, Any]:
        from featcache.extraction import extract

        with self.watch() as progress:
            try:
                extract.run_jobs(
                    self.jobs,
                    batch_size=batch_size,
                    workers=self.options.workers,
                    strict=self.options.strict,
                    progress=progress,
                    share=share,
                )
            except KeyboardInterrupt:
                raise StoppedError(extract_report.stopped_text(self.jobs)) from None
        return extract_report.result(self.jobs, progress)
