"""Test whether every recipe learns: small students on digits are trained until their features beat
those they started with.

    python -m benchmarks.bench_recipes
        every recipe, some ten minutes on two cores
    python -m benchmarks.bench_recipes --folder digits --recipe cae
        one; digits, teacher and caches stay there
    python -m benchmarks.bench_recipes --epochs 2 --steps 4 --every 2
        a trial of the program, not a measurement

The digits and a small ViT that knows them come from `pipelines.digits`, discrete tokens from
`pipelines.tokenizer`; `featcache extract` stores the views, and each recipe is trained by `student
train` from that cache. At every checkpoint its encoder is asked for the classes of 397 held-out
digits by weighted k-NN. It has learnt when it is above the mean of five untrained encoders of its
own form by two of their standard deviations; the first such checkpoint is printed. A recipe that
is not there after --steps is printed with its best, and the exit status is then 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import command_options, describe, environment, markdown_table, save_json
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import STOPPED, UsageError, UserError, near
from pipelines import digits, tokenizer
from pipelines.quickstart import run
from student import checkpoint, config, recipes
from student.evals import knn
from student.features import frozen, scores
from student.features.labelled import SetOptions, open_sets
from student.features.task import Task
from student.setup import cache_match

UNTRAINED = 5  # seeds
ABOVE = 2.0  # standard deviations
VIEWS, LEVELS = 4, 3
# Of each setting that a recipe has: one small student, one learning rate and one schedule for all.
SETTINGS: dict[str, Any] = {
    "encoder": "tiny,embed_dim=96,depth=4,num_heads=4",
    "drop_path": 0,
    "lr": 1e-3,
    "warmup_epochs": 2,
    "level_weights": f"top:{LEVELS}",
    "target": "f",  # where z is the default: the digits' teacher has no projection
    "decoder_width": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "regressor_width": 96,
    "regressor_depth": 2,
    "regressor_heads": 4,
    "token_field": tokenizer.FIELD,
    "vocabulary": tokenizer.SIZES["vocabulary"],
}


@dataclass(frozen=True)
class Case:
    """A row of the table: a recipe on views of `px` pixels, and settings of its own."""

    recipe: str
    px: int = digits.PX
    settings: dict[str, Any] = field(default_factory=dict)


# The masked convolutions need patches of 16 pixels: the same 8 x 8 of them on views of 128.
CONV = "tiny,stage1=24,stage2=48,embed_dim=96,depth=3,num_heads=4,stage_mlp=2"
CASES = {name: Case(name) for name in recipes.names()} | {
    "mrmae conv_vit": Case("mrmae", 128, {"family": "conv_vit", "encoder": CONV})
}


@dataclass
class DigitsData:
    """Prepares the data that every recipe is given, below one folder; files that are there already
    are used again."""

    home: Path
    epochs: int
    seed: int

    def part(self, name: str) -> str:
        return f"{self.home}/data/{name}-*.tar"

    def prepare(self) -> None:
        """Make shards, a teacher and a tokenizer."""
        given = [self.home, "--seed", self.seed, "--epochs"]
        if not (self.home / "teacher.json").is_file():
            run("pipelines.digits", *given, self.epochs)
        if not (self.home / "tokenizer.json").is_file():
            run("pipelines.tokenizer", *given, max(2, self.epochs // 2))

    def cache(self, px: int) -> Path:
        """Return the cache of views of `px` pixels; the teacher sees the same crops at its own
        size. Tokens are added."""
        out = self.home / f"cache-{px}"
        if out.exists():
            return out
        low, high = digits.CROPS["scale"]
        shared = [
            "--images", self.part("train"), "--out", out, "--views", VIEWS, "--size", px,
            "--scale", f"{low},{high}", "--flip", digits.CROPS["flip"], "--seed", self.seed,
            "--batch-size", 256,
        ]  # fmt: skip
        weights = self.home / "teacher.safetensors"
        run(
            "featcache",
            "extract",
            "--teacher",
            digits.SPEC,
            "--weights",
            weights,
            "--levels",
            f"last:{LEVELS}",
            *shared,
        )
        weights = self.home / "tokenizer.safetensors"
        run(
            "featcache",
            "extract",
            "--teacher",
            tokenizer.SPEC,
            "--weights",
            weights,
            "--add",
            *shared,
        )
        return out


def settings_of(case: Case) -> list[str]:
    """Return `key=value` texts: those of SETTINGS that the recipe has, then the case's own."""
    has = dataclasses.asdict(recipes.load(case.recipe).Config())
    chosen = {key: value for key, value in SETTINGS.items() if key in has}
    if has.get("target") != "z":
        chosen.pop("target", None)
    return [f"{key}={value}" for key, value in (chosen | case.settings).items()]


