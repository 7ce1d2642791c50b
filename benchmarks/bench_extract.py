"""Measure what an extraction costs beside its teacher: everything around the forward, the
attention, and the store.

    python -m benchmarks.bench_extract                     clip-b16, random weights, 64 pictures
    python -m benchmarks.bench_extract --device cuda --precision bf16 --compile --batch-size 256
                                       --rows 8192
    python -m benchmarks.bench_extract --ready             the teacher answers at once, so that
                                                           the disk is the limit
    python -m benchmarks.bench_extract --rows 8 --reps 1   a trial of the program, not a measurement

In turns, another one first each time; ratios are of one repetition, and their medians are printed:

    bare forward    the network over batches that lie on its device, without the hooks that read it
    read forward    the same with the hooks: levels taken, and the last block's [CLS] attention
    null sink       the extraction with a store that discards what it is given: pictures decoded and
                    rendered, copied, the teacher, targets encoded
    store           the extraction, its files removed afterwards
    raw disk        as many bytes by plain writes and one fsync
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import command_options, describe, environment, markdown_table, null_store, save_json
from benchmarks.bench_write import MemoizedTeacher, write_pictures, write_raw
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.extraction import device_pipeline, rendering
from featcache.extraction.extract import run
from featcache.extraction.forward import run_teacher
from featcache.extraction.options import parse_levels
from featcache.extraction.plan import Plan
from featcache.extraction.progress import ExtractProgress
from featcache.models import precision as running
from featcache.models.contract import Teacher
from featcache.pictures.open_source import open_source
from featcache.runtime.device import pick_device
from featcache.storage.store import STORES
from featcache.teachers import load
from featcache.views.policy import load_policy

VARIANTS = ("bare forward", "read forward", "null sink", "store", "raw disk")
AIMS = {  # the ratio that is asked for, on a CPU and on a GPU
    "null sink / bare forward": (1.10, 1.05),
    "read forward / bare forward": (1.02, 1.02),
}
STORE_AIM = 0.9  # of the raw disk's rate, where writing is the limit


def without_hooks(teacher: Teacher) -> Teacher:
    """Remove all hooks of a network: asked for no level, it runs and nothing is read."""
    for module in teacher.modules() if isinstance(teacher, nn.Module) else ():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return teacher


def batches_of(plan: Plan, batch_size: int) -> list[torch.Tensor]:
    """Render the batches that the extraction gives the teacher, on its device."""
    pictures = (rendering.render_views([plan], index) for index in range(len(plan.source)))
    pipeline = device_pipeline.DevicePipeline(plan, batch_size, ExtractProgress())
    return [
        pipeline._to_device(batch)
        for batch in rendering.view_batches(pictures, plan.views, batch_size)
    ]


def forward(
    teacher: Teacher, batches: list[torch.Tensor], levels: tuple[int, ...]
) -> dict[str, Any]:
    for batch in batches:
        run_teacher(teacher, batch, levels)
    if running.device_of(teacher).type == "cuda":
        torch.cuda.synchronize(running.device_of(teacher))
    return {}


def extract(plan: Plan, out: Path, batch_size: int, workers: int) -> dict[str, Any]:
    progress = ExtractProgress()
    run(plan, out, batch_size=batch_size, workers=workers, progress=progress)
    return {"slowest": progress.slowest, "busy": dict(progress.busy)}


def repetition(
    variants: dict[str, Callable[[], dict[str, Any]]], out: Path, first: int
) -> dict[str, dict[str, Any]]:
    """Run all variants once, each on an empty disk."""
    names, done = [*variants], {}
    for name in names[first % len(names) :] + names[: first % len(names)]:
        start = time.perf_counter()
        facts = variants[name]()
        done[name] = {**facts, "seconds": time.perf_counter() - start}
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    return {name: done[name] for name in names}


def ratios_of(reps: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return ratios of seconds within each repetition; `store / raw disk` is one of rates."""

    def ratio(over: str, under: str) -> dict[str, float]:
        found = [rep[over]["seconds"] / rep[under]["seconds"] for rep in reps]
        return {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}

    return {
        "null sink / bare forward": ratio("null sink", "bare forward"),
        "read forward / bare forward": ratio("read forward", "bare forward"),
        "store / null sink": ratio("store", "null sink"),
        "rate of store / raw disk": ratio("raw disk", "store"),
    }


def slowest_stage(reps: list[dict[str, dict[str, Any]]], name: str) -> str:
    """Return the stage that limited most repetitions."""
    return statistics.mode(rep[name]["slowest"] for rep in reps)


def verdicts(
    ratios: dict[str, dict[str, float]], stage: str, device: str, ready: bool
) -> list[str]:
    """Format one line a ratio, with its aim and whether it is reached."""
    lines = []
    for text, found in ratios.items():
        aim = AIMS[text][device != "cpu"] if text in AIMS and not ready else None
        ok = (
            ""
            if aim is None
            else f", aim {aim:.2f}  {'ok' if found['median'] <= aim else 'MISSED'}"
        )
        if text.startswith("rate"):
            kept = "ok" if found["median"] >= STORE_AIM else "MISSED"
            ok = (
                f", aim {STORE_AIM}  {kept}"
                if stage == "write"
                else f" (not the disk: {stage} is the limit)"
            )
        lines.append(
            f"{text} = {found['median']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f}){ok}"
        )
    return lines


