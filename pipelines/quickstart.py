"""Run the whole idea on real pictures in some minutes: a teacher, its cache, students from it, and
their accuracy.

    python -m pipelines.quickstart [--out quickstart] [--seed 0 | --seeds 0,1,2] [--control]
                                   [--reduced]

Everything runs through the commands that a user has; each is printed before it runs and can be run
again by hand. Per seed: the digits are split and packed, and a small ViT is trained on them
(pipelines.digits); `featcache extract` stores four views from it; `student train` makes a student
with mralign from the cache, and one that is not trained; `student eval` scores all of them on
held-out digits, by [CLS] and by the mean of the patches. Writes OUT/results.json, results.md and
overview.png. `--control` adds a cache of the same ViT before its training, and a student of it.

Exit status 1 when the mralign student is not well above the untrained one by [CLS], in k-NN and by
the linear probe (`quickstart_table.judge`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.text import echo
from featcache.errors import UserError, command_line, counted
from featcache.pictures.open_source import open_source
from pipelines import digits, overview, warm_commands
from pipelines.quickstart_table import EVALS, ROWS, Row, judge, margins, report
from pipelines.seeds import parse_seeds
from student.reporting import metric_rows

# torch's threads spin while they wait for one another. On two cores that are shared with anything
# else this makes a step three to seven times slower (measured beside one busy process); sleeping
# costs next to nothing on idle ones.
WAITING = "PASSIVE"
MARKER = ".quickstart"  # in a folder that this program made and may clear
LEVELS = 3
# Four blocks learn digits as well as six do, in half the time; with small batches their loss leaves
# its plateau earlier: 86 % of the held-out digits after 8 epochs of 16 at 1e-3, 82 % after 16 of 64
# at 2e-3 with six blocks.
TEACHER = digits.teacher(depth=4)
# One decoder, one learning rate, one schedule for every student: the recipes' own defaults are for
# ImageNet. Batches of 32 for the same reason as the teacher's: after 14 epochs of them at 2e-3 the
# linear probe has 95 to 97 %, after 16 of 64 at 4e-3, which take as long, 92 to 96 %.
SETTINGS = {
    "encoder": TEACHER.student,
    "decoder_width": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "lr": 2e-3,
    "warmup_epochs": 2,
    "drop_path": 0,
}
# 1,400 pictures are few steps of MAE's probe; this is the smallest learning rate at which
# `student eval linear` does not warn.
PROBE = {"train-views": 0, "batch-size": 256, "blr": 2.7}


@dataclass(frozen=True)
class Plan:
    """The lengths and batches of everything; all else is the same."""

    teacher_epochs: int = 8
    teacher_batch_size: int = 16
    teacher_lr: float = 1e-3
    epochs: int = 14
    views: int = 4
    batch_size: int = 32
    control: bool = False  # whether there is a student of an untrained teacher
    enforced: bool = True  # whether the margin decides the exit status

    @property
    def length(self) -> str:
        """Return how long the students learn, in words."""
        return counted(self.epochs, "epoch") if self.enforced else "reduced: too short to mean much"


REDUCED = Plan(teacher_epochs=2, epochs=1, views=1, enforced=False)


@click.command(
    cls=Command,
    epilog="Examples:\n"
    "  python -m pipelines.quickstart\n"
    "  python -m pipelines.quickstart --seeds 0,1,2 --control --out three-seeds",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@option(
    "--out",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    default=Path("quickstart"),
    show_default=True,
    help="Folder of all that is made.",
)
@option(
    "--seed",
    group=HelpGroup.TRAINING,
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of split, teacher, views, student.",
)
@option(
    "--seeds",
    group=HelpGroup.TRAINING,
    help="Several, such as 0,1,2; then means and spreads are told.",
)
@option(
    "--control",
    group=HelpGroup.TRAINING,
    is_flag=True,
    help="Also a student of an untrained teacher: what alignment gives without knowledge.",
)
@option(
    "--reduced",
    group=HelpGroup.TRAINING,
    is_flag=True,
    help="A few epochs: shows that everything runs, decides nothing.",
)
def cli(out: Path, seed: int, seeds: str | None, control: bool, reduced: bool) -> None:
    """Teach digits to a student from a cached teacher, and compare it with students that had
    none."""
    plan = replace(REDUCED if reduced else Plan(), control=control)
    numbers = parse_seeds(seeds) if seeds else [seed]
    _clear(out)
    os.environ["FEATCACHE_HOME"] = str(out)  # the ledger of runs goes there too
    os.environ.setdefault("OMP_WAIT_POLICY", WAITING)
    shown = f"FEATCACHE_HOME={command_line(out)} OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
    echo(f"export {shown}   # python is {sys.executable}")
    started = time.perf_counter()
    found = {number: one_seed(out / f"seed-{number}", number, plan) for number in numbers}
    picture = _draw(out, out / f"seed-{numbers[0]}")
    seconds = time.perf_counter() - started
    environment = json.loads((out / f"seed-{numbers[0]}/mralign/environment.json").read_text())
    text = report(found, environment, plan.length, seconds)
    facts = {"seconds": round(seconds, 1), "plan": asdict(plan)}
    facts |= {"settings": SETTINGS, "probe": PROBE}
    facts |= {"environment": environment, "margins": margins(found), "seeds": found}
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "results.md").write_text(text)
    echo(
        f"\n{text}\n{out / 'results.json'}  {out / 'results.md'}\nthe picture to look at: {picture}"
    )
    if plan.enforced:
        judge(found)


def _clear(out: Path) -> None:
    """Start afresh in a folder of ours; never in somebody's."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise UserError(
            f"--out {str(out)!r} holds something that the quickstart did not write; only its own "
            "folder is used again: give another --out, or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for old in out.iterdir():
        if re.fullmatch(r"seed-\d+", old.name) and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name in ("results.json", "results.md", "overview.png") and not old.is_dir():
            old.unlink()


