"""`featcache extract` runs a teacher once over the views of pictures, and stores its targets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from featcache.catalog import home
from featcache.console import extract_report, for_recipes
from featcache.console.extract_options import ExtractOptions, Inputs, build_plans, check_names
from featcache.console.params import BATCH, COUNT, THREADS, FloatPair, LocalPath, LocalText
from featcache.console.progress_bar import ProgressBar, WaitingNote
from featcache.console.text import echo, print_facts
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from featcache.runtime import variables
from featcache.storage import manifest
from featcache.storage.store import STORES
from featcache.views import pixel_path
from featcache.views.policy import POLICIES

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob, Plan
    from featcache.extraction.progress import ExtractProgress


@click.command(
    epilog="\b\nExamples:\n"
    "  featcache extract --teacher clip-b16 --images train/ --views 4 --levels last:5\n"
    "  featcache extract --teacher clip-b16 --images 'train-{000000..001281}.tar' "
    "--weights ViT-B-16.safetensors\n"
    "  featcache extract --teacher clip-b16 --teacher dino-b16 --levels last:5 "
    "--levels dino-b16=-1 --images train/\n"
    "  featcache extract --for maskalign,mrmae --images train/ --views 4\n"
    "  featcache extract --teacher synthetic:levels=5,tokens=196,width=768 --images photos/ "
    "--out trial"
)
@click.option(
    "--teacher",
    "names",
    type=LocalText(),
    multiple=True,
    help="Name, or NAME,key=value,...; `featcache teachers` lists them. "
    "Several: one pass over the same views.",
)
@click.option(
    "--for",
    "recipes",
    type=LocalText(),
    metavar="RECIPE[,RECIPE]",
    help="Make what these recipes read by default, where no other option says it: --teacher, "
    "--levels, --size, --scale, --jitter. A name, or your own ./mine.py.",
)
@click.option(
    "--images",
    "images_spec",
    type=LocalText(),
    help="Folder of pictures, webdataset tars or .beton. [default: $FEATCACHE_IMAGES]",
)
@click.option(
    "--out",
    type=LocalPath(),
    help="Cache folder. [default: $FEATCACHE_HOME/TEACHER-ID]",
)
@click.option(
    "--views",
    "view_count",
    type=COUNT,
    default=1,
    show_default=True,
    help="Views drawn of each picture.",
)
@click.option(
    "--levels",
    multiple=True,
    help="Blocks to store: last:N, a list such as 8,10,12 or -1,-3 from the end, or all; "
    "TEACHER=... for one. [default: last:5]",
)
@click.option(
    "--policy",
    "policy_name",
    type=LocalText(),
    default="default",
    show_default=True,
    help=f"How views are drawn: {', '.join(POLICIES)} or a .json file.",
)
@click.option("--size", type=int, help="Pixels of a view, a side. [default: the policy's, 224]")
@click.option(
    "--scale",
    type=FloatPair(),
    help="Share of the picture's area in a view. [default: the policy's, 0.2,1]",
)
@click.option(
    "--ratio", type=FloatPair(), help="Width / height of a view. [default: the policy's, 3/4,4/3]"
)
@click.option(
    "--filter",
    "filter_name",
    help="bicubic, bilinear or lanczos; area with FFCV. [default: the policy's, bicubic]",
)
@click.option(
    "--flip", type=float, help="Probability of a mirrored view. [default: the policy's, 0.5]"
)
@click.option(
    "--jitter",
    type=float,
    help="Largest change of brightness, contrast, saturation. [default: the policy's, 0]",
)
@click.option("--seed", type=int, help="Seed of the views. [default: the policy's, 0]")
@click.option(
    "--order",
    help="Stored mask order: attentive, topk or uniform. [default: attentive; uniform for a "
    "teacher without attention]",
)
@click.option(
    "--codec",
    default="fp16",
    show_default=True,
    help="How features are stored: fp16, or q8, t4, t3 of 8, 4, 3 bits.",
)
@click.option(
    "--store",
    "store_name",
    type=click.Choice(list(STORES)),
    default="zarr",
    show_default=True,
    help="Zarr v3 arrays, or tars.",
)
@click.option(
    "--tokens",
    default="raster",
    show_default=True,
    help="Order of patches: raster, as in the picture; ranked, in mask order, "
    "of which the first can be read or kept.",
)
@click.option(
    "--keep",
    help="With --tokens ranked: store only the first N patches of a view, or a share such as 0.3.",
)
@click.option(
    "--pixels",
    type=click.Choice(["raw"]),
    help="raw: store the rendered views, so training decodes nothing.",
)
@click.option(
    "--decoder",
    type=click.Choice(pixel_path.DECODERS),
    default="pillow",
    show_default=True,
    help="ffcv: a .beton through FFCV's own decode and resize: other pixels than Pillow's. "
    "Training does the same.",
)
@click.option(
    "--exif",
    is_flag=True,
    help="Turn pictures as their EXIF orientation says, which is ignored otherwise. Training does "
    "the same.",
)
@click.option(
    "--weights",
    type=LocalText(),
    multiple=True,
    help="FILE, a tag, or random:SEED for a trial; TEACHER=... for one. "
    "[default: the pretrained ones]",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="Of the teacher: fp32, or autocast to bf16 or fp16, or tf32.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="torch.compile the teacher: minutes first, then faster.",
)
@click.option(
    "--check-teacher",
    "labelled",
    type=LocalText(),
    metavar="LABELLED",
    help="First a k-NN score on these labelled pictures.",
)
@click.option(
    "--rows-per-shard",
    type=COUNT,
    default=1024,
    show_default=True,
    help="Pictures in a shard, the unit of resuming, sharing and repair.",
)
@click.option(
    "--batch-size",
    type=BATCH,
    default=32,
    show_default=True,
    help="Views a teacher batch.",
)
@click.option(
    "--workers",
    type=THREADS,
    default=os.cpu_count() or 1,
    help="Decoding threads. [default: cores]",
)
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")
@click.option(
    "--devices", help="all, or a list such as cuda:0,cuda:1: one process each, on one cache."
)
@click.option(
    "--shard", "share", help="I/N: only shards I, I + N, ...; I counts from 0. For job arrays."
)
@click.option(
    "--add", is_flag=True, help="Add views, levels or a second teacher to the cache at --out."
)
@click.option("--strict", is_flag=True, help="Stop at the first picture that cannot be used.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(**given: Any) -> None:
    """Run TEACHER over augmented views of the pictures and store its targets. Killed, the same
    command continues."""
    from featcache.models.precision import keep_freed_memory

    choice = for_recipes.choose(ExtractOptions(**given))
    options = choice.options
    if why := choice.nothing_to_extract:
        print_facts({"cache": None, "complete": True, **choice.record}, options.as_json, why)
        return
    check_names(options)
    keep_freed_memory()
    plans, inputs = build_plans(options)
    for_recipes.check_plans(choice, plans)
    _note_random_weights(plans)
    if options.labelled is not None:
        _check_teachers(plans, options.labelled, inputs, options.batch_size)
    jobs = _plan_jobs(plans, options)
    if jobs:
        _carry_out(jobs, options, inputs.devices, choice.record)
    else:
        text = f"{options.out}: has all of this already; nothing to add"
        facts = {"cache": str(options.out), "new_pictures": 0, "complete": True, **choice.record}
        print_facts(facts, options.as_json, text)


def _note_random_weights(plans: list[Plan]) -> None:
    from featcache.models.weights import is_random

    for plan in plans:
        if is_random(given := plan.teacher.weights):
            echo(
                f"note: {given} - these weights are drawn, not trained; the features carry no "
                "meaning",
                err=True,
            )


def _check_teachers(plans: list[Plan], labelled: str, inputs: Inputs, batch_size: int) -> None:
    """Print a score before hours are spent; at chance level it is a UserError."""
    from featcache.extraction import teacher_check

    for plan in plans:
        found = teacher_check.check(plan.teacher, open_source(labelled), inputs.policy, batch_size)
        echo(found.text, err=True)
        found.refuse()


def _plan_jobs(plans: list[Plan], options: ExtractOptions) -> list[ExtractJob]:
    """Return what is to be extracted and the folders it goes to; nothing where there is nothing to
    add."""
    from featcache.extraction import extend
    from featcache.extraction.options import file_name

    if options.add and options.out is None:
        raise UsageError("--add adds to a cache: name it with --out CACHE")
    name = f"{file_name(plans[0].teacher.name)}-{plans[0].manifest()['id'][:8]}"
    return extend.plan_jobs(plans, options.out or home.home() / name, add=options.add)


def _carry_out(
    jobs: list[ExtractJob], options: ExtractOptions, devices: list[str], record: dict[str, Any]
) -> None:
    """Preview the extraction with --dry-run; else run it and report what is there now."""
    from featcache.extraction.options import parse_share

    share = parse_share(options.share)
    shards = jobs[0].plan.shards[share[0] :: share[1]]
    summary = extract_report.summary(jobs, options.out, shards)
    summary |= {"added": options.add, "share": options.share, **record}
    if options.dry_run:
        summary |= extract_report.remaining_facts(jobs, shards)
        text = extract_report.dry_run_text(summary, jobs[0].out)
    else:
        summary |= _run(jobs, options, share, devices, summary)
        if note := extract_report.exif_note(summary):
            echo(note, err=True)
        text = extract_report.summary_text(summary, jobs)
    print_facts(summary, options.as_json, text)


def _run(
    jobs: list[ExtractJob],
    options: ExtractOptions,
    share: tuple[int, int],
    devices: list[str],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Extract on every device, and note it in the ledger; returns what is known afterwards."""
    from featcache.extraction import launcher

    batch_size = _batch_size(jobs[0].out, options.batch_size)
    with launcher.worker_processes(devices[1:]):
        found = _extract(jobs, batch_size, options, share)
    noted = {**summary, **found, "batch_size": batch_size, "workers": options.workers}
    noted["variables"] = variables.recorded()
    noted["cache"] = os.path.abspath(summary["cache"])  # noqa: PTH100 (the ledger is read elsewhere)
    home.log_run(command="extract", device=devices[0], **noted)
    return found


