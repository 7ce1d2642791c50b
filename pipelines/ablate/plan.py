"""From a table and a scale to jobs: for each seed pictures and teacher, as few caches as serve all
rows, students, and their evaluations.

Every job is one command that a user has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ablate.scales import Scale
from pipelines.ablate.table import Column, Row, Table

DATA = "data"


@dataclass(frozen=True)
class Job:
    """Hold one command, `python -m WORDS`, and what it leaves.

    `name` is a path below the folder of all jobs; jobs of one `kind` take about as long as each
    other. `makes` is the folder it fills (none for an evaluation, whose result is what it prints),
    `proof` a file that is there when it is done. One that cannot go on where it broke is
    `restarted` in an empty folder.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    after: tuple[str, ...]
    proof: Path
    makes: Path | None = None
    restarted: bool = False
    seed: int = 0
    row: str = ""
    column: str = ""


def make_plan(table: Table, scale: Scale, out: Path, seeds: tuple[int, ...]) -> list[Job]:
    """Return all jobs of some seeds, each after those that it needs."""
    return [job for seed in seeds for job in _seed_jobs(table, scale, out, seed)]


def digests(jobs: list[Job], out: Path) -> dict[str, str]:
    """Return a digest of each job's command and of all commands it needs; the place of `out` is no
    part of it."""
    found: dict[str, str] = {}
    for job in jobs:
        content = [plain_words(job, out), [found[name] for name in job.after]]
        found[job.name] = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    return found


def plain_words(job: Job, out: Path) -> list[str]:
    """Return a job's words with OUT in place of its folder."""
    return [word.replace(f"{out}/", "OUT/") for word in job.words]


def _seed_jobs(table: Table, scale: Scale, out: Path, seed: int) -> list[Job]:
    place = _Place(scale, out / f"seed-{seed}", seed)
    caches = _caches(table, scale)
    students = [row for row in table.rows if row.recipe]
    return [
        place.data_job(),
        *(place.cache_job(name, options) for name, options in caches.items()),
        *(place.student_job(row) for row in students),
        *(place.eval_job(row, column) for row in table.rows for column in table.columns),
    ]


def _caches(table: Table, scale: Scale) -> dict[str, dict[str, Any]]:
    """Return the options of every cache, by its name: as many levels as one of its rows reads."""
    found: dict[str, dict[str, Any]] = {}
    for row in (row for row in table.rows if row.recipe):
        levels = max(_levels_read(row, scale), found.get(_cache_name(row), {}).get("levels", 1))
        found[_cache_name(row)] = {"levels": levels, **row.extract}
    return found


def _cache_name(row: Row) -> str:
    return "-".join(["cache", *(f"{key}-{value}" for key, value in sorted(row.extract.items()))])


def row_settings(row: Row, scale: Scale) -> dict[str, Any]:
    """Return the settings of a row's recipe: those of the scale that the recipe has, then its
    own."""
    from student import recipes

    has = dataclasses.asdict(recipes.load(row.recipe).Config())
    chosen = {key: value for key, value in scale.settings.items() if key in has}
    if has.get("target") != "z":
        chosen.pop("target", None)
    return {**chosen, **row.settings}


def _levels_read(row: Row, scale: Scale) -> int:
    """Return how many of the teacher's last levels a row's recipe reads: 0 or more."""
    from student import config, recipes

    options = scale.teacher.options
    facts = {
        "teacher_depth": options["depth"],
        "teacher_width": options["embed_dim"],
        "img_size": options["img_size"],
        "patch_size": options["patch_size"],
    }
    module = recipes.load(row.recipe)
    texts = [f"{key}={value}" for key, value in (facts | row_settings(row, scale)).items()]
    levels = module.needs(config.from_overrides(module.Config, texts)).levels
    return options["depth"] - min(levels) + 1 if levels else 0


