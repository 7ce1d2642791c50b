"""`student.export` does what the command of this name does, which is a thin layer over it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from featcache.console import keywords
from featcache.console.params import images_variable
from featcache.console.text import join_lines
from featcache.errors import UsageError
from featcache.storage.new_folder import check_new
from student import exporting
from student.features import export_folder, exported, hub_upload
from student.setup import export_parameters
from student.training.set_aside import generators_kept

Text = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportResult:
    """Says what was written; `facts` are plain JSON, all that --json prints."""

    out: Path  # the folder
    step: int  # of the checkpoint
    difference: float  # the largest, between the run's outputs and those of the library
    compared_on: str
    facts: dict[str, Any] = field(repr=False)


def export(
    *,
    run: Text,
    format: Literal["hf", "mae", "onnx", "timm", "vitdet"],
    out: Text,
    checkpoint: int | None = None,
    ema: bool = False,
    best: bool = False,
    images: Text | None = None,
    labels: Text | None = None,
    image_member: str | None = None,
    push: str | None = None,
    public: bool = False,
) -> ExportResult:
    """Write a run's encoder, with its head where it was fine-tuned, as another library reads it.

    Each keyword is the option of `student export` of this name, with its meaning and default, and
    `run` is its argument; `student export --help` says them. The folder is read back by the library
    and compared before the call returns; with `push` it is then uploaded to the hub, as a private
    repository unless `public`.

    Raises UsageError for what cannot be meant, UserError for what the format cannot express, a
    package that is not installed, or outputs that differ; an OSError of the machine passes through.
    """
    given = keywords.read(export_parameters.parameters(exporting.names()), dict(locals()))
    facts, _ = carry_out(given)
    difference, compared_on = facts["difference"], facts["compared_on"]
    return ExportResult(Path(facts["out"]), facts["step"], difference, compared_on, facts)


# --- the work, for the command too ----------------------------------------------------------------


def carry_out(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Export, and return what there is and the text of it. `given` are the options by click's
    names."""
    run, form, out, repo = given["run"], given["form"], given["out"], given["repo"]
    if given["public"] and repo is None:
        raise UsageError(
            "--public says how --push makes a repository; give --push REPO, or leave it out"
        )
    if repo is not None:
        hub_upload.check(repo)
    check_new(out)
    with generators_kept(torch.device("cpu")):
        own = exported.read(run, given["checkpoint"], given["ema"], given["best"])
        images = given["images_spec"] or images_variable()
        done = export_folder.export(own, exporting.load(form), out, images)
    if repo is not None:
        done["pushed"] = hub_upload.push(out, repo, given["public"])
    return {"run": str(run), "format": form, **done}, _text(run, form, done)


def _text(run: Path, form: str, done: dict[str, Any]) -> str:
    average = ", average" if done["ema"] else ""
    return join_lines(
        [
            f"{run}, step {done['step']}{average} -> {done['out']} ({form})",
            f"compared on {done['compared_on']}: differs by at most {done['difference']:.1e}",
            *([f"pushed to {done['pushed']}"] if "pushed" in done else []),
        ]
    )