def rates_table(reps: list[dict[str, dict[str, Any]]], views: int) -> str:
    rows = []
    for name in reps[0]:
        seconds = statistics.median(rep[name]["seconds"] for rep in reps)
        busy = reps[-1][name].get("busy", {})
        shares = ", ".join(f"{stage} {spent:.1f}" for stage, spent in busy.items()) or "-"
        rows.append(
            (
                name,
                f"{seconds:.2f}",
                f"{views / seconds:.1f}",
                reps[-1][name].get("slowest", "-"),
                shares,
            )
        )
    return markdown_table(["", "seconds", "views/s", "slowest", "busy seconds of the last"], rows)


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.text("--teacher", "name", default="clip-b16")
@command_options.text("--weights", default="random:0")
@option(
    "--ready",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Answer every batch with the teacher's first answer: no wait for it.",
)
@command_options.levels
@command_options.number("--rows", HelpGroup.INPUT, 64, "Pictures; one view each, one shard.")
@command_options.store
@option(
    "--precision",
    group=HelpGroup.RUNNING,
    default="fp32",
    show_default=True,
    help="As for `featcache extract`.",
)
@option(
    "--compile",
    "compiled",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="As for `featcache extract`.",
)
@command_options.device
@command_options.batch_size(32)
@command_options.workers
@command_options.reps(9)
@command_options.folder
@command_options.json_file
def cli(
    name: str,
    weights: str,
    ready: bool,
    levels: str,
    rows: int,
    store_name: str,
    precision: str,
    compiled: bool,
    device: str | None,
    batch_size: int,
    workers: int,
    reps: int,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Measure what an extraction costs beside its teacher."""
    STORES[null_store.NAME] = null_store.__name__
    device = pick_device(device)
    running.keep_freed_memory()  # as the command does; the bare forward has it too
    given = None if name.startswith("synthetic") else weights

    def teacher() -> Teacher:
        return running.configure(load(name, given, device), precision, compiled)

    model: Any = MemoizedTeacher(teacher()) if ready else teacher()
    plain = without_hooks(teacher())
    with tempfile.TemporaryDirectory(prefix="featcache-bench-", dir=folder) as temporary:
        root = Path(temporary)
        source = open_source(write_pictures(root / "pictures", rows))
        chosen = parse_levels(levels, model.depth)
        plan = Plan(
            source=source,
            teacher=model,
            policy=load_policy(size=model.input_px),
            views=1,
            levels=chosen,
            store=store_name,
            rows_per_shard=rows,
        )
        nothing, total, out = (
            replace(plan, store=null_store.NAME),
            plan.view_bytes * rows,
            root / "out",
        )
        batches = batches_of(plan, batch_size)
        variants: dict[str, Callable[[], dict[str, Any]]] = dict(
            zip(
                VARIANTS,
                (
                    lambda: forward(plain, batches, ()),
                    lambda: forward(model, batches, chosen),
                    lambda: extract(nothing, out, batch_size, workers),
                    lambda: extract(plan, out, batch_size, workers),
                    lambda: {"bytes": write_raw(out, total)},
                ),
                strict=True,
            )
        )
        about = environment(root)
        kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
        how = (
            f"{precision}{', compiled' * compiled}{', ready' * ready} on {kind}, "
            f"{torch.get_num_threads()} threads"
        )
        click.echo(
            f"{describe(about)}\n{rows} pictures, {name} {how}, batch {batch_size}: "
            f"{total / 1e6:.0f} MB"
        )
        # what only the first batch of a process costs: the hash of the weights,
        for each in (nothing, plan):
            each.manifest()
        for each in (plain, model):  # and the first forward
            forward(each, batches[:1], chosen if each is model else ())
        done = [repetition(variants, out, first) for first in range(reps)]
    ratios, stage = ratios_of(done), slowest_stage(done, "store")
    options = {
        "teacher": name,
        "weights": given,
        "rows": rows,
        "batch_size": batch_size,
        "workers": workers,
    }
    options |= {
        "precision": precision,
        "compile": compiled,
        "device": kind,
        "ready": ready,
        "store": store_name,
    }
    save_json(
        json_path,
        {
            **about,
            "options": options,
            "bytes": total,
            "ratios": ratios,
            "limit": stage,
            "repetitions": done,
        },
    )
    click.echo(f"\n{rates_table(done, rows)}\n")
    for line in verdicts(ratios, stage, device, ready):
        click.echo(line)
    click.echo(
        f"the stage that limits the extraction into the store: {stage}; into nothing: "
        f"{slowest_stage(done, 'null sink')}"
    )


if __name__ == "__main__":
    entry(cli)
