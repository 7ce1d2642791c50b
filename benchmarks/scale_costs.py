"""Compute what 10^6 to 10^9 pictures cost, from files, bytes and requests that are counted on a
small cache.

    python -m benchmarks.scale_costs
    python -m benchmarks.scale_costs --views-per-second 800 --json costs.json

Two caches of each layout are extracted into a real S3 server (SeaweedFS, on loopback), one with
some shards more: the difference of what they count, over the shards, is what a shard costs. Bytes
of rows are known from the layout. Nothing is timed; the teacher's pace is given, by default that
of CLIP-B/16 on two CPU cores.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from PIL import Image

import featcache
from benchmarks import command_options, describe, environment, markdown_table, save_json
from benchmarks.s3_server import BUCKET, open_bucket, serve
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.extraction.shard_rows import auto_rows
from featcache.objects.client import Client
from featcache.storage.lease import TOUCH_S

PICTURES = (1_281_167, 10_000_000, 100_000_000, 1_000_000_000)
BLOCK = 64  # rows that `--sampling block` reads together
LIST_PAGE = 1000  # names in an answer of S3
CLIP_ON_TWO_CORES = 3.0  # views a second: 1,000 in five to six minutes
SHARDS, MORE, ROWS = 2, 4, 64  # of the small caches
LAYOUTS = {
    "fp16, all tokens": (),
    "t3, 58 patches": ("--codec", "t3", "--tokens", "ranked", "--keep", "58"),
}


@dataclass(frozen=True)
class ShardCosts:
    """Say what is counted of a layout: bytes a view, and of each shard files and requests."""

    layout: str
    view_bytes: int
    files: float
    other_bytes: float  # of a shard, beside the rows
    writes: float  # requests that make a shard: uploads, its lease and its record
    reads: float  # requests for a block of 64 rows
    manifest_bytes: int


# ------------------------------------------------------------ what is counted


@contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """Count the requests of this process to object stores, by what they do."""
    made = Counter[str]()
    tried = Client._tried

    def counting(self: Client, doing: str, path: str, request: Any) -> Any:
        made[doing] += 1
        return tried(self, doing, path, request)

    with mock.patch.object(Client, "_tried", counting):
        yield made


def count(layout: str, work: Path) -> ShardCosts:
    """Extract two caches of a layout into the server of the environment, and count."""
    facts = [_extract(layout, work, shards) for shards in (SHARDS, SHARDS + MORE)]
    few, many = facts
    per_shard = {name: (many[name] - few[name]) / MORE for name in ("files", "bytes", "writes")}
    rows = ROWS * many["view_bytes"]
    return ShardCosts(
        layout,
        many["view_bytes"],
        per_shard["files"],
        per_shard["bytes"] - rows,
        per_shard["writes"],
        many["reads"],
        many["manifest_bytes"],
    )


def _extract(layout: str, work: Path, shards: int) -> dict[str, Any]:
    pictures = _pictures(work / f"pictures-{shards}", shards * ROWS)
    url = f"s3://{BUCKET}/{layout.split(',')[0]}-{shards}"
    words = dict(zip(LAYOUTS[layout][::2], LAYOUTS[layout][1::2], strict=True))
    options: dict[str, Any] = {name.lstrip("-"): value for name, value in words.items()}
    with counted_requests() as made:
        found = featcache.extract(
            teacher="synthetic:levels=5,tokens=196,width=768",
            levels="last:5",
            images=pictures,
            out=url,
            size=32,
            rows_per_shard=ROWS,
            workers=1,
            **options,
        )
    writes = sum(made.values())
    with featcache.open(url) as cache:
        files = [file for record in cache.records for file in record["files"].values()]
        with counted_requests() as asked:
            cache.read(np.arange(BLOCK), 0, ("features", "attention", "crop", "flip", "jitter"))
        view_bytes = sum(spec.item_bytes for spec in cache.arrays.values())
        manifest_bytes = len((cache.path / "manifest.json").read_bytes())
    assert found.complete
    return {
        "files": len(files) + len(cache.records),
        "bytes": sum(file["bytes"] for file in files),
        "writes": writes,
        "reads": sum(asked.values()),
        "view_bytes": view_bytes,
        "manifest_bytes": manifest_bytes,
    }


def _pictures(folder: Path, number: int) -> Path:
    """Save small pictures of one colour each."""
    if not folder.is_dir():
        folder.mkdir()
        for i in range(number):
            colour = (i % 251, i % 241, i % 239)
            Image.new("RGB", (40, 40), colour).save(folder / f"{i:06d}.png")
    return folder


# ------------------------------------------------------------ what follows


def costs(shard: ShardCosts, pictures: int, views_per_second: float) -> dict[str, float]:
    """Compute what so many pictures cost in a layout, one view each."""
    rows = auto_rows(pictures, 1, shard.view_bytes)
    shards = -(-pictures // rows)
    hours = pictures / views_per_second / 3600
    return {
        "rows_per_shard": rows,
        "shards": shards,
        "files": shards * shard.files,
        "bytes": pictures * shard.view_bytes + shards * shard.other_bytes,
        "write_requests": shards * shard.writes,
        # touched as long as its shard is made
        "lease_touches": hours * 3600 / TOUCH_S,
        "list_requests": -(-shards * shard.files // LIST_PAGE),
        "epoch_requests": -(-pictures // BLOCK) * shard.reads,
        "hours": hours,
    }


NAMES = {
    "rows_per_shard": "pictures a shard",
    "shards": "shards, and leases",
    "files": "files, or objects",
    "bytes": "bytes",
    "write_requests": "requests to write",
    "lease_touches": "touches of leases",
    "list_requests": "requests to list",
    "epoch_requests": "requests of an epoch in blocks",
    "hours": "hours of the teacher, two cores",
}


def table(found: list[ShardCosts], views_per_second: float) -> str:
    """Return one Markdown table: a column for each number of pictures, rows by layout."""
    lines = []
    for shard in found:
        columns = [costs(shard, pictures, views_per_second) for pictures in PICTURES]
        for key, name in NAMES.items():
            values = [_short(column[key], key) for column in columns]
            lines.append((f"{shard.layout}: {name}" if key == "rows_per_shard" else name, *values))
    return markdown_table(("", *(f"{number:,}" for number in PICTURES)), lines)


def _short(value: float, key: str) -> str:
    if key == "bytes":
        return f"{value / 1e12:,.2f} TB"
    if value < 10_000:
        return f"{value:,.0f}"
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= unit:
            return f"{value / unit:,.3g} {name}"
    raise AssertionError(value)


@click.command(cls=Command, context_settings={"max_content_width": 110})
@option(
    "--views-per-second",
    group=HelpGroup.INPUT,
    type=click.FloatRange(0, min_open=True),
    default=CLIP_ON_TWO_CORES,
    show_default=True,
    help="The teacher's pace; `featcache extract --dry-run` measures it.",
)
@command_options.folder
@command_options.json_file
def cli(views_per_second: float, folder: Path | None, json_path: Path | None) -> None:
    """Compute the costs of 10^6 to 10^9 pictures from a small cache's files and requests."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        about = environment(work)
        with serve(work / "s3") as server:
            open_bucket(server)
            variables = server.variables(XDG_CACHE_HOME=str(work / "own"))
            with mock.patch.dict("os.environ", variables):
                found = [count(layout, work) for layout in LAYOUTS]
    click.echo(f"{describe(about)}\n\n{table(found, views_per_second)}\n")
    facts = [
        {**asdict(shard), "costs": {n: costs(shard, n, views_per_second) for n in PICTURES}}
        for shard in found
    ]
    save_json(json_path, {**about, "views_per_second": views_per_second, "layouts": facts})


if __name__ == "__main__":
    entry(cli)
