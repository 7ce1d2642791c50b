"""Train the same student from caches of several codecs, and tell the differences.

    python -m benchmarks.bench_codec_students [--seeds 0,1] [--codecs q8,t3] [--folder DIR]

Digits as in `pipelines.quickstart`: per seed a teacher is trained and extracted once, in fp16; each
codec's cache is derived from it. All students have the same start, pictures, views, order and
masks, so what differs is what the codec loses. Told are the mean loss of the last epoch, k-NN and
linear accuracy on the held-out digits, and each less fp16's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks import command_options, describe, environment, markdown_table, save_json
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.targets import codec_names
from pipelines import quickstart

Scores = dict[str, float]


def one_seed(home: Path, seed: int, names: list[str], plan: quickstart.Plan) -> dict[str, Scores]:
    """Return the scores of a student of each codec."""
    train, test = f"{home}/data/train-*.tar", f"{home}/data/test-*.tar"
    plain = home / codec_names.LOSSLESS
    quickstart.run(*quickstart.digits_arguments(home, seed, plan))
    weights = home / "teacher.safetensors"
    quickstart.run(*quickstart.extract_arguments(train, weights, plain, seed, plan))
    found = {}
    for name in names:
        cache, out = home / name, home / f"student-{name}"
        if name != codec_names.LOSSLESS:
            quickstart.run("featcache", "derive", plain, cache, "--codec", name)
        words = quickstart.train_arguments("mralign", cache, train, out, seed, plan)
        quickstart.run(*words, "--epochs", plan.epochs)
        found[name] = {"loss": last_loss(out), **scores(out, train, test, seed)}
    return found


def last_loss(run_folder: Path) -> float:
    """Return the mean loss of the last epoch."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [
        line["loss"] for line in lines if "loss" in line and line["epoch"] == lines[-1]["epoch"]
    ]
    return float(sum(losses) / len(losses))


def scores(run_folder: Path, train: str, test: str, seed: int) -> Scores:
    """Return k-NN and linear accuracy in per cent."""
    found = {}
    for kind, options in (("knn", {}), ("linear", quickstart.PROBE)):
        own: list[Any] = [word for key, value in options.items() for word in (f"--{key}", value)]
        given = ["--images", train, "--test", test, "--crop-pct", 1, "--pool", "cls"]
        words = ["eval", kind, run_folder, *given, "--seed", seed, "--json", *own]
        said, _ = quickstart.run("student", *words)
        found[kind] = float(json.loads(said.splitlines()[-1])["top1"])
    return found


def report(found: dict[int, dict[str, Scores]]) -> str:
    """Format a row for each seed and codec, with the differences from fp16."""
    head = ["seed, codec", "loss", "k-NN %", "linear %", "loss less fp16's", "k-NN", "linear"]
    rows = []
    for seed, codecs in found.items():
        plain = codecs[codec_names.LOSSLESS]
        for name, scored in codecs.items():
            rows.append(
                [
                    f"{seed}, {name}",
                    f"{scored['loss']:.4f}",
                    *(f"{scored[kind]:.1f}" for kind in ("knn", "linear")),
                    f"{scored['loss'] / plain['loss'] - 1:+.2%}",
                    *(f"{scored[kind] - plain[kind]:+.1f}" for kind in ("knn", "linear")),
                ]
            )
    return markdown_table(head, rows)


@click.command(cls=Command, context_settings={"max_content_width": 110})
@option(
    "--seeds",
    group=HelpGroup.INPUT,
    default="0,1",
    show_default=True,
    help="Seeds of the students, with commas.",
)
@option(
    "--codecs",
    "names",
    group=HelpGroup.STORAGE,
    default="q8,t3",
    show_default=True,
    help="Codecs, with commas; fp16 is compared with.",
)
@option(
    "--reduced",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="A few epochs: shows that everything runs.",
)
@option(
    "--folder",
    group=HelpGroup.REPORT,
    type=command_options.WorkFolder(),
    help="Where everything goes, and stays. [default: a temporary one]",
)
@command_options.json_file
def cli(seeds: str, names: str, reduced: bool, folder: Path | None, json_path: Path | None) -> None:
    """Train students from caches of several codecs."""
    wanted = [codec_names.LOSSLESS, *names.split(",")]
    for name in wanted:
        codec_names.check(name)
    plan = quickstart.REDUCED if reduced else quickstart.Plan()
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        about = environment(Path(temporary))
        found = {
            int(seed): one_seed(home / f"seed-{seed}", int(seed), wanted, plan)
            for seed in seeds.split(",")
        }
    click.echo(f"{describe(about)}\n\n{report(found)}")
    save_json(json_path, {"environment": about, "seeds": found})


if __name__ == "__main__":
    entry(cli)