@dataclass(frozen=True)
class _Place:
    """Hold what the jobs of one seed share; all they make lies below `home`."""

    scale: Scale
    home: Path
    seed: int

    @property
    def train(self) -> str:
        return f"{self.home}/{DATA}/data/train-*.tar"

    @property
    def weights(self) -> Path:
        return self.home / DATA / "teacher.safetensors"

    def name(self, what: str) -> str:
        return f"{self.home.name}/{what}"

    def data_job(self) -> Job:
        scale, folder = self.scale, self.home / DATA
        words = [scale.module, folder, "--seed", self.seed, "--epochs", scale.teacher_epochs]
        return Job(
            self.name(DATA), DATA, _texts(*words, *scale.given), (), folder / "teacher.json",
            makes=folder, restarted=True, seed=self.seed,
        )  # fmt: skip

    def cache_job(self, name: str, options: Mapping[str, Any]) -> Job:
        scale, folder = self.scale, self.home / name
        low, high = scale.teacher.crops["scale"]
        usual = {
            "views": scale.views, "size": scale.teacher.px, "scale": f"{low},{high}",
            "flip": scale.teacher.crops["flip"], "batch-size": 256, "seed": self.seed,
        }  # fmt: skip
        given = {**usual, **options, "levels": f"last:{options['levels']}"}
        words = [
            "featcache", "extract", "--teacher", scale.teacher.spec, "--weights", self.weights,
            "--images", self.train, "--out", folder, *_options(given),
        ]  # fmt: skip
        return Job(
            self.name(name), "extract", _texts(*words), (self.name(DATA),),
            folder / "manifest.json", makes=folder, seed=self.seed,
        )  # fmt: skip

    def student_job(self, row: Row) -> Job:
        scale, folder, cache = self.scale, self.home / "runs" / row.name, _cache_name(row)
        length = ["--epochs", scale.epochs] if row.trained else ["--steps", 0]
        words = [
            "student", "train", "--recipe", row.recipe, "--cache", self.home / cache, "--images",
            self.train, "--out", folder, *length, "--batch-size", scale.batch_size, "--seed",
            self.seed, "--resume", *_settings(row_settings(row, scale)),
        ]  # fmt: skip
        return Job(
            self.name(f"runs/{row.name}"), f"train {row.name}", _texts(*words), (self.name(cache),),
            folder / "config.json", makes=folder, seed=self.seed, row=row.name,
        )  # fmt: skip

    def eval_job(self, row: Row, column: Column) -> Job:
        run, test = self.home / "runs" / row.name, f"{self.home}/{DATA}/data/test-*.tar"
        teacher = ["--teacher", self.scale.teacher.spec, "--weights", self.weights]
        options = {**self.scale.probes.get(column.protocol, {}), **column.options}
        if column.trains:
            options |= self._fine_tuning(options)
        words = [
            "student", "eval", column.protocol, *([run] if row.recipe else teacher),
            "--images", self.train, "--test", test, "--crop-pct", 1,
            *(["--pool", column.pool] if column.pool else []),
            *(["--out", self.home / "runs" / f"{row.name}-{column.name}", "--resume"]
              if column.trains else []),
            "--seed", self.seed, *_options(options), "--json",
        ]  # fmt: skip
        proof = run / "config.json" if row.recipe else self.home / DATA / "teacher.json"
        return Job(
            self.name(f"evals/{row.name}/{column.name}"), f"eval {column.protocol}",
            _texts(*words), (self.name(f"runs/{row.name}" if row.recipe else DATA),), proof,
            seed=self.seed, row=row.name, column=column.name,
        )  # fmt: skip

    def _fine_tuning(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a fine-tuning with the teacher's crops, short where all is."""
        crops = self.scale.teacher.crops
        own = (f"flip={crops['flip']:g}", f"crop_scale={list(crops['scale'])}")
        short = {"epochs": 2} if self.scale.is_reduced else {}
        return {"set": (*options["set"], *own), **short}


def _texts(*words: Any) -> tuple[str, ...]:
    return tuple(map(str, words))


def _options(options: Mapping[str, Any]) -> list[Any]:
    """Return options as words; one of several values is given as often."""
    return [
        word
        for key, value in options.items()
        for each in (value if isinstance(value, tuple) else (value,))
        for word in (f"--{key}", each)
    ]


def _settings(settings: Mapping[str, Any]) -> list[Any]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
