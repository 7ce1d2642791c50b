"""From a table to jobs: which, in which order, by which words, and on how few caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from featcache import cli as featcache_cli
from featcache.errors import UsageError
from pipelines.ablate import finetune, models
from pipelines.ablate.plan import Job, digests, make_plan, row_settings
from pipelines.ablate.scales import CLIPART, DIGITS
from pipelines.ablate.table import Column, Ordering, Row, Table
from student import cli as student_cli
from student import evals

OUT = Path("tables/one")
KNN = Column("knn-mean", "k-NN mean", "knn", "mean", {"k": 5})
LINEAR = Column("linear", "linear", "linear")


def table(*rows: Row) -> Table:
    return Table("a table", rows, (KNN, LINEAR))


def plan(*rows: Row, seeds: tuple[int, ...] = (3,)) -> list[Job]:
    return make_plan(table(*rows), DIGITS, OUT, seeds)


def named(jobs: list[Job], name: str) -> Job:
    (found,) = (job for job in jobs if job.name == name)
    return found


def test_the_jobs_of_two_rows_and_two_seeds() -> None:
    jobs = plan(Row("teacher", "t"), Row("mae", "m", recipe="mae"), seeds=(3, 0))
    assert [(job.name, job.kind, job.after) for job in jobs[:7]] == [
        ("seed-3/data", "data", ()),
        ("seed-3/cache", "extract", ("seed-3/data",)),
        ("seed-3/runs/mae", "train mae", ("seed-3/cache",)),
        ("seed-3/evals/teacher/knn-mean", "eval knn", ("seed-3/data",)),
        ("seed-3/evals/teacher/linear", "eval linear", ("seed-3/data",)),
        ("seed-3/evals/mae/knn-mean", "eval knn", ("seed-3/runs/mae",)),
        ("seed-3/evals/mae/linear", "eval linear", ("seed-3/runs/mae",)),
    ]
    assert [job.name.replace("seed-0", "seed-3") for job in jobs[7:]] == [
        job.name for job in jobs[:7]
    ]


def test_the_words_of_each_kind_of_job() -> None:
    jobs = plan(Row("teacher", "t"), Row("align", "a", recipe="maskalign", settings={"lr": 0.001}))
    spec = "timm:vit_small_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4"
    home, train = "tables/one/seed-3", "tables/one/seed-3/data/data/train-*.tar"
    test, weights = f"{home}/data/data/test-*.tar", f"{home}/data/teacher.safetensors"
    assert list(named(jobs, "seed-3/data").words) == [
        "pipelines.digits", f"{home}/data", "--seed", "3", "--epochs", "20",
    ]  # fmt: skip
    assert list(named(jobs, "seed-3/cache").words) == [
        "featcache", "extract", "--teacher", spec, "--weights", weights, "--images", train,
        "--out", f"{home}/cache", "--views", "4", "--size", "32", "--scale", "0.7,1.0", "--flip",
        "0.0", "--batch-size", "256", "--seed", "3", "--levels", "last:3",
    ]  # fmt: skip
    assert list(named(jobs, "seed-3/runs/align").words) == [
        "student", "train", "--recipe", "maskalign", "--cache", f"{home}/cache", "--images", train,
        "--out", f"{home}/runs/align", "--epochs", str(DIGITS.epochs), "--batch-size", "64",
        "--seed", "3", "--resume", "--set", "encoder=tiny,embed_dim=128,depth=6,num_heads=4",
        "--set", "drop_path=0", "--set", "lr=0.001", "--set", "warmup_epochs=2", "--set",
        "level_weights=top:3",
    ]  # fmt: skip
    assert list(named(jobs, "seed-3/evals/align/knn-mean").words) == [
        "student", "eval", "knn", f"{home}/runs/align", "--images", train, "--test", test,
        "--crop-pct", "1", "--pool", "mean", "--seed", "3", "--k", "5", "--json",
    ]  # fmt: skip
    assert list(named(jobs, "seed-3/evals/teacher/linear").words) == [
        "student", "eval", "linear", "--teacher", spec, "--weights", weights, "--images", train,
        "--test", test, "--crop-pct", "1", "--seed", "3", "--epochs", "90", "--train-views", "0",
        "--batch-size",
        "256", "--blr", "2.7", "--json",
    ]  # fmt: skip


def test_an_untrained_student_takes_no_step() -> None:
    words = named(plan(Row("new", "n", recipe="mae", trained=False)), "seed-3/runs/new").words
    assert "--epochs" not in words
    assert words[words.index("--steps") + 1] == "0"


def test_rows_share_the_cache_that_serves_them_all() -> None:
    jobs = plan(
        Row("mae", "", recipe="mae"),
        Row("deep", "", recipe="maskalign", settings={"level_weights": "top:5"}),
        Row("milan", "", recipe="milan"),
        Row("small", "", recipe="milan", extract={"codec": "t4"}),
    )
    caches = {job.name: job.words for job in jobs if job.kind == "extract"}
    assert list(caches) == ["seed-3/cache", "seed-3/cache-codec-t4"]
    assert caches["seed-3/cache"][-2:] == ("--levels", "last:5")
    assert caches["seed-3/cache-codec-t4"][-4:] == ("--levels", "last:1", "--codec", "t4")
    assert named(jobs, "seed-3/runs/small").after == ("seed-3/cache-codec-t4",)
    assert named(jobs, "seed-3/runs/mae").after == ("seed-3/cache",)


@pytest.mark.parametrize("table", [models.TABLE, finetune.TABLE], ids=lambda table: table.title)
def test_a_table_reads_one_cache_a_seed(table: Table) -> None:
    for scale in (DIGITS, CLIPART):
        jobs = make_plan(table, scale, OUT, (0, 1))
        assert [job.name for job in jobs if job.kind == "extract"] == [
            "seed-0/cache",
            "seed-1/cache",
        ]
        assert len({job.name for job in jobs}) == len(jobs)


def test_a_recipe_is_given_the_settings_that_it_has() -> None:
    assert "jitter" not in row_settings(Row("", "", recipe="milan"), DIGITS)
    assert row_settings(Row("", "", recipe="milan"), DIGITS)["target"] == "f"
    caev2 = row_settings(Row("", "", recipe="caev2", settings={"loss": "mse"}), DIGITS)
    assert (caev2["jitter"], caev2["regressor_width"], caev2["loss"]) == (0, 128, "mse")
    assert "decoder_width" not in caev2


def test_a_digest_is_of_a_command_and_of_all_before_it() -> None:
    rows = (Row("mae", "m", recipe="mae"), Row("milan", "m", recipe="milan"))
    first = digests(plan(*rows), OUT)
    elsewhere = Path("other/place")
    moved = make_plan(table(*rows), DIGITS, elsewhere, (3,))
    assert digests(moved, elsewhere) == first
    longer = make_plan(table(*rows), replace(DIGITS, teacher_epochs=21), OUT, (3,))
    assert not set(digests(longer, OUT).values()) & set(first.values())
    other = digests(plan(rows[0], replace(rows[1], settings={"blr": 1e-3, "lr": "null"})), OUT)
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {
        "seed-3/runs/milan", "seed-3/evals/milan/knn-mean", "seed-3/evals/milan/linear",
    }  # fmt: skip


def _known_options(words: tuple[str, ...]) -> set[str]:
    if words[1] == "eval":
        from student.commands.eval import command

        known: Any = command.get_command(click.Context(command), words[2])
    else:
        program: Any = {"featcache": featcache_cli.cli, "student": student_cli.cli}[words[0]]
        known = program.get_command(click.Context(program), words[1])
    return {option for parameter in known.params for option in parameter.opts}


@pytest.mark.parametrize("table", [models.TABLE, finetune.TABLE], ids=lambda table: table.title)
@pytest.mark.parametrize("scale", [DIGITS, CLIPART], ids=lambda scale: scale.name)
def test_commands_and_their_options_exist(scale: Any, table: Table) -> None:
    for job in make_plan(table, scale, OUT, (0,))[1:]:
        given = {word for word in job.words if word.startswith("--")}
        assert given <= _known_options(job.words), job.name
    assert {column.protocol for column in table.columns} <= set(evals.names())


def test_what_is_fine_tuned_is_a_run_that_goes_on() -> None:
    jobs = make_plan(finetune.TABLE, DIGITS, OUT, (3,))
    job = named(jobs, "seed-3/evals/mae/finetune-shots")
    words = " ".join(job.words)
    home = OUT / "seed-3"
    assert words.startswith(
        f"student eval finetune {home}/runs/mae --images {home}/data/data/train-*.tar"
    )
    assert f"--out {home}/runs/mae-finetune-shots --resume --seed 3 --batch-size 20" in words
    assert "--set lr=0.001 --set layer_decay=0.75" in words
    assert words.endswith("--shots 10 --epochs 100 --json")
    short = make_plan(finetune.TABLE, DIGITS.reduced(), OUT, (3,))
    assert named(short, "seed-3/evals/mae/finetune-all").words[-3:] == ("--epochs", "2", "--json")


def test_an_ordering_names_rows_and_columns_of_its_table() -> None:
    row = Row("mae", "m", recipe="mae")
    for order in (
        Ordering("mea", "mae", "linear", ""),
        Ordering("mae", "mea", "linear", ""),
        Ordering("mae", "mae", "linaer", ""),
    ):
        with pytest.raises(UsageError, match="an ordering names"):
            Table("", (row,), (LINEAR,), (order,))
