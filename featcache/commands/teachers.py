"""`featcache teachers` lists the teachers known by name."""

from __future__ import annotations

from typing import Any

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.text import echo, format_json, format_table

HEAD = (
    "name", "input", "patches", "width", "depth", "params", "GMAC", "bytes/view", "here", "licence",
    "weights",
)  # fmt: skip


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="List the teachers that are known by name.",
    epilog="Example:\n\n  featcache teachers --json",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the table as JSON.")
def command(as_json: bool) -> None:
    """List the teachers known by name, what they cost, and whether their weights are on this
    machine. Asks no network."""
    from featcache import teachers
    from featcache.models import weights

    table = [
        _facts(name, row, weights.find_local(row.hub, row.file))
        for name, row in teachers.model_cards().items()
    ]
    if as_json:
        echo(format_json(table, indent=1))
        return
    echo(format_table([HEAD, *map(_row, table)], right=range(1, 8)))
    echo(
        "bytes/view: five levels in fp16, or token ids. here: the weights are on this machine.\n"
        "Also timm:NAME[,key=value...], open_clip:ARCH/TAG, run:RUN, ./mine.py, "
        "and synthetic:levels=..,tokens=..,width=..\nOptions of ViTs: img_size= or grid=, "
        "pos=bicubic|bilinear|bicubic-antialias|tensor-bicubic; of CLIP also\n"
        "quick_gelu=true|false."
    )


def _facts(name: str, row: Any, path: Any) -> dict[str, Any]:
    needs_weights = bool(row.hub or row.file)
    return {
        "name": name,
        "kind": "features" if row.depth else "token ids",
        "source": row.source,
        "licence": row.licence,
        "input_px": row.input_px,
        "patches": row.patches,
        "width": row.width,
        "depth": row.depth,
        "params": row.params,
        "gmac": row.gmac,
        "bytes_a_view_last5_fp16": row.view_bytes,
        "on_this_machine": path is not None or not needs_weights,
        "file": None if path is None else str(path),
    }


def _row(fact: dict[str, Any]) -> tuple[str, ...]:
    return (
        fact["name"],
        *(str(fact[name]) for name in ("input_px", "patches", "width", "depth")),
        f"{fact['params'] / 1e6:.1f}M",
        f"{fact['gmac']:.1f}",
        f"{fact['bytes_a_view_last5_fp16']:,}",
        "yes" if fact["on_this_machine"] else "no",
        fact["licence"].removesuffix("-license"),
        fact["source"],
    )
