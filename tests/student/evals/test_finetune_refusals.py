"""What `student eval finetune` refuses is one line with the right exit status, before anything is
written; what it makes serves the other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import UserError
from student.features.finetuned import load_classifier
from tests import finetuning as ft
from tests import student_fixtures as fx
from tests.conftest import files_below
from tests.student.evals.test_finetune import images_of


def flat() -> Path:
    place = fx.root() / "ft-flat"
    return place if place.exists() else fx.save_pictures(place, 8)


def one_class() -> Path:
    place = fx.root() / "ft-one"
    return place if place.exists() else fx.save_pictures(place, 8, classes=1)


def strange() -> Path:
    """Test pictures of classes that no training picture has."""
    place = fx.root() / "ft-strange"
    return place if place.exists() else fx.save_pictures(place, 9, classes=9)


Option = Any  # a word, or a function that makes it

REFUSED: list[tuple[str, tuple[Option, ...], int, str]] = [
    ("mae", ("--images", flat), 1, "its 8 pictures have no labels"),
    ("mae", ("--images", one_class), 1, "are of one class, two at least are needed"),
    ("mae", ("--test", flat), 1, "its 8 pictures have no labels"),
    (
        "mae",
        ("--test", strange),
        1,
        "4 of its classes have no training pictures",
    ),
    ("mae", ("--test", ft.test_pictures, "--subset", "x"), 2, "'x' is no test set"),
    ("mae", ("--teacher", "clip-b16"), 2, "either RUN, a run folder, or --teacher SPEC"),
    ("mae", ("--weights", "x.pt"), 2, "--weights is about --teacher"),
    ("mae", ("--checkpoint", 9), 2, "has no checkpoint of step 9; there are those of 1, 2"),
    ("mae", ("--batch-size", 21), 1, "one step takes 21 pictures"),
    ("mae", ("--batch-size", 8, "--accumulate", 3), 1, "one step takes 24 pictures"),
    ("mae", ("--shots", 1, "--fraction", 0.5), 2, "--shots and --fraction: one of them"),
    ("mae", ("--shots", 100), 1, "cannot take 100 pictures of each class"),
    ("mae", ("--set", "classes=3"), 2, "--set classes: it is a fact"),
    ("mae", ("--set", "family=cae"), 2, "--set family: it is a fact"),
    ("mae", ("--set", "encoder=base"), 2, "--set encoder: it is a fact"),
    ("mae", ("--set", "mask_ratio=0.5"), 2, "mask_ratio"),
    ("mae", ("--set", "img_size=33"), 2, "a multiple of 8; change it with --set img_size=N"),
    ("mae", ("--set", "img_size=1000000000"), 2, "img_size"),
    ("mae", ("--set", "rel_pos=true"), 2, "have no relative positions"),
    ("mae", ("--set", "pool=max"), 2, "cannot set pool"),
    ("mae", ("--set", "crop_scale=[0.5,0.1]"), 2, "the smaller one first"),
    ("mae", ("--set", "rand_augment=rand-q"), 2, "cannot augment with rand_augment='rand-q'"),
    ("conv", ("--set", "pool=cls"), 2, "has no [CLS] token; allowed: pool=mean"),
    ("conv", ("--set", "rel_pos=true"), 2, "have no relative positions"),
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("recipe", "options", "status", "told"), REFUSED)
def test_refused(
    recipe: str, options: tuple[Option, ...], status: int, told: str, tmp_path: Path
) -> None:
    given = [each() if callable(each) else each for each in options]
    words = list(ft.words(recipe, tmp_path / "run", *given))
    if "--images" in given:
        words[words.index("--images") + 1] = given[1]
    home = tmp_path / "home"
    ran = fx.stud(*words, home=home)
    assert ran.status == status, ran.err
    assert told in ran.line
    assert not (tmp_path / "run").exists()
    assert not list(home.rglob("*.jsonl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refused") / "run"
    fx.good(ft.finetune("mae", out))
    return out


def not_resumed(run: Path) -> fx.Ran:
    return ft.finetune("mae", run)


def other_settings(run: Path) -> fx.Ran:
    return ft.finetune("mae", run, "--resume", sets=("mixup=0.5",))


def other_start(run: Path) -> fx.Ran:
    return ft.finetune("mae", run, "--resume", "--ema")


def other_encoder(run: Path) -> fx.Ran:
    return ft.finetune("kd", run, "--resume")


def other_crop(run: Path) -> fx.Ran:
    return ft.finetune("mae", run, "--resume", "--crop-pct", 0.9)


def pretraining(run: Path) -> fx.Ran:
    options = ("--cache", fx.cache_path(), "--steps", "2", "--batch-size", "8", "--resume")
    return fx.train("mae", run, *options)


def fine_tuned(run: Path) -> fx.Ran:
    words = ("--images", ft.train_pictures(), "--out", run.parent / "another")
    return fx.stud("eval", "finetune", run, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        (not_resumed, 1, "is not empty; continue that run with --resume"),
        (other_settings, 1, "config.mixup 0.8 before, 0.5 now"),
        (other_start, 1, "targets.begun.ema False before, True now"),
        (other_encoder, 1, "is another run"),
        (other_crop, 1, "crop_pct 0.875 before, 0.9 now"),
        (pretraining, 1, "recipe 'finetune' before, 'mae' now"),
        (fine_tuned, 2, "was fine-tuned already"),
    ],
)
def test_a_run_that_is_there_stays_as_it_is(
    how: Callable[[Path], fx.Ran], status: int, told: str, run: Path
) -> None:
    before = files_below(run)
    ran = how(run)
    assert ran.status == status
    assert told in ran.line
    assert files_below(run) == before
    assert not (run.parent / "another").exists()


def test_the_centre_crop_by_name_is_the_default(run: Path) -> None:
    fx.good(ft.finetune("mae", run, "--resume", "--crop-pct", 0.875))


# --- a fine-tuned run serves the other commands ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "cae", "fd", "conv cls"])
def test_a_fine_tuned_run_is_embedded_and_judged(recipe: str, tmp_path: Path) -> None:
    """Its features are timm's: [CLS] of `forward_features`, whose last norm has gone behind the
    pool, or the mean of its patches."""
    run = tmp_path / "run"
    fx.good(ft.finetune(recipe, run, "--epochs", 1))
    network: Any = load_classifier(run)[0]
    images, _ = images_of(ft.test_pictures())
    with torch.no_grad():
        tokens = network.forward_features(images).numpy()
    for pool, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        file = tmp_path / f"{pool}.npy"
        words = ("--images", ft.test_pictures(), "--pool", pool, "-o", file, "--device", "cpu")
        fx.good(fx.stud("embed", run, *words, home=tmp_path / "home"))
        np.testing.assert_allclose(np.load(file), expected, rtol=1e-3, atol=1e-3)
    shared = ("--images", ft.train_pictures(), "--test", ft.test_pictures(), "--device", "cpu")
    for words in (
        ("knn", run, "--k", "1"),
        ("linear", run, "--epochs", "1", "--warmup-epochs", "0"),
    ):
        ran = fx.good(fx.stud("eval", *words, *shared, "--json", home=tmp_path / "home"))
        assert ran.json["recipe"] == "finetune"
        assert ran.json["n_test"] == 7


@pytest.mark.slow
def test_a_recipe_of_ones_own_may_have_classes(tmp_path: Path) -> None:
    """A setting of that name makes no classifier of a run; it is fine-tuned as any other, from
    step 0 too."""
    run = tmp_path / "pre"
    words = ("--cache", fx.cache_path(), "--steps", "0", "--batch-size", "8")
    fx.good(fx.train("mae", run, *words))
    path = run / "config.json"
    record = json.loads(path.read_text())
    record["config"]["classes"] = 10
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="has no head: it was not fine-tuned"):
        load_classifier(run)
    given = ft.words("mae", tmp_path / "out", "--epochs", 1, "--json")
    facts = fx.good(fx.stud(*(run if word == ft.pretrained("mae") else word for word in given)))
    assert facts.json["checkpoint"] == 0
