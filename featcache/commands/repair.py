"""`featcache repair` restores damaged files and extracts bad shards again, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.console import text
from featcache.console.progress_bar import ProgressBar
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.views import pixel_path


@click.command(
    epilog="Examples:\n\n  featcache repair caches/clip-b16-1a2b3c4d\n\n"
    "  featcache repair caches/clip-b16-1a2b3c4d --images /mnt/other/train "
    "--weights ViT-B-16.safetensors"
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--images", "images_spec", help="The pictures. [default: where they were at extraction]"
)
@click.option("--weights", help="The teacher's weights. [default: as at extraction]")
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Decoding threads."
)
@click.option("--device", help="cpu, cuda, ... [default: cuda where there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def command(
    cache: Path,
    images_spec: str | None,
    weights: str | None,
    workers: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Find what is damaged in CACHE and fix it: files from their copies, bad shards by the
    teacher."""
    from featcache import teachers
    from featcache.extraction.progress import ExtractProgress
    from featcache.maintenance import repair
    from featcache.models import precision
    from featcache.models.contract import Teacher
    from featcache.runtime.device import pick_device

    def load(about: dict[str, Any]) -> tuple[Source, Teacher]:
        source = open_source(images_spec or about["provenance"]["source"])
        source = pixel_path.match_decoder(source, about["identity"]["pixel_path"])
        pixel_path.check_pixel_path(
            source, about["identity"]["pixel_path"], f"cache {str(cache)!r}"
        )
        given = weights or about["provenance"]["weights"]
        teacher = teachers.load_any(
            about["identity"]["teacher"]["name"], given, pick_device(device)
        )
        return source, precision.configure_like(teacher, about["identity"])

    bar = ProgressBar("repair", "pictures")
    progress = ExtractProgress(lambda now: bar(now.pictures, now.total))
    done = repair.run(cache, load, workers=workers, progress=progress)
    bar.close()
    lines = [f"restored {name}" for name in done["restored"]] + [
        f"extracted again {name}" for name in done["shards"]
    ]
    text.print_facts(
        {"cache": str(cache), **done}, as_json, "\n".join(lines) or f"{cache}: nothing to fix"
    )
