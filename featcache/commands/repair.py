"""`featcache repair` restores damaged files and extracts bad shards again, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.catalog import extract_command
from featcache.catalog.account import account
from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import THREADS, CachePath, LocalText
from featcache.console.picture_options import with_pictures
from featcache.console.progress_bar import ProgressBar
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.views import pixel_path

if TYPE_CHECKING:
    from featcache.models.contract import Teacher


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Fix what is damaged in a cache.",
    epilog="Examples:\n\n  featcache repair caches/clip-b16-1a2b3c4d\n\n"
    "  featcache repair caches/clip-b16-1a2b3c4d --images /mnt/other/train "
    "--weights ViT-B-16.safetensors",
)
@click.argument("cache", type=CachePath())
@with_pictures(
    "images_spec",
    group=HelpGroup.INPUT,
    help="The pictures. [default: where they were at extraction]",
    variable=False,
)
@option(
    "--weights",
    group=HelpGroup.TEACHER,
    type=LocalText(),
    help="The teacher's weights. [default: as at extraction]",
)
@option(
    "--teacher",
    "named",
    group=HelpGroup.TEACHER,
    multiple=True,
    metavar="SPEC",
    help="The teacher, where it is a file of your own: a cache chooses no code and no file.",
)
@option(
    "--parent",
    group=HelpGroup.INPUT,
    type=CachePath(),
    help="Of a derived cache: the one it was derived from. [default: where it was then]",
)
@option(
    "--workers",
    group=HelpGroup.RUNNING,
    type=THREADS,
    default=2,
    show_default=True,
    help="Decoding threads.",
)
@option(
    "--device", group=HelpGroup.RUNNING, help="cpu, cuda, ... [default: cuda where there is one]"
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print what was done as JSON."
)
def command(
    cache: Path,
    images_spec: str | None,
    weights: str | None,
    named: tuple[str, ...],
    parent: Path | None,
    workers: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Find what is damaged in CACHE and fix it: files from their copies, bad shards by the teacher,
    those of a derived cache from the one it was derived from."""
    from featcache.extraction.progress import ExtractProgress
    from featcache.maintenance import repair

    def load(about: dict[str, Any]) -> tuple[Source, Teacher]:
        return (
            _pictures(cache, about, images_spec),
            _teacher(cache, about, weights, named, device),
        )

    bar = ProgressBar("repair", "pictures")
    progress = ExtractProgress(lambda now: bar(now.pictures, now.total))
    find = repair.recorded_parent if parent is None else (lambda about: parent)
    with account("repair", cache=cache) as line:
        done = repair.run(cache, load, parent=find, workers=workers, progress=progress)
        line.update({name: len(each) for name, each in done.items()})
    bar.close()
    lines = [f"restored {name}" for name in done["restored"]] + [
        f"made again {name}" for name in done["shards"]
    ]
    text.print_facts(
        {"cache": str(cache), **done}, as_json, text.join_lines(lines) or f"{cache}: nothing to fix"
    )


def _pictures(cache: Path, about: dict[str, Any], given: str | None) -> Source:
    """Open the pictures of a manifest, or others that are given, as they were decoded then."""
    wanted = about["identity"]["pixel_path"]
    source = open_source(given or extract_command.recorded_pictures(about))
    source = pixel_path.match_decoder(source, wanted)
    pixel_path.check_pixel_path(source, wanted, f"cache {str(cache)!r}")
    return source


def _teacher(
    cache: Path,
    about: dict[str, Any],
    weights: str | None,
    named: tuple[str, ...],
    device: str | None,
) -> Teacher:
    """Load the teacher of a manifest, to be run as it was run then."""
    from featcache import teachers
    from featcache.models import precision
    from featcache.runtime.device import pick_device

    name, given = about["identity"]["teacher"]["name"], weights or about["provenance"]["weights"]
    spec = teachers.recorded_spec(name, named, f"cache {str(cache)!r}", "--teacher")
    teacher = teachers.load_any(spec, given, pick_device(device))
    teacher.name = name  # wherever the user's file lies now, it is the cache's teacher by its hash
    return precision.configure_like(teacher, about["identity"])
