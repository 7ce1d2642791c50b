"""The first ten losses of every recipe, by `student train`, against a loop that shares nothing with the trainer.

tests/golden/make_losses.py made them, in float64; it says how.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student import recipes
from tests import student_fixtures as fx
from tests.golden import make_losses as made

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
    """Losses of `student train` on the fixed cache."""
    (tmp_path / "filled.py").write_text(FILLED.format(recipe=recipe))
    settings = [word for text in made.settings_of(recipe) for word in ("--set", text)]
    source = ("--cache", fx.cache_of(recipe), "--images", fx.pictures(), "--out", tmp_path / "run")
    length = ("--steps", made.STEPS, "--batch-size", made.BATCH, "--seed", made.SEED, "--precision", "fp32")
    ran = fx.stud("train", "--recipe", tmp_path / "filled.py", "--device", "cpu", *source, *length, *settings, *options)
    fx.good(ran)
    return fx.losses(tmp_path / "run")


def test_the_cache_is_the_fixed_one() -> None:
    """Where this fails, the losses below are those of other pictures or targets."""
    assert made.Stored(fx.cache_path()).digests() == GOLDEN["cache"]
    assert made.Stored(fx.token_path()).digests() == GOLDEN["cache"]


def test_every_recipe_has_its_losses() -> None:
    assert sorted(GOLDEN["losses"]) == recipes.names()


@pytest.mark.parametrize("recipe", recipes.names())
def test_first_losses(recipe: str, tmp_path: Path) -> None:
    expected = GOLDEN["losses"][recipe]
    assert len(expected) == 10
    assert trained(recipe, tmp_path) == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 1e-2 * max(expected)  # something was learnt: the update is compared too


def test_micro_batches_make_the_same_steps(tmp_path: Path) -> None:
    """Four pictures twice are eight: the rate and the order are those of the whole step."""
    options = ("--batch-size", "4", "--accumulate", "2")
    assert trained("maskalign", tmp_path, *options) == pytest.approx(GOLDEN["losses"]["maskalign"], rel=1e-4)
