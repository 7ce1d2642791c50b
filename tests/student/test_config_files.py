"""`student train --config` takes options and settings, and `student eval` its options."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from featcache.console import config_file
from featcache.errors import UsageError
from student.checkpoint import read_config
from student.commands.train import command as train
from student.recipes import maskalign
from student.settings import Settings
from student.setup.options import Options, user_settings
from tests import student_fixtures as fx

ONE = ("--steps", "1", "--batch-size", "4")


def printed(*words: Any) -> str:
    return fx.good(fx.stud(*words, "--print-config")).out


def config(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_config(run)["config"]
    return values


def entries(text: str) -> list[str]:
    """The lines that say something, less the header with the program's name."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_run_of_a_file_is_the_run_of_its_command_line(tmp_path: Path) -> None:
    words = ("--recipe", "maskalign", "--cache", fx.cache_path(), *ONE, "--device", "cpu")
    sets = [
        f"--set={text}" for text in (*fx.RECIPES["maskalign"], "lr=1e-3", "align_levels=last:3")
    ]
    text = printed("train", *words, *sets, "--out", tmp_path / "a")
    (tmp_path / "a.yaml").write_text(text)
    assert entries(printed("train", "--config", tmp_path / "a.yaml")) == entries(text)
    fx.good(fx.stud("train", *words, *sets, "--out", tmp_path / "a"))
    fx.good(fx.stud("train", "--config", tmp_path / "a.yaml", "--out", tmp_path / "b"))
    assert read_config(tmp_path / "a") == read_config(tmp_path / "b")
    assert config(tmp_path / "b")["lr"] == 1e-3
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    options = json.loads((tmp_path / "b/environment.json").read_text())["options"]
    assert options["set"]["lr"] == 1e-3
    assert (options["steps"], options["out"]) == (1, str(tmp_path / "b"))
    assert "accumulate" in options  # the file has it
    options = json.loads((tmp_path / "a/environment.json").read_text())["options"]
    assert "accumulate" not in options


