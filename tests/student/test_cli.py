"""The student command: help, names, settings, JSON, one-line errors, exit statuses, and the
evaluations over a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import student.cli
from student import config, evals, recipes
from tests import student_fixtures as fx

ONE = ("--steps", "1", "--batch-size", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    fx.good(
        fx.train("maskalign", path, "--cache", fx.cache_path(), "--steps", "4", "--batch-size", "8")
    )
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fx.save_pictures(tmp_path_factory.mktemp("labelled") / "p", 60, seed=4, classes=3)


# --- help and names -------------------------------------------------------------------------------


def commands() -> list[tuple[str, ...]]:
    group = student.cli.cli
    context = click.Context(group)
    found: list[tuple[str, ...]] = [()]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, sub) for sub in command.list_commands(context)]
    return found


def test_the_commands() -> None:
    assert set(commands()) >= {
        ("train",),
        ("recipes",),
        ("eval",),
        ("eval", "knn"),
        ("eval", "linear"),
    }


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_an_example_that_names_real_options(command: tuple[str, ...]) -> None:
    ran = fx.stud(*command, "--help")
    assert ran.status == 0
    assert ran.err == ""
    if command in ((), ("eval",)):
        return
    assert f"student {' '.join(command)}" in ran.out.split("Example", 1)[1]
    used = {word for word in ran.out.split("Example", 1)[1].split() if word.startswith("--")}
    assert used <= {
        word.rstrip(",") for word in ran.out.split("Example", 1)[0].split() if word.startswith("--")
    }


def test_the_documented_options_of_train() -> None:
    text = fx.stud("train", "--help").out
    for option in ("--recipe", "--cache", "--images", "--out", "--epochs", "--steps",
                   "--batch-size", "--seed", "--teacher", "--config", "--set", "--resume",
                   "--dry-run", "--json", "--decode", "--direct", "--verify-rows", "--read-threads",
                   "--ema", "--compile", "--checkpoint-activations", "--skip-nonfinite",
                   "--tracker", "--deterministic"):  # fmt: skip
        assert option in text, option
    assert "up to 2 GiB is verified whole" in " ".join(text.split())


def test_without_a_command_help_is_shown() -> None:
    ran = fx.stud()
    assert ran.status == 2
    assert "train" in ran.err + ran.out


def test_an_unknown_recipe_offers_near_names() -> None:
    for words in (("train", "--recipe", "mralgin"), ("recipes", "mralgin")):
        ran = fx.stud(*words)
        assert ran.status == 2
        assert "'mralgin'" in ran.line
        assert "did you mean mralign" in ran.line
        assert all(name in ran.line for name in recipes.names())


def test_an_unknown_eval_offers_near_names(run: Path) -> None:
    ran = fx.stud("eval", "lineer", run)
    assert ran.status == 2
    assert "did you mean linear" in ran.line
    assert all(name in ran.line for name in evals.names())


def test_an_unknown_command_and_an_unknown_option() -> None:
    assert fx.stud("trian").status == 2
    ran = fx.stud("train", "--recipies", "mae")
    assert ran.status == 2
    assert "--recipies" in ran.line


def test_an_unknown_setting_offers_near_keys(tmp_path: Path) -> None:
    for words in (
        ("train", "--recipe", "mralign", "--out", tmp_path / "run"),
        ("recipes", "mralign"),
    ):
        ran = fx.stud(*words, "--set", "mask_ration=0.5")
        assert ran.status == 2
        assert "did you mean mask_ratio" in ran.line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting", ["mask_ratio=2", "epochs=ten", "mask=attentiv", "drop_path", "betas=[0.9]"]
)
def test_a_setting_that_cannot_be_is_told_first(setting: str, tmp_path: Path) -> None:
    """Before anything is opened: not even the cache exists here."""
    ran = fx.stud("train", "--recipe", "mralign", "--cache", tmp_path / "nowhere", "--set", setting)
    assert ran.status == 2
    assert setting.split("=")[0] in ran.line


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_lists_each_with_a_line() -> None:
    table = fx.stud("recipes").out
    assert [line.split()[0] for line in table.splitlines()] == recipes.names()
    titles = fx.stud("recipes", "--json").json
    assert list(titles) == recipes.names()
    assert table == "".join(f"{name:12}{title}\n" for name, title in titles.items())
    assert titles["cae"].startswith("CAE: ")
    assert all(title.endswith(".") for title in titles.values())  # whole sentences


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipes_paper_trail_and_configuration(name: str) -> None:
    ran = fx.good(fx.stud("recipes", name))
    module = recipes.load(name)
    assert (module.__doc__ or "").strip() in ran.out
    lines = ran.out.split("\n\n")[-1].splitlines()
    assert max(map(len, lines)) <= 80
    shown = dict(line.split(" = ", 1) for line in lines if not line.startswith("    "))
    assert {key: json.loads(value) for key, value in shown.items()} == config.as_dict(
        module.Config()
    )
    changed = fx.stud("recipes", name, "--set", "epochs=7", "--json").json
    assert changed == {**config.as_dict(module.Config()), "epochs": 7}


# --- train ----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    ran = fx.good(fx.train("mralign", tmp_path / "run", "--cache", fx.cache_path(),
                           "--batch-size", "5", "--dry-run", "--epochs", "7", "--json",
                           home=tmp_path / "home"))  # fmt: skip
    facts = ran.json
    assert (facts["pictures"], facts["global_batch"], facts["steps_per_epoch"], facts["steps"]) == (
        24,
        5,
        4,
        28,
    )
    assert facts["recipe"] == "mralign"
    assert 0 < facts["encoder_parameters"] < facts["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_only_thing_on_stdout(tmp_path: Path) -> None:
    ran = fx.good(
        fx.train("maskalign", tmp_path / "run", "--cache", fx.cache_path(), *ONE, "--json")
    )
    assert ran.json["run"] == str(tmp_path / "run")
    assert ran.json["steps"] == 1
    assert ran.json["loss"] == pytest.approx(fx.losses(tmp_path / "run")[-1], abs=1e-6)


def test_the_recipe_is_mralign_where_none_is_given(tmp_path: Path) -> None:
    """No cache serves it here, and the line that says so names it."""
    ran = fx.stud("train", "--images", fx.pictures(), home=tmp_path / "home")
    assert ran.status == 1
    assert "mralign" in ran.line


def test_no_pictures_and_no_cache(tmp_path: Path) -> None:
    """mae needs no cache, but pictures: the line says what SRC may be and that a variable sets a
    default."""
    ran = fx.train("mae", tmp_path / "run", *ONE, home=tmp_path / "home")
    assert ran.status == 2
    assert all(part in ran.line for part in ("--images SRC", "webdataset", "FEATCACHE_IMAGES"))


def test_the_variable_sets_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**fx.environment(tmp_path / "home"), "FEATCACHE_IMAGES": str(fx.pictures())}
    monkeypatch.setattr(fx, "environment", lambda home=None: given)
    fx.good(
        fx.train(
            "mae", tmp_path / "run", *ONE, "--policy", fx.policy_file(), sets=("patch_size=8",)
        )
    )


@pytest.mark.parametrize("where", ["nowhere", "empty", "file"])
def test_no_pictures_found(where: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no tar")
    ran = fx.train("mae", tmp_path / "run", *ONE, "--images", tmp_path / where)
    assert ran.status == 1
    assert where in ran.line


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_no_cache_there(where: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = fx.train("maskalign", tmp_path / "run", *ONE, "--cache", tmp_path / where)
    assert ran.status == 1
    assert "manifest.json is missing" in ran.line


def test_a_cache_of_another_picture_list(tmp_path: Path) -> None:
    others = fx.save_pictures(tmp_path / "others", 9, seed=9, classes=2)
    ran = fx.train(
        "maskalign", tmp_path / "run", *ONE, "--cache", fx.cache_path(), "--images", others
    )
    assert ran.status == 1
    assert "9 of 9 pictures" in ran.line
    assert "c0/p00" in ran.line


def test_pictures_that_moved(tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(fx.pictures(), tmp_path / "p"))
    fx.extract(pictures, tmp_path / "c")
    pictures.rename(tmp_path / "q")
    ran = fx.train("maskalign", tmp_path / "run", *ONE, "--cache", tmp_path / "c")
    assert ran.status == 1
    assert str(pictures) in ran.line
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "run",
            *ONE,
            "--cache",
            tmp_path / "c",
            "--images",
            tmp_path / "q",
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--weights", "random:0"),
        ("--teacher-name", "./mine.py"),
        ("--views", "2"),
        ("--policy", "caev2"),
        ("--size", "48"),
    ],
    ids=lambda pair: pair[0],
)
def test_options_of_the_teacher_in_the_loop_do_not_fit_a_cache(
    options: tuple[str, str], tmp_path: Path
) -> None:
    ran = fx.train("maskalign", tmp_path / "run", *ONE, "--cache", fx.cache_path(), *options)
    assert ran.status == 2
    assert options[0] in ran.line


def test_steps_and_epochs_are_two_ways_to_say_one_thing(tmp_path: Path) -> None:
    ran = fx.train("maskalign", tmp_path / "run", *ONE, "--epochs", "2", "--cache", fx.cache_path())
    assert ran.status == 2


def test_a_broken_config_file(tmp_path: Path) -> None:
    for text in ("{", "[1]", "7"):
        (tmp_path / "c.json").write_text(text)
        ran = fx.train("maskalign", tmp_path / "run", *ONE, "--config", tmp_path / "c.json")
        assert ran.status in (1, 2)
        assert "c.json" in ran.line


@pytest.mark.slow
def test_the_command_is_a_program_too(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "student", "train", "--recipe", "mralgin"],
        capture_output=True, text=True, env=fx.environment(tmp_path), check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr


# --- eval -----------------------------------------------------------------------------------------

KNN = ("--k", "5")
LINEAR = (
    "--epochs",
    "20",
    "--warmup-epochs",
    "2",
    "--train-views",
    "0",
    "--blr",
    "3",
    "--batch-size",
    "16",
)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("name", "options"), [("knn", KNN), ("linear", LINEAR)])
def test_eval_of_a_run(name: str, options: tuple[str, ...], run: Path, labelled: Path) -> None:
    ran = fx.good(
        fx.stud("eval", name, run, "--images", labelled, "--json", "--device", "cpu", *options)
    )
    facts = ran.json
    assert facts["eval"] == name
    assert facts["of"] == str(run)
    assert facts["n_train"] + facts["n_test"] == 60
    assert 0 < facts["n_test"] < 30
    assert 0 <= facts["top1"] <= 100
    again = fx.stud(
        "eval", name, run, "--images", labelled, "--json", "--device", "cpu", *options
    ).json
    del again["seconds"], facts["seconds"]
    assert again == facts


@pytest.mark.parametrize(("name", "options"), [("knn", KNN), ("linear", LINEAR)])
def test_eval_of_a_teacher_in_place_of_a_run(
    name: str, options: tuple[str, ...], labelled: Path
) -> None:
    """The synthetic teacher's features are colours, and the classes differ in colour."""
    words = (
        "eval",
        name,
        "--teacher",
        fx.TEACHER,
        "--images",
        labelled,
        "--json",
        "--device",
        "cpu",
        *options,
    )
    facts = fx.good(fx.stud(*words)).json
    assert facts["of"] == fx.TEACHER
    assert facts["top1"] > 60


