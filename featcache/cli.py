"""The `featcache` command: extract, info, verify, teachers.

Options are read here and nothing is computed here. Torch is imported only by the commands that run a teacher.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache import home, images, manifest, views
from featcache.errors import COMMAND_WRONG, WORK_FAILED, UsageError, UserError
from featcache.reader import Cache
from featcache.store import STORES

if TYPE_CHECKING:
    from featcache.extract import Progress
    from featcache.plan import Plan


LOG_EVERY_S = 30.0  # between two lines of progress where stderr is no terminal


def entry(command: click.Command) -> None:
    """Run a command: a user's mistake is one line on stderr and exit status 1 or 2, never a traceback."""
    warnings.filterwarnings("ignore", module="PIL")  # on odd but readable pictures; unreadable ones are quarantined
    try:
        command.main(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error), error.exit_status))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(COMMAND_WRONG)
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        sys.exit(_fail(" ".join(error.format_message().split()) + where, COMMAND_WRONG))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message(), WORK_FAILED))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("stopped; what was complete is kept, the same command continues", WORK_FAILED))
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(_fail(f"{error.filename or 'system'}: {error.strerror}; mend this and run the same command again", 1))


def _fail(message: str, status: int) -> int:
    click.echo(f"error: {message}", err=True)
    return status


class Pair(click.ParamType):
    """Two numbers parted by a comma, fractions allowed: 0.2,1 or 3/4,4/3."""

    name = "LOW,HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            low, high = (_number(part) for part in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(
                f"{value!r} given; two numbers parted by a comma are needed, such as 0.2,1 or 3/4,4/3", param, ctx
            )
        return low, high


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def given_images(spec: str | None) -> str:
    """--images, or FEATCACHE_IMAGES, or one line that says what may be given."""
    spec = spec or os.environ.get("FEATCACHE_IMAGES")
    if not spec:
        raise UsageError(f"no pictures given: --images SRC is {images.ALLOWED}; FEATCACHE_IMAGES sets a default")
    return spec


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="featcache")
def cli() -> None:
    """Run a frozen teacher once over replayable augmented views; keep what students learn from in open formats."""


def main() -> None:
    entry(cli)


@cli.command(
    epilog="Examples:\n\n  featcache extract --teacher clip-b16 --images train/ --views 4 --levels last:5\n\n"
    "  featcache extract --teacher clip-b16 --images 'train-{000000..001281}.tar' --weights ViT-B-16.safetensors\n\n"
    "  featcache extract --teacher synthetic:levels=5,tokens=196,width=768 --images photos/ --out trial"
)
@click.option("--teacher", "teacher_name", help="Name, or NAME,key=value,...; `featcache teachers` lists them.")
@click.option("--images", "images_spec", help="Folder of pictures or webdataset tars. [default: $FEATCACHE_IMAGES]")
@click.option("--out", type=click.Path(path_type=Path), help="Cache folder. [default: $FEATCACHE_HOME/TEACHER-ID]")
@click.option("--views", "view_count", type=click.IntRange(1), default=1, show_default=True, help="Views a picture.")
@click.option("--levels", default="last:5", show_default=True, help="last:N, a list such as 8,10,12, or all.")
@click.option(
    "--policy", "policy_name", default="default", show_default=True, help="Named view policy or a .json file."
)
@click.option("--size", type=int, help="Pixels of a view. [policy: 224]")
@click.option("--scale", type=Pair(), help="Area fraction LOW,HIGH. [policy: 0.2,1]")
@click.option("--ratio", type=Pair(), help="Width / height LOW,HIGH. [policy: 3/4,4/3]")
@click.option("--filter", "filter_name", help="bicubic, bilinear or lanczos. [policy: bicubic]")
@click.option("--flip", type=float, help="Probability of a mirrored view. [policy: 0.5]")
@click.option("--jitter", type=float, help="Largest change of brightness, contrast, saturation. [policy: 0]")
@click.option("--seed", type=int, help="Seed of the views. [policy: 0]")
@click.option("--order", default="attentive", show_default=True, help="Stored mask order: attentive, topk or uniform.")
@click.option("--codec", default="fp16", show_default=True, help="How features are stored.")
@click.option("--store", "store_name", type=click.Choice(list(STORES)), default="zarr", show_default=True)
@click.option("--weights", help="FILE, a tag, or random:SEED. [default: the registered pretrained tag]")
@click.option("--rows-per-shard", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Views a teacher batch.")
@click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count() or 1, help="Decoding threads. [default: cores]"
)
@click.option("--device", help="cpu, cuda, cuda:1, ... [default: cuda where there is one]")
@click.option("--strict", is_flag=True, help="Stop at the first picture that cannot be used.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def extract(
    teacher_name: str | None,
    images_spec: str | None,
    out: Path | None,
    view_count: int,
    levels: str,
    policy_name: str,
    order: str,
    codec: str,
    store_name: str,
    weights: str | None,
    rows_per_shard: int,
    batch_size: int,
    workers: int,
    device: str | None,
    strict: bool,
    dry_run: bool,
    as_json: bool,
    **policy_options: Any,
) -> None:
    """Run TEACHER over augmented views of the pictures and store its targets. Killed, the same command continues."""
    from featcache import codecs, targets, teachers
    from featcache import plan as plans
    from featcache.device import pick_device

    if teacher_name is None:
        raise UsageError(f"no teacher given: --teacher is one of {', '.join(teachers.rows())}, or timm:NAME")
    for option, value, known in (("--order", order, targets.ORDERS), ("--codec", codec, codecs.CODECS)):
        if value not in known:
            raise UsageError(f"{option} {value!r}: {', '.join(known)} are allowed")
    teachers.family(teachers.split(teacher_name)[0])  # an unknown name is told before anything is read
    names = {"filter_name": "filter"}
    changes = {names.get(key, key): value for key, value in policy_options.items() if value is not None}
    policy = views.policy(policy_name, **changes)
    source = images.open_source(given_images(images_spec))
    teacher = teachers.load(teacher_name, weights, pick_device(device))
    chosen = plans.parse_levels(levels, teacher.depth)
    plan = plans.Plan(source, teacher, policy, view_count, chosen, order, codec, store_name, rows_per_shard)
    about = plan.manifest()
    out = out or home.home() / f"{plans.file_name(teacher_name)}-{about['id'][:8]}"
    if manifest.is_random(about):
        click.echo(f"note: {weights} - these weights are drawn, not trained; the features carry no meaning", err=True)
    summary = {"cache": str(out), "id": about["id"], "pictures": len(source), "views": view_count, "levels": chosen}
    summary["bytes"] = plan.view_bytes * view_count * len(source)
    if dry_run:
        _show(summary, as_json, f"would write {_size(summary['bytes'])} in {len(plan.shards)} shards to {out}")
        return
    summary.update(_extract(plan, out, batch_size, workers, strict))
    home.note_run(command="extract", batch_size=batch_size, workers=workers, device=pick_device(device), **summary)
    _show(summary, as_json, _story(summary))