@pytest.mark.parametrize(
    "text",
    [
        "lr: 1e-3\nepochs: 3\nmask_ratio: 0.5",
        "set:\n  lr: 1e-3\n  mask_ratio: 0.5\nepochs: 3",
        "set: {lr: 1e-3, mask_ratio: .5, epochs: 3}",
        "config: {lr: 0.001, epochs: 3, mask_ratio: 0.5}\nseed: 7\nrecipe: kd\nsteps: 5",
    ],
)
def test_settings_stand_beside_options_or_below_set(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    words = ("train", "--recipe", "maskalign", "--config", path)
    shown = printed(*words)
    (tmp_path / "b.yaml").write_text(shown)
    assert entries(printed("train", "--config", tmp_path / "b.yaml")) == entries(shown)
    lines = {line.strip() for line in entries(shown)}
    assert {"lr: 0.001", "mask_ratio: 0.5", "epochs: 3", "seed: 0", "recipe: maskalign"} <= lines
    # the command line wins
    assert "epochs: 9" in map(str.strip, entries(printed(*words, "--set", "epochs=9")))
    assert "epochs: 8" in entries(printed(*words, "--epochs", 8))
    assert "  epochs: 3" in entries(printed(*words, "--steps", 1))
    assert "  lr: 0.1" in entries(printed(*words, "--set", "lr=0.1"))


def test_names_that_are_option_and_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"teacher": "dino-b16", "decoder": "mae"}))
    shown = entries(printed("train", "--recipe", "milan", "--config", path))
    assert {"teacher: cached", "  teacher: dino-b16", "  decoder: mae"} <= set(shown)
    path.write_text(json.dumps({"teacher": "online", "decoder": "pillow"}))
    shown = entries(printed("train", "--recipe", "milan", "--config", path))
    assert {"teacher: online", "decoder: pillow"} <= set(shown)
    path.write_text(json.dumps({"mask": "uniform", "set": {"mask": "topk"}}))
    assert "'mask' is there twice" in fx.stud("train", "--recipe", "milan", "--config", path).line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "batch-sise: 4",
            "unknown key 'batch-sise', neither setting nor option: did you mean batch",
        ),
        ("mask_ration: 0.5", "did you mean mask_ratio"),
        ("lr: fast", 'cannot set lr: given "fast"; allowed: float or null'),
        ("lr: 012", 'cannot set lr: given "012"'),
        ("set: {betas: [0.9]}", "cannot set betas"),
        ("set: {mask: attentiv}", "attentive"),
        ("set: [lr=1]", "settings by name are needed"),
        ("mixup: 0.5", "a mixture"),
        ("batch-size: 0", "batch-size: 0 is not in the range"),
        ("recipe: ./mine.py", "give --recipe there as well"),
        ("teacher-name: ./mine.py", "give --teacher-name there as well"),
    ],
)
def test_a_mistake_names_file_and_key(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    words = () if text.startswith("recipe") else ("--recipe", "maskalign")
    ran = fx.stud("train", *words, "--config", path, "--out", tmp_path / "run")
    assert ran.status == 2
    assert "a.yaml" in ran.line
    assert told in ran.line
    assert not (tmp_path / "run").exists()


def test_a_call_without_a_command_reads_settings_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    given = {each.name: None for each in fields(Options)} | {"settings": ()}

    def settings() -> Settings:
        file = {"file_settings": config_file.read_settings(path)}
        return user_settings(maskalign.Config, Options(**{**given, **file}))

    path.write_text("lr: 1e-3\nset: {mask: topk}\n")
    assert settings().values == {"lr": 1e-3, "mask": "topk"}
    path.write_text("seed: 3")
    with pytest.raises(UsageError, match=r"a\.yaml.*unknown key 'seed'"):
        settings()


def test_settings_are_those_of_the_default_recipe(tmp_path: Path) -> None:
    assert "mralign" in fx.good(fx.stud("train", "--set", "lr=1", "--print-config")).out
    assert entries(printed("train", "--seed", 3))


def test_nothing_is_done_before_it_is_printed(tmp_path: Path) -> None:
    words = ["--recipe", "mae", "--images", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    ran = CliRunner().invoke(train, [*words, "--print-config"], help_option_names=["-h", "--help"])
    assert ran.exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_evaluations_take_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: runs/x\nimages: p\nneighbours: 3\n")
    assert "unknown key 'neighbours'" in fx.stud("eval", "knn", "--config", path).line
    path.write_text("run: runs/x\nimages: p\nk: 3\nshots: 2\n")
    shown = printed("eval", "knn", "--config", path, "--fraction", "0.5")
    assert {"run: runs/x", "images: p", "k: '3'", "fraction: 0.5"} <= set(entries(shown))
    assert "# shots:" in shown
    path.write_text("run: runs/x\nset: {img_size: 384, lr: 1e-3}\ndrop_path: 0.2\n")
    shown = printed("eval", "finetune", "--config", path, "--set", "lr=0.1")
    assert {"  img_size: 384", "  lr: 0.1", "  drop_path: 0.2"} <= set(entries(shown))
    path.write_text("teacher: open_clip:local-dir:x\nimages: p\n")
    assert "give --teacher there as well" in fx.stud("eval", "knn", "--config", path).line


def test_what_stands_beside_a_config_that_is_no_runs_is_not_dropped(tmp_path: Path) -> None:
    """A run's config.json has much beside `config`; a file with a seed of its own is none."""
    path = tmp_path / "a.yaml"
    path.write_text("config: {mask_ratio: 0.5}\nseed: 3\n")
    ran = fx.stud("train", "--recipe", "kd", "--config", path, "--print-config")
    assert ran.status == 2
    assert "'seed' stands beside it" in ran.err
    assert "below set" in ran.err
    path.write_text("config: {mask_ratio: 0.5}\n")
    assert fx.stud("train", "--recipe", "kd", "--config", path, "--print-config").status == 0
