"""`featcache verify`: is every byte what was written, and are the numbers the teacher's?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache import images, show
from featcache.errors import UserError
from featcache.reader import Cache


@click.command(
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
def command(
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

    bar = show.Bar("verify", "shards")
    problems, shards = work.files(cache, bar)
    bar.close()
    facts: dict[str, Any] = {"cache": str(cache), "shards": shards, "problems": problems}
    if recompute and not problems:
        with Cache(cache) as opened:
            source = images.open_source(images_spec or opened.manifest["provenance"]["source"])
            facts["recompute"] = work.recompute(opened, source, weights, recompute, seed, pick_device(device))
        problems += facts["recompute"]["problems"]
    show.facts_or_text(facts, as_json, "\n".join([*problems, _verdict(facts)]))
    if problems:
        raise UserError(
            f"{len(problems)} problem(s) in {cache}, the first: {problems[0]}; `featcache repair {cache}` mends it"
        )


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