def test_eval_and_train_say_what_the_pictures_source_passes_over(tmp_path: Path) -> None:
    pictures = fx.save_pictures(tmp_path / "pictures", 30, seed=3, classes=3)
    (pictures / "more.gif").write_bytes(b"GIF89a")
    said = f"note: pictures {str(pictures)!r}: passed over files with other suffixes (1"
    words = ("--teacher", fx.TEACHER, "--images", pictures, "--json", "--device", "cpu", "--k", "1")
    ran = fx.good(fx.stud("eval", "knn", *words))
    assert ran.err.count(said) == 1
    assert ran.json["passed_over"] == [
        {"reason": "files with other suffixes", "count": 1, "first": "more.gif"}
    ]
    ran = fx.good(fx.train("mae", tmp_path / "run", "--images", pictures, "--steps", "1"))
    assert ran.err.count(said) == 1


@pytest.mark.slow
def test_knn_of_a_run_by_hand(run: Path, labelled: Path, tmp_path: Path) -> None:
    """1-NN on given train and test folders: the encoder run directly, cosines in numpy, the nearest
    class."""
    import torch
    from PIL import Image

    from student import checkpoint

    test = fx.save_pictures(tmp_path / "test", 15, seed=77, classes=3)
    words = (
        "--images",
        labelled,
        "--test",
        test,
        "--k",
        "1",
        "--device",
        "cpu",
        "--crop-pct",
        "1",
        "--json",
    )
    facts = fx.good(fx.stud("eval", "knn", run, *words)).json
    encoder: Any = checkpoint.load_encoder(run)[0]

    def embed(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        rows, labels = [], []
        for path in sorted(folder.rglob("*.png")):
            with Image.open(path) as opened:
                width, height = opened.size
                scale = 32 / min(width, height)
                size = (max(32, round(width * scale)), max(32, round(height * scale)))
                picture = opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
            pixels = np.asarray(picture.crop((left, top, left + 32, top + 32))) / 255
            pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            x = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
            with torch.no_grad():
                row = encoder.forward_features(x)[0, 0].double().numpy()
            rows.append(row / np.linalg.norm(row))
            labels.append(int(path.parent.name[1:]))
        return np.stack(rows), np.array(labels)

    (bank, bank_labels), (queries, labels) = embed(labelled), embed(test)
    found = bank_labels[(queries @ bank.T).argmax(1)]
    assert facts["top1"] == pytest.approx(100 * float((found == labels).mean()), abs=1e-3)
    assert facts["n_test"] == 15


def test_eval_takes_one_of_run_and_teacher(run: Path, labelled: Path) -> None:
    for words in ((), (run, "--teacher", fx.TEACHER)):
        ran = fx.stud("eval", "knn", *words, "--images", labelled)
        assert ran.status == 2
        assert "--teacher" in ran.line


def test_eval_on_what_is_not_there(run: Path, labelled: Path, tmp_path: Path) -> None:
    for words, told in (
        ((tmp_path / "norun", "--images", labelled), "norun"),
        ((run, "--images", fx.pictures()), "no labels"),
        ((run, "--images", tmp_path / "nowhere"), "nowhere"),
    ):
        ran = fx.stud("eval", "knn", *words, "--k", "1")
        assert ran.status == 1
        assert told in ran.line
    ran = fx.stud("eval", "knn", run)
    assert ran.status == 2
    assert "FEATCACHE_IMAGES" in ran.line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lr", "1e-3"), "unknown option '--lr': it is a setting of the recipe: --set lr=VALUE"),
        (("--mask-ratio=1",), "a setting of the recipe: --set mask_ratio=VALUE"),
        (("--foo",), "unknown option '--foo': did you mean"),
        (("--set", "lr", "1e-3"), "unexpected argument '1e-3': to go on with a run"),
        (("runs/a",), "unexpected argument 'runs/a'"),
    ],
)
def test_what_is_given_in_the_wrong_place_is_told_its_own(
    words: tuple[str, ...], told: str
) -> None:
    ran = fx.stud("train", *words)
    assert ran.status == 2
    assert told in ran.line
