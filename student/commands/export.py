"""`student export` writes a run's encoder as another library reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.console.params import LocalPath, LocalText
from featcache.console.text import join_lines, print_facts
from featcache.errors import UsageError
from student import exporting


@click.command(
    epilog="Examples:\n\n  student export runs/mralign-s0 --format timm --out mralign-timm\n\n"
    "  student export RUN --format hf --checkpoint 5000 --ema --images val/ --out DIR\n\n"
    "  student export runs/mralign-s0 --format onnx --out mralign-onnx"
)
@click.argument("run", type=LocalPath())
@click.option(
    "--format",
    "form",
    type=click.Choice(exporting.names()),
    required=True,
    help="timm: its hub format; hf: transformers' ViTModel; mae, vitdet: the names of MAE's and "
    "ViTDet's checkpoints; onnx: one file for ONNX Runtime.",
)
@click.option(
    "--checkpoint", type=click.IntRange(0, 10**12), help="Step of the checkpoint. [default: newest]"
)
@click.option("--ema", is_flag=True, help="The average of the weights, of a run that keeps one.")
@click.option("--best", is_flag=True, help="Of a fine-tuning: the weights of its best epoch.")
@click.option(
    "--images",
    "images_spec",
    type=LocalText(),
    help="Pictures to compare on. [default: FEATCACHE_IMAGES, else a made picture]",
)
@click.option("--out", type=LocalPath(), required=True, help="A new or empty folder.")
@click.option(
    "--push",
    "repo",
    metavar="REPO",
    type=LocalText(),
    help="Then upload the folder to this repository of the Hugging Face hub.",
)
@click.option("--public", is_flag=True, help="With --push: a new repository is public.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    run: Path,
    form: str,
    checkpoint: int | None,
    ema: bool,
    best: bool,
    images_spec: str | None,
    out: Path,
    repo: str | None,
    public: bool,
    as_json: bool,
) -> None:
    """Write a run's encoder, with its head where it was fine-tuned, for another library: weights,
    the library's config and a model card. It is read back by that library and compared before it is
    called done."""
    from featcache.console.params import images_variable
    from featcache.storage.new_folder import check_new
    from student.features import export_folder, exported, hub_upload

    if public and repo is None:
        raise UsageError(
            "--public says how --push makes a repository; give --push REPO, or leave it out"
        )
    if repo is not None:
        hub_upload.check(repo)
    check_new(out)
    given = exported.read(run, checkpoint, ema, best)
    images = images_spec or images_variable()
    done = export_folder.export(given, exporting.load(form), out, images)
    if repo is not None:
        done["pushed"] = hub_upload.push(out, repo, public)
    print_facts({"run": str(run), "format": form, **done}, as_json, _text(run, form, done))


def _text(run: Path, form: str, done: dict[str, Any]) -> str:
    average = ", average" if done["ema"] else ""
    return join_lines(
        [
            f"{run}, step {done['step']}{average} -> {done['out']} ({form})",
            f"compared on {done['compared_on']}: differs by at most {done['difference']:.1e}",
            *([f"pushed to {done['pushed']}"] if "pushed" in done else []),
        ]
    )
