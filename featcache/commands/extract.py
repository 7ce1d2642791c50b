"""`featcache extract`: the teacher, once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from featcache.catalog import home
from featcache.console import extract_report
from featcache.console import text as show
from featcache.console.params import FloatPair, require_images
from featcache.console.progress_bar import ProgressBar, WaitingNote
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.storage.store import STORES
from featcache.views import pixel_path
from featcache.views.policy import AREA, POLICIES, Policy, load_policy

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob, Plan
    from featcache.models.contract import Teacher


@click.command(
    epilog="\b\nExamples:\n"
    "  featcache extract --teacher clip-b16 --images train/ --views 4 --levels last:5\n"
    "  featcache extract --teacher clip-b16 --images 'train-{000000..001281}.tar' "
    "--weights ViT-B-16.safetensors\n"
    "  featcache extract --teacher clip-b16 --teacher dino-b16 --levels last:5 "
    "--levels dino-b16=-1 --images train/\n"
    "  featcache extract --teacher synthetic:levels=5,tokens=196,width=768 --images photos/ "
    "--out trial"
)
@click.option(
    "--teacher",
    "names",
    multiple=True,
    help="Name, or NAME,key=value,...; `featcache teachers` lists them. "
    "Several: one pass over the same views.",
)
@click.option(
    "--images",
    "images_spec",
    help="Folder of pictures, webdataset tars or .beton. [default: $FEATCACHE_IMAGES]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Cache folder. [default: $FEATCACHE_HOME/TEACHER-ID]",
)
@click.option(
    "--views",
    "view_count",
    type=click.IntRange(1),
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
    default="attentive",
    show_default=True,
    help="Stored mask order: attentive, topk or uniform.",
)
@click.option("--codec", default="fp16", show_default=True, help="How features are stored: fp16.")
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
    "--weights",
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
    metavar="LABELLED",
    help="First a k-NN score on these labelled pictures.",
)
@click.option(
    "--rows-per-shard",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Pictures in a shard, the unit of resuming, sharing and repair.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Views a teacher batch.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
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
def command(
    names: tuple[str, ...],
    images_spec: str | None,
    out: Path | None,
    view_count: int,
    levels: tuple[str, ...],
    policy_name: str,
    order: str,
    codec: str,
    store_name: str,
    tokens: str,
    keep: str | None,
    pixels: str | None,
    decoder: str,
    weights: tuple[str, ...],
    precision: str,
    compiled: bool,
    labelled: str | None,
    rows_per_shard: int,
    batch_size: int,
    workers: int,
    device: str | None,
    devices: str | None,
    share: str | None,
    add: bool,
    strict: bool,
    dry_run: bool,
    as_json: bool,
    **policy_options: Any,
) -> None:
    """Run TEACHER over augmented views of the pictures and store its targets. Killed, the same
    command continues."""
    from featcache.extraction import launcher, options
    from featcache.extraction import plan as plans
    from featcache.extraction.options import parse_keep
    from featcache.models import precision as running
    from featcache.models.weights import is_random
    from featcache.runtime.device import pick_device
    from featcache.views import pixel_path

    _check_names(names, order, codec)
    running.keep_freed_memory()
    level_of, weights_of = (
        options.per_teacher("--levels", levels, names),
        options.weights_per_teacher(weights, names),
    )
    renamed = {"filter_name": "filter"}
    changes = {
        renamed.get(key, key): value for key, value in policy_options.items() if value is not None
    }
    if decoder == "ffcv":
        changes.setdefault("filter", AREA)
    policy = load_policy(policy_name, **changes)
    source = pixel_path.open_with_decoder(require_images(images_spec), decoder)
    pixel_path.check_filter(pixel_path.pixel_path(source), policy.filter)
    if device and devices:
        raise UsageError(
            f"--device {device} and --devices {devices}: one of them is allowed; leave one out"
        )
    each_device = launcher.parse_devices(devices) if devices else []
    device = each_device[0] if each_device else pick_device(device)

    def plan(name: str) -> Plan:
        teacher = options.load_teacher(name, weights_of[name], device, precision, compiled)
        return plans.Plan(
            source=source,
            teacher=teacher,
            policy=policy,
            views=view_count,
            levels=options.levels_of_teacher(level_of[name], teacher),
            order=order,
            codec=codec,
            store=store_name,
            rows_per_shard=rows_per_shard,
            tokens=tokens,
            keep=parse_keep(keep, teacher.patches),
            pixels=pixels is not None,
        )

    asked = [plan(name) for name in names]
    for each in asked:
        if is_random(given := each.teacher.weights):
            click.echo(
                f"note: {given} - these weights are drawn, not trained; the features carry no "
                "meaning",
                err=True,
            )
    if labelled is not None:
        for each in asked:
            _check_teacher(each.teacher, labelled, policy, batch_size)
    jobs = _jobs(asked, out, add)
    if not jobs:
        text = f"{out}: has all of this already; nothing to add"
        show.print_facts({"cache": str(out), "new_pictures": 0, "complete": True}, as_json, text)
        return
    own = _share(share)
    shards = jobs[0].plan.shards[own[0] :: own[1]]
    summary = extract_report.summary(jobs, out, shards) | {"added": add, "share": share}
    if dry_run:
        summary |= extract_report.remaining_facts(jobs, shards)
        show.print_facts(summary, as_json, extract_report.dry_run_text(summary, jobs[0].out))
        return
    batch_size = _batch_size(jobs[0].out, batch_size)
    with launcher.worker_processes(each_device[1:]):
        summary.update(_extract(jobs, batch_size, workers, strict, own))
    noted = {**summary, "cache": os.path.abspath(summary["cache"])}  # noqa: PTH100 (the ledger is read elsewhere)
    home.log_run(command="extract", batch_size=batch_size, workers=workers, device=device, **noted)
    show.print_facts(summary, as_json, extract_report.summary_text(summary))


def _check_names(names: tuple[str, ...], order: str, codec: str) -> None:
    """Unknown names are told before anything is read."""
    from featcache import teachers
    from featcache.models.spec import split_spec
    from featcache.targets import codecs
    from featcache.targets.attention import ORDERS

    if not names:
        raise UsageError(
            f"no teacher given: --teacher is one of {', '.join(teachers.rows())}, or timm:NAME"
        )
    for option, value, known in (("--order", order, ORDERS), ("--codec", codec, codecs.CODECS)):
        if value not in known:
            raise UsageError(f"{option} {value!r}: {', '.join(known)} are allowed")
    for name in names:
        teachers.family(split_spec(name)[0])


def _check_teacher(teacher: Teacher, labelled: str, policy: Policy, batch_size: int) -> None:
    """A score before hours are spent; at chance level it is a UserError."""
    from featcache.extraction import teacher_check

    found = teacher_check.check(teacher, open_source(labelled), policy, batch_size)
    click.echo(found.text, err=True)
    found.refuse()


def _jobs(asked: list[Plan], out: Path | None, add: bool) -> list[ExtractJob]:
    """What is to be extracted, and into which folders; nothing where there is nothing to add."""
    from featcache.extraction import extend
    from featcache.extraction.options import file_name

    if add and out is None:
        raise UsageError("--add adds to a cache: name it with --out CACHE")
    first = asked[0]
    place = out or home.home() / f"{file_name(first.teacher.name)}-{first.manifest()['id'][:8]}"
    return extend.plan_jobs(asked, place, add=add)


def _batch_size(out: Path, asked: int) -> int:
    """What was begun goes on in batches of the size it was begun with, since a real network gives
    other bits at another; who asks for another size gets it, and is told."""
    size = (
        manifest.read(out)["provenance"]["batch_size"] if (out / manifest.NAME).is_file() else asked
    )
    source = click.get_current_context().get_parameter_source("batch_size")
    if size == asked or source is not ParameterSource.COMMANDLINE:
        return int(size)
    click.echo(
        f"note: --batch-size {asked}: {out} was begun with {size}; the same numbers but for their "
        "last bits",
        err=True,
    )
    return asked


def _share(text: str | None) -> tuple[int, int]:
    """'2/8' -> (2, 8).

    >>> _share("2/8"), _share(None)
    ((2, 8), (0, 1))
    """
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--shard {text!r}: I/N with I from 0 to N - 1 is needed, such as "
            "$SLURM_ARRAY_TASK_ID/8"
        )
    return int(index), int(count)


def _extract(
    jobs: list[ExtractJob], batch_size: int, workers: int, strict: bool, share: tuple[int, int]
) -> dict[str, Any]:
    from featcache.extraction import extract
    from featcache.extraction.progress import ExtractProgress

    bar = ProgressBar("extract", "pictures")
    progress = ExtractProgress()
    progress.report = lambda now: bar(now.pictures, now.total)
    bar.text = lambda done, total: extract_report.rate_text(progress)
    progress.waiting = WaitingNote()
    try:
        extract.run_jobs(
            jobs,
            batch_size=batch_size,
            workers=workers,
            strict=strict,
            progress=progress,
            share=share,
        )
    except KeyboardInterrupt:
        raise UserError(extract_report.stopped_text(jobs)) from None
    finally:
        bar.close()
    with Cache(jobs[0].out) as cache:
        return {
            "rows": len(cache),
            "complete": not any(extract_report.unfinished_shards(job) for job in jobs),
            "new_pictures": progress.pictures,
            "quarantined": cache.quarantined,
            "pictures_per_s": round(progress.rate, 2),
            "slowest": progress.slowest,
        }