def one_seed(home: Path, seed: int, plan: Plan) -> dict[str, Row]:
    """Run everything for one seed below `home`; return accuracies in per cent, seconds and bytes of
    each row of the table."""
    train, test = f"{home}/data/train-*.tar", f"{home}/data/test-*.tar"
    teacher = home / "teacher.safetensors"
    rows: dict[str, Row] = {name: {} for name in ROWS if plan.control or name != "control"}

    # ---- digits and teacher ----------------------------------------------------------------------
    _, seconds = run(*digits_arguments(home, seed, plan))
    rows["teacher"]["train_s"] = seconds

    # ---- caches ----------------------------------------------------------------------------------
    caches = {"mralign": home / "cache", "control": home / "cache-untrained-teacher"}
    weights: dict[str, Path | str] = {"mralign": teacher, "control": digits.start_of(seed)}
    for name in [name for name in caches if name in rows]:
        _, seconds = run(*extract_arguments(train, weights[name], caches[name], seed, plan))
        rows[name] |= {"extract_s": seconds, "cache_bytes": _bytes(caches[name])}

    # ---- students --------------------------------------------------------------------------------
    for name in [name for name in rows if name != "teacher"]:
        length = ["--steps", 0] if name == "untrained" else ["--epochs", plan.epochs]
        cache = caches["control" if name == "control" else "mralign"]
        arguments = train_arguments("mralign", cache, train, home / name, seed, plan)
        _, rows[name]["train_s"] = run(*arguments, *length)

    # ---- accuracy on held-out digits -------------------------------------------------------------
    for name in rows:
        given = (
            ["--teacher", TEACHER.spec, "--weights", teacher]
            if name == "teacher"
            else [home / name]
        )
        for column, (kind, pool) in EVALS.items():
            said, _ = run(*eval_arguments(kind, pool, given, train, test, seed))
            rows[name][column] = float(json.loads(said.splitlines()[-1])["top1"])
    return rows


