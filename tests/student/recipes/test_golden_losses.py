"""The first ten losses of every recipe, by `student train`, equal those of a loop that shares
nothing with the trainer.

tests/golden/make_losses.py made them, in float64; it says how.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache import teachers
from student import recipes
from tests import student_fixtures as fx
from tests.golden import make_losses

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/losses.json").read_text())

# A recipe as it is, from weights that no generator drew.
FILLED = '''"""{recipe}, started from sines."""
from student.recipes import {recipe} as published
from tests.student.recipes.test_recipes import fill

Config, needs = published.Config, published.needs


class Model(published.Model):
    def __init__(self, config):
        super().__init__(config)
        fill(self)
'''


def trained(recipe: str, tmp_path: Path, *options: str) -> list[float]:
    """Return the losses of `student train` on the fixed cache."""
    (tmp_path / "filled.py").write_text(FILLED.format(recipe=recipe))
    settings = [word for text in make_losses.settings_of(recipe) for word in ("--set", text)]
    source = (
        "--cache",
        fx.cache_of(recipe),
        "--images",
        fx.pictures(),
        "--out",
        tmp_path / "run",
    )
    length = (
        "--steps",
        make_losses.STEPS,
        "--batch-size",
        make_losses.BATCH,
        "--seed",
        make_losses.SEED,
        "--precision",
        "fp32",
    )
    ran = fx.stud(
        "train",
        "--recipe",
        tmp_path / "filled.py",
        "--device",
        "cpu",
        *source,
        *length,
        *settings,
        *options,
    )
    fx.good(ran)
    return fx.losses(tmp_path / "run")


@pytest.mark.parametrize("path", [fx.cache_path, fx.token_path])
def test_the_cache_is_the_fixed_one(path: Callable[[], Path]) -> None:
    """If this fails, the losses below are those of other pictures or targets.

    What is summed in float32 by torch has other last bits on a processor that sums in another
    order; there levels and statistics are compared with float64 arithmetic on the teacher's own
    numbers, which are exact on all of them.
    """
    stored = make_losses.Stored(path())
    here, there = stored.digests(), dict(GOLDEN["cache"])
    summed = {name: (here.pop(name), there.pop(name)) for name in ("features", "feature_stats")}
    assert here == there
    if all(ours == theirs for ours, theirs in summed.values()):
        return
    teacher = teachers.load(fx.TEACHER)
    for row, view in np.ndindex(len(stored.keys), stored.views):
        pixels = stored.pixels(row, view).transpose(1, 2, 0) * make_losses.STD + make_losses.MEAN
        images = torch.from_numpy(np.rint(255 * pixels).astype(np.uint8).transpose(2, 0, 1))[None]
        ys = np.concatenate([y.numpy() for y in teacher(images, (2, 3, 4))[0]]).astype(np.float64)
        mean, std = ys.mean(-1, keepdims=True), np.sqrt(ys.var(-1, keepdims=True) + 1e-5)
        features, stats = (stored.group[name][row, view].astype(np.float64) for name in summed)
        # half a step of fp16
        np.testing.assert_allclose(features, (ys - mean) / std, rtol=2**-11, atol=1e-6)
        np.testing.assert_allclose(stats, np.concatenate([mean, std], -1), rtol=1e-5, atol=1e-6)


def test_every_recipe_has_its_losses() -> None:
    assert sorted(GOLDEN["losses"]) == recipes.names()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("recipe", recipes.names())
def test_first_losses(recipe: str, tmp_path: Path) -> None:
    expected = GOLDEN["losses"][recipe]
    assert len(expected) == 10
    assert trained(recipe, tmp_path) == pytest.approx(expected, rel=1e-4)
    # something was learnt: the update is compared too
    assert max(expected) - min(expected) > 1e-2 * max(expected)


def test_micro_batches_make_the_same_steps(tmp_path: Path) -> None:
    """Four pictures twice are eight: the learning rate and the order are those of the whole
    step."""
    options = ("--batch-size", "4", "--accumulate", "2")
    assert trained("maskalign", tmp_path, *options) == pytest.approx(
        GOLDEN["losses"]["maskalign"], rel=1e-4
    )