def _extract(plan: Plan, out: Path, batch_size: int, workers: int, strict: bool) -> dict[str, Any]:
    from tqdm import tqdm

    from featcache import extract as work

    terminal = sys.stderr.isatty()
    told = time.monotonic()
    with tqdm(unit="picture", disable=not terminal, dynamic_ncols=True) as bar:

        def report(progress: Progress) -> None:
            nonlocal told
            bar.total = progress.total
            bar.set_postfix_str(f"slowest: {progress.slowest}", refresh=False)
            bar.update(progress.pictures - bar.n)
            if not terminal and time.monotonic() - told > LOG_EVERY_S:  # a line now and then for a job's log
                told = time.monotonic()
                click.echo(_progress_line(progress), err=True)

        progress = work.Progress(report)
        work.run(plan, out, batch_size=batch_size, workers=workers, strict=strict, progress=progress)
    with Cache(out) as cache:
        return {
            "rows": len(cache),
            "new_pictures": progress.pictures,
            "quarantined": cache.quarantined,
            "pictures_per_s": round(progress.rate, 2),
            "slowest": progress.slowest,
        }


def _progress_line(progress: Progress) -> str:
    left = (progress.total - progress.pictures) / max(progress.rate, 1e-9)
    eta = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
    return (
        f"{progress.pictures} of {progress.total} pictures, {progress.rate:.1f} pictures/s, ETA {eta}, "
        f"slowest: {progress.slowest}"
    )


def _story(summary: dict[str, Any]) -> str:
    lines = [f"{summary['cache']}: {summary['rows']} pictures x {summary['views']} views, {_size(summary['bytes'])}"]
    if summary["new_pictures"]:
        lines.append(f"{summary['pictures_per_s']} pictures/s, slowest stage: {summary['slowest']}")
    else:
        lines.append("was complete already; nothing to do")
    for row in summary["quarantined"][:10]:
        lines.append(f"quarantined {row['key']!r}: {row['reason']}")
    if summary["quarantined"]:
        lines.append(
            f"{len(summary['quarantined'])} in quarantine, all listed in {summary['cache']}/quarantine.json; "
            "mended pictures come in with a new --out"
        )
    return "\n".join(lines)