def eval_arguments(
    kind: str, pool: str, given: Sequence[Any], train: str, test: str, seed: int
) -> list[Any]:
    """Return the words of `student eval` on the held-out digits, uncropped."""
    own = PROBE if kind == "linear" else {}
    return [
        "student", "eval", kind, *given, "--images", train, "--test", test, "--crop-pct", 1,
        "--pool", pool, "--seed", seed, "--json",
        *(text for key, value in own.items() for text in (f"--{key}", value)),
    ]  # fmt: skip


def digits_arguments(home: Path, seed: int, plan: Plan) -> list[Any]:
    """Return the words that write the digits and train their teacher."""
    return [
        "pipelines.digits", home, "--seed", seed, "--depth", TEACHER.options["depth"],
        "--epochs", plan.teacher_epochs, "--batch-size", plan.teacher_batch_size,
        "--lr", plan.teacher_lr,
    ]  # fmt: skip


def extract_arguments(
    train: str, weights: Path | str, cache: Path, seed: int, plan: Plan
) -> list[Any]:
    """Return the words of `featcache extract` with the crops that the teacher learnt on."""
    low, high = digits.CROPS["scale"]
    return [
        "featcache", "extract", "--teacher", TEACHER.spec, "--weights", weights,
        "--images", train, "--out", cache, "--views", plan.views, "--levels", f"last:{LEVELS}",
        "--size", digits.PX, "--scale", f"{low},{high}", "--flip", digits.CROPS["flip"],
        "--batch-size", 256, "--seed", seed,
    ]  # fmt: skip


def train_arguments(
    recipe: str, cache: Path, train: str, run_folder: Path, seed: int, plan: Plan
) -> list[Any]:
    """Return the words of `student train`; recipes differ in nothing but their targets."""
    settings = SETTINGS | ({"level_weights": f"top:{LEVELS}"} if recipe == "mralign" else {})
    return [
        "student", "train", "--recipe", recipe, "--cache", cache, "--images", train,
        "--out", run_folder, "--batch-size", plan.batch_size, "--seed", seed,
        *(text for key, value in settings.items() for text in ("--set", f"{key}={value}")),
    ]  # fmt: skip


def run(module: str, *arguments: Any) -> tuple[str, float]:
    """Print and run `python -m MODULE ...`; return its stdout, shown line by line as it comes, and
    its seconds."""
    words = [str(word) for word in arguments]
    echo(f"\n$ {command_line('python', '-m', module, *words)}")
    started = time.perf_counter()
    waiting = _waiting(module, words)
    said, status = warm_commands.run(module, words, lambda line: echo(line, nl=False), waiting)
    if status:
        raise UserError(
            f"`python -m {module} {' '.join(words[:2])} ...` failed with exit status {status}; its "
            "own message is above: fix that and run the quickstart again"
        )
    return said, round(time.perf_counter() - started, 1)


def _waiting(module: str, words: Sequence[str]) -> Callable[[float], None]:
    """Return what says that a command is at work, where its own progress bar is not seen."""
    name = " ".join([module, *words[:1]])
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None

    def tell(seconds: float) -> None:
        if not sys.stderr.isatty():
            row = _last_row(out) if out is not None and words[0] == "train" else None
            loss = metric_rows.number(row.get("loss")) if row else None
            told = f", loss {loss:.4f}" if isinstance(loss, float) else ""
            step = f", step {row['step']}{told}" if row else ""
            echo(f"  {name}: {seconds:.0f} s{step}", err=True)

    return tell


def _last_row(out: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, UserError):
        return metric_rows.last_row(out)
    return None


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _draw(out: Path, home: Path) -> Path:
    """Draw OUT/overview.png: one digit of each of four classes, and the curves of the trained
    students."""
    source = open_source(f"{home}/data/train-*.tar")
    first: dict[str, str] = {}
    for key in source.keys:
        first.setdefault(key.split("/")[0], key)
    keys = [first[name] for name in sorted(first)][2:6]
    names = {"mralign": "mralign", "mralign, untrained teacher": "control"}
    runs = {name: home / run for name, run in names.items() if (home / run).is_dir()}
    with featcache.open(home / "cache") as cache:
        overview.draw(source, cache, keys, runs, out / "overview.png")
    return out / "overview.png"


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
