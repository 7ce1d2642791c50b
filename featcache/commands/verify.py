"""`featcache verify` compares every byte of a cache with its checksum, and rows with the
teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.catalog import extract_command
from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import SEED, CachePath, LocalText
from featcache.console.picture_options import with_pictures
from featcache.console.progress_bar import ProgressBar
from featcache.errors import UserError, command_line, counted
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.views import pixel_path


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Compare a cache with its checksums, or with its teacher.",
    epilog="Examples:\n\n  featcache verify caches/clip-b16-1a2b3c4d\n\n"
    "  featcache verify caches/clip-b16-1a2b3c4d --recompute 64 --images train/",
)
@click.argument("cache", type=CachePath())
@option(
    "--recompute",
    group=HelpGroup.CHECKS,
    type=click.IntRange(0, 10**9),
    default=0,
    help="Also run the teacher on N random rows, and compare what it says with what is stored. "
    "[default: none]",
)
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
    "--seed",
    group=HelpGroup.CHECKS,
    type=SEED,
    default=0,
    show_default=True,
    help="Which rows are recomputed.",
)
@option(
    "--device", group=HelpGroup.RUNNING, help="cpu, cuda, ... [default: cuda where there is one]"
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the findings as JSON."
)
def command(
    cache: Path,
    recompute: int,
    images_spec: str | None,
    weights: str | None,
    named: tuple[str, ...],
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Check every byte of CACHE against its checksums; with --recompute, rows against the
    teacher."""
    from featcache.maintenance import verify

    bar = ProgressBar("verify", "shards")
    problems, shards = verify.verify_cache(cache, bar)
    bar.close()
    for note in verify.index_notes(cache):
        text.say(f"note: {note}")
    facts: dict[str, Any] = {"cache": str(cache), "shards": shards, "problems": problems}
    with_teacher = bool(recompute) and not problems
    if with_teacher:
        facts |= _recompute(cache, images_spec, weights, named, recompute, seed, device)
        problems += facts["recompute"]["problems"]
    text.print_facts(facts, as_json, text.join_lines([*problems, *_verdict(facts)]))
    if problems:
        raise UserError(_of_rows(facts) if with_teacher else _of_files(facts))


def _recompute(
    cache: Path,
    images_spec: str | None,
    weights: str | None,
    named: tuple[str, ...],
    count: int,
    seed: int,
    device: str | None,
) -> dict[str, Any]:
    from featcache.maintenance.recompute import recompute
    from featcache.runtime.device import pick_device

    with Cache(cache) as opened:
        source = open_source(images_spec or extract_command.recorded_pictures(opened.manifest))
        source = pixel_path.match_decoder(source, opened.identity["pixel_path"])
        found = recompute(opened, source, weights, count, seed, pick_device(device), named)
    return {"recompute": found, "images": source.spec}


def _of_files(facts: dict[str, Any]) -> str:
    """Say what is wrong with the bytes, and what fixes it: the same extraction where shards are
    only missing."""
    from featcache.maintenance import verify

    cache, problems = facts["cache"], facts["problems"]
    left = list(extract_command.unfinished(Path(cache)))
    if len(problems) == sum(each.shards - each.shards_complete for each in left):
        return f"{cache} is sound as far as it goes, but {'; '.join(map(str, left))}"
    if problems == verify.check_parts_agree(Path(cache)):
        return problems[0]
    fix = command_line("featcache", "repair", cache)
    return f"{len(problems)} problem(s) in {cache}, the first: {problems[0]}; `{fix}` fixes it"


def _of_rows(facts: dict[str, Any]) -> str:
    """Say what the teacher found; every byte is as it was written, so that repair would find
    nothing."""
    again, problems = facts["recompute"], facts["problems"]
    if again["other_pictures"]:
        return (
            f"the pictures {facts['images']!r} are not those that {facts['cache']} was extracted "
            f"from: of {counted(again['rows'], 'row')} "
            f"{again['rows'] - again['compared']} have other pixels "
            f"or no picture, the first: {problems[0]}; give the right ones with --images"
        )
    return (
        f"{len(problems)} of {counted(again['rows'], 'row')} of {facts['cache']} do not "
        "agree with pictures "
        f"and teacher, the first: {problems[0]}; every byte is as it was written, so fix these "
        "pictures, or extract into another --out"
    )


def _verdict(facts: dict[str, Any]) -> list[str]:
    again = facts.get("recompute")
    if not again:
        return [
            f"{counted(facts['shards'], 'shard')} checked, "
            f"{counted(len(facts['problems']), 'problem')}"
        ]
    lines = [f"{counted(facts['shards'], 'shard')} checked, every byte as it was written"]
    if again["compared"]:
        lines.append(
            f"{counted(again['compared'], 'row')} recomputed: features within "
            f"{again['feature_error']:.1e} "
            f"per token, attention within {again['attention_error']:.1e}"
        )
    if again["other_teachers"]:
        lines.append(
            f"of {again['teacher']} only; rows of {', '.join(again['other_teachers'])} were not "
            "recomputed"
        )
    if again["bad_rows_below"] is not None:
        lines.append(_confidence(again))
    return lines


def _confidence(again: dict[str, Any]) -> str:
    """Say what a clean sample tells of the rest."""
    if again["rows"] < again["of_rows"]:
        return (
            f"a clean sample of {counted(again['rows'], 'row')}: at 95 % confidence at most "
            f"{again['bad_rows_below']:.1%} of all rows are bad; a larger --recompute N narrows "
            "this"
        )
    views = (
        ""
        if again["views"] == 1
        else f", in one of its {counted(again['views'], 'view')}; another --seed takes others"
    )
    return f"every row was recomputed{views}"