def _show(facts: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(facts) if as_json else text)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@cli.command(epilog="Example:\n\n  featcache info caches/clip-b16-1a2b3c4d --json")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(cache: Path, as_json: bool) -> None:
    """Identity, completeness, sizes and value ranges of CACHE."""
    with Cache(cache) as opened:
        facts = describe(opened)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(manifest.title(opened.manifest))
    click.echo(f"{facts['shards_complete']} of {facts['shards']} shards, {facts['rows']} rows, {_size(facts['bytes'])}")
    policy = facts["identity"]["policy"]
    click.echo("views: " + ", ".join(f"{key} {value}" for key, value in policy.items()))
    for name, array in facts["arrays"].items():
        span = array["range"]
        shown = f"  {span[0]:.6g} to {span[1]:.6g}" if span and name not in ("pixel_hash", "row_crc") else ""
        click.echo(f"  {name:14} {array['dtype']:4} {array['shape']!s:28}{shown}")
    for row in facts["quarantined"][:10]:
        click.echo(f"quarantined {row['key']!r}: {row['reason']}")
    if not opened.complete:
        click.echo("incomplete: run the same `featcache extract` again to finish it")


def describe(cache: Cache) -> dict[str, Any]:
    """All facts of `featcache info` as plain data."""
    ranges: dict[str, list[float]] = {}
    for record in cache.records:
        for name, (low, high) in record["ranges"].items():
            before = ranges.get(name, [low, high])
            ranges[name] = [min(before[0], low), max(before[1], high)]
    arrays = {
        name: {
            "dtype": spec.dtype,
            "shape": [len(cache), *([cache.views] if spec.per_view else []), *spec.item],
            "range": ranges.get(name),
        }
        for name, spec in cache.arrays.items()
        if name in cache.fields
    }
    return {
        "id": cache.manifest["id"],
        "identity": cache.identity,
        "provenance": cache.manifest["provenance"],
        "random_weights": manifest.is_random(cache.manifest),
        "complete": cache.complete,
        "shards": len(cache.manifest["shards"]),
        "shards_complete": len(cache.records),
        "rows": len(cache),
        "bytes": sum(file["bytes"] for record in cache.records for file in record["files"].values()),
        "arrays": arrays,
        "quarantined": cache.quarantined,
    }


@cli.command(
    epilog="Examples:\n\n  featcache verify caches/clip-b16-1a2b3c4d\n\n"
    "  featcache verify caches/clip-b16-1a2b3c4d --recompute 64 --images train/"
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--recompute", type=click.IntRange(0), default=0, help="Also run the teacher on N random rows.")
@click.option("--images", "images_spec", help="The pictures. [default: where they were at extraction]")
@click.option("--weights", help="The teacher's weights. [default: as at extraction]")
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows are recomputed.")
@click.option("--device", help="cpu, cuda, ... [default: cuda where there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(
    cache: Path,
    recompute: int,
    images_spec: str | None,
    weights: str | None,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Check every byte of CACHE against its checksums; with --recompute, rows against the teacher."""
    from featcache import verify as work
    from featcache.device import pick_device

    problems, shards = work.files(cache)
    facts: dict[str, Any] = {"cache": str(cache), "shards": shards, "problems": problems}
    if recompute and not problems:
        with Cache(cache) as opened:
            source = images.open_source(images_spec or opened.manifest["provenance"]["source"])
            facts["recompute"] = work.recompute(opened, source, weights, recompute, seed, pick_device(device))
        problems += facts["recompute"]["problems"]
    _show(facts, as_json, "\n".join([*problems, _verdict(facts)]))
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {cache}, the first: {problems[0]}")


def _verdict(facts: dict[str, Any]) -> str:
    lines = [f"{facts['shards']} shards checked, {len(facts['problems'])} problems"]
    if again := facts.get("recompute"):
        lines.append(
            f"{again['rows']} rows recomputed: features within {again['feature_error']:.1e} per token, "
            f"attention within {again['attention_error']:.1e}"
        )
        if again["bad_rows_below"] is not None:
            lines.append(
                f"a clean sample of {again['rows']} rows: at 95 % confidence at most {again['bad_rows_below']:.1%} of "
                "all rows are bad; a larger --recompute N narrows this"
            )
    return "\n".join(lines)


@cli.command(epilog="Example:\n\n  featcache teachers --json")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def teachers(as_json: bool) -> None:
    """The teachers known by name; timm:NAME adds any timm VisionTransformer with a [CLS] token."""
    from featcache import teachers as known

    table = [
        {
            "name": name,
            "source": row.source,
            "input_px": row.input_px,
            "patches": row.patches,
            "width": row.width,
            "depth": row.depth,
            "bytes_a_view_last5_fp16": 5 * (row.patches + 1) * row.width * 2,
        }
        for name, row in known.rows().items()
    ]
    if as_json:
        click.echo(json.dumps(table, indent=1))
        return
    click.echo(f"{'name':12}{'input':>6}{'patches':>8}{'width':>6}{'depth':>6}{'bytes/view':>12}  weights")
    for fact in table:
        click.echo(
            f"{fact['name']:12}{fact['input_px']:6}{fact['patches']:8}{fact['width']:6}{fact['depth']:6}"
            f"{fact['bytes_a_view_last5_fp16']:12,}  {fact['source']}"
        )
    click.echo(
        "bytes/view: five levels in fp16. Also timm:NAME[,key=value...] and synthetic:levels=..,tokens=..,width=.."
    )