def _batch_size(out: Path, asked: int) -> int:
    """Return the size that a cache was begun with, since a real network gives other bits at
    another; who asks for another size gets it, and is told."""
    from featcache.extraction.target_folder import recorded_batch_size

    begun = (out / manifest.NAME).is_file()
    size = recorded_batch_size(manifest.read(out), asked) if begun else asked
    source = click.get_current_context().get_parameter_source("batch_size")
    if size == asked or source is not ParameterSource.COMMANDLINE:
        return size
    echo(
        f"note: --batch-size {asked}: {out} was begun with {size}; the same numbers but for their "
        "last bits",
        err=True,
    )
    return asked


def _extract(
    jobs: list[ExtractJob], batch_size: int, options: ExtractOptions, share: tuple[int, int]
) -> dict[str, Any]:
    from featcache.extraction import extract

    bar = ProgressBar("extract", "pictures")
    progress = _shown_progress(bar)
    try:
        extract.run_jobs(
            jobs,
            batch_size=batch_size,
            workers=options.workers,
            strict=options.strict,
            progress=progress,
            share=share,
        )
    except KeyboardInterrupt:
        raise UserError(extract_report.stopped_text(jobs)) from None
    finally:
        bar.close()
    return extract_report.result(jobs, progress)


def _shown_progress(bar: ProgressBar) -> ExtractProgress:
    from featcache.extraction.progress import ExtractProgress

    progress = ExtractProgress(
        lambda now: bar(now.pictures, now.total),
        WaitingNote(),
        lambda text: echo(f"note: {text}", err=True),
    )
    bar.text = lambda done, total: extract_report.rate_text(progress)
    return progress
