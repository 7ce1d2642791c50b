"""Compare this checkout with an earlier commit: extraction, training steps, reading, and opening a
cache with as many rows as ImageNet-1k.

    python -m benchmarks.bench_commits HEAD~20
    python -m benchmarks.bench_commits v0.1 --rounds 3 --rows 20000 --json commits.json
    python -m benchmarks.bench_commits HEAD~20 --recipe maskalign --recipe mralign --steps 16
        steps of ViT-B/16 alone, from five levels of width 768 and stored pixels

Both read the same pictures and the same caches, which the earlier commit wrote. Each measurement is
a process of its own; the two take turns, and the one that begins changes with the round. Of every
round the ratio is taken, after over before; the table has its median, lowest and highest. The last
column is the spread of the earlier commit alone, the range of its middle half over its median: a
ratio no further from 1 is no difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks import command_options, describe, environment, markdown_table, save_json
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option

ROOT = Path(__file__).parents[1]
BATCH = 32
TEACHER = "synthetic:levels=4,tokens=196,width=64"
EXTRACT = ("--teacher", TEACHER, "--levels", "all", "--views", "2", "--workers", "2")
TRAIN = (
    "--recipe", "maskalign", "--set", "encoder=vit_tiny_patch16_224,depth=4,embed_dim=96",
    "--set", "level_weights=top:3", "--set", "warmup_epochs=0", "--device", "cpu",
)  # fmt: skip

LARGE_BATCH = 8  # of ViT-B/16
LARGE_TEACHER = "synthetic:levels=12,tokens=196,width=768"
LARGE_EXTRACT = ("--teacher", LARGE_TEACHER, "--levels", "last:5", "--pixels", "raw")

Seconds = dict[str, list[float]]  # of one checkout: a measurement's name, and a value a round


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        _git("worktree", "add", "--detach", "--quiet", str(path), revision)
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _git(*words: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
        ).stdout.strip()
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"git {words[0]}: {error.stderr.strip()}") from error


def run_in(code: Path, work: Path, *words: str) -> str:
    """Run Python with one checkout's packages; return what it prints."""
    names = {k: v for k, v in os.environ.items() if not k.startswith(("FEATCACHE_", "ACCELERATE_"))}
    env = names | {"PYTHONPATH": str(code), "FEATCACHE_HOME": str(work / "home")}
    done = subprocess.run(
        [sys.executable, *words], cwd=work, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise click.ClickException(f"{' '.join(words[:3])} in {code}: {said}")
    return done.stdout


def write_pictures(folder: Path, count: int) -> None:
    """Write JPEGs of smooth noise, 256 to 511 pixels a side, in four classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = random.integers(0, 256, (16, 16, 3), np.uint8)
        size = tuple(int(side) for side in random.integers(256, 512, 2))
        path = folder / f"class{i % 4}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def prepare(before: Path, work: Path, pictures: int, rows: int) -> None:
    """Write pictures, the cache to train from, and the cache of many rows."""
    write_pictures(work / "pictures", pictures)
    options = ["extract", "--images", "pictures", "--out", "cache", *EXTRACT]
    run_in(before, work, "-m", "featcache", *options)
    code = (
        "from pathlib import Path; from benchmarks.bench_scale import write_cache; "
        f"write_cache(Path('large'), {rows}, 4)"
    )
    run_in(before, work, "-c", code)


def measure_all(code: Path, work: Path, steps: int) -> dict[str, float]:
    """Take every measurement of one checkout once."""
    script = str(ROOT / "benchmarks/commit_tasks.py")
    train = ["run", str(BATCH), "--cache", "cache", "--images", "pictures", "--steps", str(steps)]
    tasks: list[Sequence[str]] = [
        ["extract", "pictures", "again", *EXTRACT],
        ["train", *train, *TRAIN],
        ["open", "large"],
        ["read", "cache"],
    ]
    found: dict[str, float] = {}
    for task in tasks:
        found |= json.loads(run_in(code, work, "-P", script, *task).splitlines()[-1])
    return found


def prepare_large(before: Path, work: Path) -> None:
    """Write pictures, and a cache of features as large as CLIP-B/16's by the earlier commit."""
    write_pictures(work / "pictures", 4 * LARGE_BATCH)
    extract = ("extract", "--images", "pictures", "--out", "large", *LARGE_EXTRACT)
    run_in(before, work, "-m", "featcache", *extract)


def measure_large(code: Path, work: Path, steps: int, recipes: Sequence[str]) -> dict[str, float]:
    """Take the step of ViT-B/16 with each recipe, of one checkout."""
    script, found = str(ROOT / "benchmarks/commit_tasks.py"), {}
    common = ("--cache", "large", "--steps", str(steps), "--device", "cpu")
    for recipe in recipes:
        task = ("train", "run", str(LARGE_BATCH), *common, "--recipe", recipe)
        told = json.loads(run_in(code, work, "-P", script, *task).splitlines()[-1])
        found[f"ViT-B/16 step, {recipe}"] = told["step"]
    return found


def compare(
    checkouts: dict[str, Path], rounds: int, measure: Callable[[Path], dict[str, float]]
) -> dict[str, Seconds]:
    """Let the checkouts take turns; return the seconds of each, round by round."""
    seconds: dict[str, Seconds] = {name: defaultdict(list) for name in checkouts}
    for number in range(rounds):
        for name in sorted(checkouts, reverse=bool(number % 2)):
            for task, spent in measure(checkouts[name]).items():
                seconds[name][task].append(spent)
        click.echo(f"round {number + 1} of {rounds}", err=True)
    return seconds


def summarise(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return the medians, the ratios of rounds, and the spread of the earlier commit alone."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    middle = statistics.median(before)
    quarters = np.percentile(np.array(before) / middle, [25, 75]) if len(before) > 1 else [1, 1]
    return {
        "before_s": middle,
        "after_s": statistics.median(after),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "spread": float(quarters[1] - quarters[0]),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    head = ("", "before s", "after s", "ratio", "lowest", "highest", "spread of before")
    lines = [[name, *(f"{facts[key]:.3f}" for key in facts)] for name, facts in results.items()]
    return markdown_table(head, lines)


@click.command(cls=Command)
@click.argument("revision")
@command_options.number("--rounds", HelpGroup.RUNNING, 7, "Rounds; each measures both once.")
@command_options.number("--pictures", HelpGroup.INPUT, 512, "Pictures that are made.", least=BATCH)
@command_options.number("--rows", HelpGroup.INPUT, 1_281_167, "Of the cache that is opened.")
@command_options.number("--steps", HelpGroup.RUNNING, 60, "Steps of a run.", least=12)
@option(
    "--recipe",
    "recipes",
    group=HelpGroup.INPUT,
    multiple=True,
    help="ViT-B/16 steps of this recipe alone.",
)
@command_options.json_file
def cli(
    revision: str,
    rounds: int,
    pictures: int,
    rows: int,
    steps: int,
    recipes: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Seconds of this checkout over those of REVISION."""
    with checkout(revision) as before, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if recipes:
            prepare_large(before, work)
        else:
            prepare(before, work, pictures, rows)

        def measure(code: Path) -> dict[str, float]:
            if recipes:
                return measure_large(code, work, steps, recipes)
            return measure_all(code, work, steps)

        seconds = compare({"before": before, "after": ROOT}, rounds, measure)
        about = environment(work)
    tasks = seconds["before"]
    results = {name: summarise(tasks[name], seconds["after"][name]) for name in tasks}
    click.echo(describe(about))
    click.echo(f"before: {_git('rev-parse', revision)}; {rounds} rounds")
    click.echo(table(results))
    facts: dict[str, Any] = {"environment": about, "before": _git("rev-parse", revision)}
    save_json(json_path, {**facts, "rounds": rounds, "seconds": seconds, "results": results})


if __name__ == "__main__":
    entry(cli)
