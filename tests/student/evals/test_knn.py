"""Weighted k-NN scores coloured pictures, ranks ties, and refuses wrong options."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from featcache.errors import UsageError
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from student import evals, recipes
from student.evals import knn
from student.features import scores
from student.features.frozen import SIZES
from student.features.scores import hits, percent
from student.training import finetune
from tests.student import toy_task as toys


def test_hits_rank_ties_by_class_number() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    ranks = [
        next(r for r in range(1, 5) if hits(scores, torch.tensor([c]), r).item()) for c in range(4)
    ]
    assert ranks == [4, 1, 2, 3]
    assert percent(torch.tensor([True, True, False])) == 66.6667


# --- the whole eval -------------------------------------------------------------------------------

COLOURS = {
    "a": (200, 0, 0),
    "b": (0, 200, 0),
    "c": (0, 0, 200),
    "d": (200, 200, 0),
    "e": (0, 200, 200),
}


def write(folder: Path, name: str, file: str, colour: tuple[int, int, int]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(out, "png")
    (folder / name / f"{file}.png").write_bytes(out.getvalue())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, colour in COLOURS.items():
        for shade in range(3):
            write(
                tmp_path / "train", name, str(shade), tuple(max(0, c - 9 * shade) for c in colour)
            )  # type: ignore[arg-type]
    for name, colour in COLOURS.items():
        write(tmp_path / "test", name, "0", colour)
    write(tmp_path / "test", "e", "wrong", COLOURS["a"])
    return tmp_path / "train", tmp_path / "test"


def evaluated(train: Source, test: Source, **options: Any) -> dict[str, Any]:
    told = options.pop("told", [])
    task = toys.task_of(
        toys.encoder(toys.colour), train, test, progress=lambda *report: told.append(report)
    )
    outcome = knn.evaluate(task, **options)
    return {**scores.of_test(outcome.scored[0]), **outcome.facts}


def test_evaluate_scores_colours(folders: tuple[Path, Path]) -> None:
    """Five of six test pictures have their class's colour; nobody near the sixth votes for 'e'."""
    train, test = map(open_source, folders)
    told: list[tuple[str, int, int]] = []
    got = evaluated(train, test, k="3", told=told)
    each = {"top1": 100.0, "pictures": 1}
    assert json.loads(json.dumps(got)) == {
        "top1": 83.3333, "interval": [50.0, 100.0], "top5": 83.3333, "n_test": 6,
        "per_class": {**dict.fromkeys("abcd", each), "e": {"top1": 50.0, "pictures": 2}},
        "k": 3, "temperature": 0.07,
    }  # fmt: skip
    assert told == [("train", 15, 15), ("test", 6, 6)]
    assert evaluated(train, test, k="15", temperature="0.07")["top5"] == 100.0


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5), (100, 0.04)])
def test_it_is_scikit_learns(k: int, temperature: float) -> None:
    """Neighbours by cosine on rows of length 1, in float64; a vote is exp(cosine / temperature)."""
    task = toys.toy_task(gap=0.4)
    ((x,), y), ((queries,), _) = (task.pooled(of, stage="") for of in (task.train, task.tests[0]))
    x, queries = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (x, queries))
    judge = KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance**2 / 2) / temperature), algorithm="brute"
    ).fit(x.numpy(), y.numpy())
    want = judge.predict_proba(queries.numpy())
    found = knn.evaluate(task, k=str(k), temperature=str(temperature)).scored[0].scores
    votes = torch.where(found > -torch.inf, found, 0).numpy()
    np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), want, atol=1e-6)
    assert 0.3 < (want.argmax(1) == task.tests[0].labels).mean() < 1


def test_a_sweep_is_judged_by_the_training_pictures_alone(folders: tuple[Path, Path]) -> None:
    """Each colour has three shades: with 2 or 1 neighbours all are right, with all 14 the classes
    are outvoted at a temperature that makes every vote count the same."""
    train, test = map(open_source, folders)
    got = evaluated(train, test, k="14,2,1", temperature="1000")
    assert got["grid"]["k=2 temperature=1000"] == 100.0
    assert got["grid"]["k=14 temperature=1000"] == 0.0  # 2 votes for its own, 3 for each other
    assert got["k"] == 2


def test_evaluate_refuses_before_it_reads(folders: tuple[Path, Path]) -> None:
    train, test = map(open_source, folders)
    task = toys.task_of(toys.encoder(lambda pixels: 1 / 0), train, test)  # type: ignore[arg-type,return-value]
    with pytest.raises(
        UsageError, match="20 nearest neighbours: there are 15 training pictures, --k is 1 to 15"
    ):
        knn.evaluate(task)
    with pytest.raises(UsageError, match="--k is 1 to 15"):
        knn.evaluate(task, k="0")
    with pytest.raises(UsageError, match="temperature 0: --temperature is above 0"):
        knn.evaluate(task, k="1", temperature="0")
    with pytest.raises(UsageError, match="numbers parted by commas are needed"):
        knn.evaluate(task, k="1,x")


def test_evals_are_found_by_module_name() -> None:
    assert {"knn", "linear", "logreg"} <= set(evals.names())
    sizes = (None, *SIZES.values())
    for name in evals.names():
        module = evals.load(name)
        for (recipe, size), _ in module.DEFAULTS.items():
            assert recipe in recipes.names()
            assert size in sizes
        if getattr(module, "TRAINS_ENCODER", False):
            for changes in module.DEFAULTS.values():
                finetune.Config(**changes)  # refuses what is no setting of it
            continue
        for default, text in module.OPTIONS.values():
            assert isinstance(text, str)
            assert isinstance(default, int | float | str | None)
        for changes in module.DEFAULTS.values():
            assert changes.keys() <= module.OPTIONS.keys()
            for key, value in changes.items():
                assert type(value) is type(module.OPTIONS[key][0])
    with pytest.raises(UsageError, match=r"unknown eval 'kn': did you mean knn\? known: "):
        evals.load("kn")