def untrained(case: Case, cache: Path, seed: int) -> nn.Module:
    """Build the encoder that `student train` starts from."""
    module = recipes.load(case.recipe)
    settings = config.parse_settings(module.Config, settings_of(case))
    matched = cache_match.open_given(cache, module, case.recipe, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: nn.Module = module.Model(matched.config).encoder
    return encoder


def make_scorer(given: DigitsData, px: int) -> Callable[[nn.Module], float]:
    """Return a function that scores an encoder: per cent of the held-out digits that k-NN names
    rightly from its features."""
    sets = open_sets(SetOptions(given.part("train"), [given.part("test")]))

    def score(encoder: nn.Module) -> float:
        task = Task(
            frozen.from_encoder(encoder, px, "student"), sets.train, sets.tests, sets.names,
            pool="cls" if encoder.num_prefix_tokens else "mean", crop_pct=1.0, keep=False,
        )  # fmt: skip
        return float(scores.of_test(knn.evaluate(task).scored[0])["top1"])

    return score


def checkpoints(command: list[str], out: Path) -> Iterator[tuple[int, nn.Module]]:
    """Run a training and yield the encoder of each of its checkpoints; closing the iterator stops
    the training. The process is paused while a checkpoint is scored, so that none is missed,
    however slow the scoring is."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        seen = 0
        try:
            while True:
                ended = process.poll() is not None
                step = checkpoint.latest_step(out) or 0
                if step > seen:
                    process.send_signal(signal.SIGSTOP)
                    encoder, _ = checkpoint.load_encoder(out)
                    # else a newer one came before the process paused, and is next
                    if checkpoint.latest_step(out) == step:
                        seen = step
                        yield step, encoder
                    process.send_signal(signal.SIGCONT)
                elif ended:
                    break
                else:
                    time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()  # it saves a checkpoint and ends
            _, said = process.communicate()
    if process.returncode not in (0, STOPPED):
        raise UserError(
            f"`{' '.join(command[1:])}` failed: "
            f"{said.splitlines()[-1] if said else process.returncode}"
        )


def measure(
    name: str, case: Case, given: DigitsData, runs: Path, *, steps: int, every: int, batch: int
) -> dict[str, Any]:
    """Measure one row: the untrained encoders, the accuracy to pass, and every checkpoint up to the
    one that passes it."""
    cache, score = given.cache(case.px), make_scorer(given, case.px)
    started = time.perf_counter()
    before = [score(untrained(case, cache, seed)) for seed in range(UNTRAINED)]
    mean, sd = statistics.mean(before), statistics.stdev(before)
    wanted = mean + ABOVE * sd
    click.echo(f"{name}: untrained {mean:.1f} ± {sd:.1f}, to pass {wanted:.1f}")
    out = runs / name.replace(" ", "-")
    command = [
        sys.executable, "-m", "student", "train", "--recipe", case.recipe, "--cache", str(cache),
        "--images", given.part("train"), "--out", str(out), "--steps", str(steps),
        "--save-every", str(every), "--batch-size", str(batch), "--seed", str(given.seed),
        "--device", "cpu",
        *(word for text in settings_of(case) for word in ("--set", text)),
    ]  # fmt: skip
    seen: list[tuple[int, float]] = []
    with contextlib.closing(checkpoints(command, out)) as found:
        for step, encoder in found:
            seen.append((step, score(encoder)))
            click.echo(f"{name}: step {step}, k-NN {seen[-1][1]:.1f}")
            if seen[-1][1] > wanted:
                break
    seconds = round(time.perf_counter() - started, 1)
    passed = bool(seen) and seen[-1][1] > wanted
    return {
        "untrained": before,
        "wanted": wanted,
        "passed": passed,
        "checkpoints": seen,
        "seconds": seconds,
    }


def report(found: dict[str, dict[str, Any]], steps: int) -> str:
    """Format the table: a row a recipe."""
    head = ["recipe", "untrained k-NN %", "to pass", "steps", "k-NN % there", "seconds"]
    rows = []
    for name, row in found.items():
        mean, sd = statistics.mean(row["untrained"]), statistics.stdev(row["untrained"])
        best = max((score for _, score in row["checkpoints"]), default=0.0)
        there = row["checkpoints"][-1] if row["passed"] else None
        shown = (
            [str(there[0]), f"{there[1]:.1f}"] if there else [f"not in {steps}", f"best {best:.1f}"]
        )
        rows.append(
            [
                name,
                f"{mean:.1f} ± {sd:.1f}",
                f"{row['wanted']:.1f}",
                *shown,
                f"{row['seconds']:.0f}",
            ]
        )
    return markdown_table(head, rows)


@click.command(cls=Command)
@option(
    "--recipe",
    "names",
    group=HelpGroup.INPUT,
    multiple=True,
    help="A row of the table; several may be given. [default: all]",
)
@option(
    "--folder",
    group=HelpGroup.REPORT,
    type=command_options.WorkFolder(),
    help="Digits, teacher and caches; kept, and used again.",
)
@command_options.number("--epochs", HelpGroup.RUNNING, 20, "Of the teacher's training.", least=2)
@command_options.number("--steps", HelpGroup.RUNNING, 2000, "At most, of each recipe.")
@command_options.number("--every", HelpGroup.RUNNING, 50, "Steps between two checkpoints.")
@command_options.batch_size(32)
@command_options.number("--seed", HelpGroup.INPUT, 0, "Of digits, views and students.", least=0)
@command_options.json_file
def cli(
    names: tuple[str, ...],
    folder: Path | None,
    epochs: int,
    steps: int,
    every: int,
    batch_size: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """Train every recipe on digits until its encoder has learnt something."""
    for name in names:
        if name not in CASES:
            raise UsageError(f"unknown --recipe {name!r}: {near(name, CASES)}")
    with tempfile.TemporaryDirectory(prefix="featcache-bench-") as temporary:
        started = time.perf_counter()
        given = DigitsData(folder or Path(temporary) / "digits", epochs, seed)
        given.prepare()
        about = environment(given.home)
        length = {"steps": steps, "every": every, "batch": batch_size}
        found = {
            name: measure(name, CASES[name], given, Path(temporary) / "runs", **length)
            for name in names or CASES
        }
        taught = {
            name: json.loads((given.home / f"{name}.json").read_text())
            for name in ("teacher", "tokenizer")
        }
    seconds = round(time.perf_counter() - started, 1)
    save_json(
        json_path,
        {**about, **length, "settings": SETTINGS, **taught, "recipes": found, "seconds": seconds},
    )
    click.echo(f"\n{describe(about)}\n\n{report(found, steps)}\n\n{seconds:.0f} s in all")
    failed = [name for name, row in found.items() if not row["passed"]]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: not {ABOVE:g} standard deviations above untrained encoders "
            f"within {steps} steps; give more --steps"
        )


if __name__ == "__main__":
    entry(cli)
