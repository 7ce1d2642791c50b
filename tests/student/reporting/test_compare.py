"""Pairs of runs that differ in exactly one thing: `student compare` names it, and nothing else; of
equal pairs it names nothing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from student.reporting import differences
from tests import finetuning as ft
from tests import student_fixtures as fx

BASE = ("--steps", "4", "--batch-size", "8", "--seed", "0", "--precision", "fp32")


def few_pictures() -> Path:
    """20 of the 24 pictures."""
    folder = fx.root() / "few"
    if not folder.exists():
        shutil.copytree(fx.pictures(), folder)
        for path in sorted(folder.iterdir())[20:]:
            path.unlink()
    return folder


# one thing -> the options that change it, the group and the keys that are told
TRAINED: dict[str, tuple[tuple[Any, ...], dict[str, set[str]]]] = {
    "cache": (("--cache", fx.ranked_path), {"cache identity": {"targets.id"}}),
    "views": (("--scale", "0.3,1"), {"view schedule": {"targets.crops.left_out"}}),
    "seed": (("--seed", "1"), {"seed": {"seed"}}),
    "sampling": (("--sampling", "block"), {"sampling": {"data.sampling"}}),
    "aug_repeats": (("--aug-repeats", "2"), {"aug_repeats": {"data.aug_repeats"}}),
    "steps": (("--steps", "5"), {"steps": {"steps", "steps made"}}),
    "batch": (("--batch-size", "12"), {"effective batch": {"data.global_batch"}}),
    "pictures": (("--images", few_pictures), {"pictures": {"data.keys_digest"}}),
}
# told, and still an ablation
ALLOWED: dict[str, tuple[tuple[Any, ...], set[str]]] = {
    "ema": (("--ema", "0.9"), {"ema"}),
    "precision": (("--precision", "bf16"), {"precision"}),
    "micro-batches": (
        ("--batch-size", "4", "--accumulate", "2"),
        {"running.batch_size", "running.accumulate"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return train(folder / "base")


def train(out: Path, *options: Any, sets: tuple[str, ...] = ()) -> Path:
    given = [str(each() if callable(each) else each) for each in options]
    words = dict(zip(BASE[::2], BASE[1::2], strict=True))
    words |= {"--cache": str(fx.cache_path()), "--images": str(fx.pictures())}
    words |= dict(zip(given[::2], given[1::2], strict=True))
    fx.good(fx.train("mae", out, *(part for pair in words.items() for part in pair), sets=sets))
    return out


def compare(*runs: Path) -> tuple[int, dict[str, Any]]:
    ran = fx.stud("compare", *runs, "--json")
    assert "Traceback" not in ran.err
    return ran.status, ran.json


# --- runs as they are trained ---------------------------------------------------------------------


def test_equal_runs_differ_in_nothing(folder: Path, base: Path) -> None:
    status, found = compare(base, train(folder / "again"))
    assert (status, found["verdict"]) == (0, "no setting differs")
    assert (found["held"], found["settings"], found["told"]) == ({}, {}, {})
    assert [each["step"] for each in found["losses"]] == [1, 2, 3, 4]
    assert [each["values"] for each in found["losses"]] == [
        [loss, loss] for loss in fx.losses(base)
    ]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("thing", TRAINED)
def test_what_must_be_the_same_is_named_alone(thing: str, folder: Path, base: Path) -> None:
    options, expected = TRAINED[thing]
    status, found = compare(base, train(folder / thing, *options))
    assert status == 1
    assert found["ablation"] is False
    assert list(found["held"]) == list(expected)
    for group, keys in expected.items():
        assert keys <= set(found["held"][group])
    assert found["verdict"] == f"not an ablation: {next(iter(expected))}"
    assert found["settings"] == {}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("thing", ALLOWED)
def test_what_changes_rounding_alone_is_told(thing: str, folder: Path, base: Path) -> None:
    options, expected = ALLOWED[thing]
    status, found = compare(base, train(folder / thing, *options))
    assert (status, found["held"], found["settings"]) == (0, {}, {})
    assert set(found["told"]) == expected


def test_a_setting_is_what_an_ablation_is_of(folder: Path, base: Path) -> None:
    other = train(folder / "ratio", sets=("mask_ratio=0.5",))
    status, found = compare(base, other)
    assert (status, found["verdict"]) == (0, "an ablation of: mask_ratio")
    assert found["settings"] == {"mask_ratio": [0.75, 0.5]}
    ran = fx.good(fx.stud("compare", base, other))
    assert ran.out.startswith("an ablation of: mask_ratio\n")
    assert "setting  mask_ratio" in ran.out


def test_the_settings_of_another_recipe_are_told_as_missing(folder: Path, base: Path) -> None:
    out = folder / "kd"
    cache = ("--cache", fx.cache_path(), "--images", fx.pictures())
    fx.good(fx.train("kd", out, *BASE, *cache))
    ran = fx.good(fx.stud("compare", base, out))
    assert "losses of different recipes have different scales" in ran.out
    status, found = compare(base, out)
    assert (status, found["settings"]["recipe"]) == (0, ["mae", "kd"])
    assert found["settings"]["decoder_depth"] == [1, None]


@pytest.mark.slow
def test_fine_tuned_runs_may_differ_in_what_they_began_from(tmp_path: Path) -> None:
    """Settings that the result repeats are those of the run, and no other evaluation."""
    runs = [tmp_path / "one", tmp_path / "two"]
    fx.good(ft.finetune("mae", runs[0]))
    fx.good(ft.finetune("mae", runs[1], sets=("smoothing=0.2",)))
    status, found = compare(*runs)
    assert (status, found["verdict"]) == (0, "an ablation of: smoothing")
    assert [each["label"] for each in found["scores"]] == ["finetune/test"]
    assert None not in found["scores"][0]["values"]
    assert "begun.recipe" not in str(found["settings"])


# --- records and results, changed by hand ---------------------------------------------------------

RESULT: dict[str, Any] = {
    "time": "2026-01-02T03:04:05Z", "run": "r", "protocol": "linear", "test": "val", "n_test": 50,
    "score": 61.5, "interval": [48.0, 74.0], "checkpoint": 4, "recipe": "mae",
    "settings": {"blr": 0.1, "pool": "cls", "images": "train/", "tests": {"val": "val/"}},
}  # fmt: skip


def changed(key: str, value: Any) -> dict[str, Any]:
    """The result with another value at a dotted name."""
    row = inner = copy.deepcopy(RESULT)
    *place, name = key.split(".")
    for part in place:
        inner = inner[part]
    inner[name] = value
    return row


def judged(base: Path, out: Path, *rows: dict[str, Any]) -> Path:
    """The same run with these results."""
    shutil.copytree(base, out)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("settings.blr", 0.2, "linear.settings.blr"),
        ("settings.pool", "mean", "linear.settings.pool"),
        ("settings.tests.val", "other/", "linear.pictures"),
        ("n_test", 49, "linear.n_test"),
        ("test", "elsewhere", "linear.test"),
        ("checkpoint", 3, "linear.checkpoint"),
        ("ema", True, "linear.ema"),
    ],
)
def test_another_evaluation_is_named_alone(
    key: str, value: Any, told: str, base: Path, tmp_path: Path
) -> None:
    row = changed(key, value)
    if key == "test":
        row["settings"]["tests"] = {value: "val/"}
    runs = judged(base, tmp_path / "a", RESULT), judged(base, tmp_path / "b", row)
    status, found = compare(*runs)
    assert (status, found["verdict"]) == (1, "not an ablation: evaluation")
    assert list(found["held"]["evaluation"]) == [told]


def test_equal_evaluations_stand_in_one_line(base: Path, tmp_path: Path) -> None:
    """A newer result replaces an older one; other scores and another protocol are no difference,
    and neither is a second test set beside the first."""
    newer = {**RESULT, "score": 70.0, "interval": [57.0, 81.0]}
    both = {**RESULT, "settings": {**RESULT["settings"], "tests": {"val": "val/", "b": "b/"}}}
    knn = {**RESULT, "protocol": "knn", "settings": {"k": 20}}
    runs = judged(base, tmp_path / "a", RESULT, newer), judged(base, tmp_path / "b", both, knn)
    status, found = compare(*runs)
    assert (status, found["held"]) == (0, {})
    assert [(each["label"], each["values"]) for each in found["scores"]] == [
        ("knn/val", [None, {"score": 61.5, "interval": [48.0, 74.0]}]),
        (
            "linear/val",
            [
                {"score": 70.0, "interval": [57.0, 81.0]},
                {"score": 61.5, "interval": [48.0, 74.0]},
            ],
        ),
    ]
    assert "70.00 [57.00, 81.00]  61.50 [48.00, 74.00]" in fx.stud("compare", *runs).out


def test_three_runs_need_one_evaluation_in_common(base: Path, tmp_path: Path) -> None:
    mean = changed("settings.pool", "mean")
    runs = [
        judged(base, tmp_path / "a", RESULT, mean),
        judged(base, tmp_path / "b", RESULT),
        judged(base, tmp_path / "c", mean),
    ]
    status, found = compare(*runs)
    assert (status, list(found["held"])) == (1, ["evaluation"])
    assert compare(*runs[:2])[0] == compare(runs[0], runs[2])[0] == 0
    labels = [each["label"] for each in found["scores"]]
    assert labels == ["linear/val pool=cls", "linear/val pool=mean"]


def test_a_run_that_is_not_at_its_end_is_no_ablation(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoints")
    lines = (base / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half/metrics.jsonl").write_text("".join(lines[:2]))
    status, found = compare(base, tmp_path / "half")
    assert (status, found["held"]) == (1, {"steps": {"steps made": [4, 2]}})


@pytest.mark.parametrize("key", ["of_tomorrow", "targets.of_tomorrow", "data.of_tomorrow"])
def test_what_later_versions_record_is_never_passed_over(
    key: str, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "new")
    record = json.loads((base / "config.json").read_text())
    place, _, name = key.rpartition(".")
    (record[place] if place else record)[name] = 1
    (tmp_path / "new/config.json").write_text(json.dumps(record))
    status, found = compare(base, tmp_path / "new")
    assert (status, [list(keys) for keys in found["held"].values()]) == (1, [[key]])
    assert list(found["held"].values()) == [{key: [None, 1]}]


def test_every_key_that_a_run_records_has_a_rule(base: Path) -> None:
    record = json.loads((base / "config.json").read_text())
    found = differences.compare([record, {}])
    assert differences.OTHER not in found
    assert set(found["pictures"]) == {"data.pictures", "data.keys_digest"}
    assert set(found["cache identity"]) >= {"targets.kind", "targets.id"}


# --- mistakes -------------------------------------------------------------------------------------


def test_one_run_is_a_mistake_of_the_command(base: Path) -> None:
    ran = fx.stud("compare", base)
    assert ran.status == 2
    assert "give two or more" in ran.line


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_damaged_run_is_one_line(name: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "bad" / name).write_text("{\n")
    ran = fx.stud("compare", base, tmp_path / "bad")
    assert (ran.status, ran.out) == (1, "")
    assert name in ran.line
    (tmp_path / "bad" / name).unlink()
    assert name in fx.stud("compare", base, tmp_path / "bad").line


def test_a_strangers_text_does_not_reach_the_terminal(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "x")
    record = json.loads((base / "config.json").read_text())
    record["config"]["a\x1b[31m\n<b>"] = "\x9b\u202e" * 200
    record["recipe"] = "\x1b]0;mine\x07"
    (tmp_path / "x/config.json").write_text(json.dumps(record))
    row = {**RESULT, "test": "v\x1b[2J\nal"}
    (tmp_path / "x/results.jsonl").write_text(json.dumps(row) + "\n")
    for options in ((), ("--json",)):
        ran = fx.stud("compare", base, tmp_path / "x", *options)
        assert ran.status == 0
        assert all(char.isprintable() or char == "\n" for char in ran.out + ran.err)
    ran = fx.stud("compare", base, tmp_path / "x")
    assert len([line for line in ran.out.splitlines() if "<b>" in line]) == 2  # verdict and row
