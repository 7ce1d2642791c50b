"""The tests of fine-tuning share small pre-trained runs, labelled pictures and the command."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tests import student_fixtures as fx

# 20 training pictures of five classes, of which two pairs have the same colour: scores below 100;
# 7 of test, which two processes do not divide
CLASSES = 5
SMALL = ("--batch-size", 8, "--epochs", 3, "--workers", 1)
SETS = ("lr=0.002", "warmup_epochs=1")
CONV = ("family=conv_vit", "encoder=tiny,stage1=8,stage2=12,embed_dim=48,depth=2,num_heads=3")
# what is fine-tuned beside the recipes by name -> recipe and settings
OTHERS = {"conv": ("mrmae", CONV), "conv cls": ("mrmae", (*CONV, "conv_cls=true"))}


@functools.cache
def train_pictures() -> Path:
    return fx.save_pictures(fx.root() / "ft-train", 20, seed=1, classes=CLASSES)


@functools.cache
def test_pictures() -> Path:
    return fx.save_pictures(fx.root() / "ft-test", 7, seed=2, classes=CLASSES)


@functools.cache
def pretrained(recipe: str) -> Path:
    """A run of two steps, with an average of its weights and both checkpoints."""
    out = fx.root() / f"pre-{recipe.replace(' ', '-')}"
    recipe, sets = OTHERS.get(recipe, (recipe, ()))
    cache = ("--cache", fx.cache_of(recipe), "--steps", "2", "--batch-size", "8", "--ema", "0.5")
    fx.good(fx.train(recipe, out, *cache, "--save-every", "1", sets=("lr=0.01", *sets)))
    return out


def words(recipe: str, out: Path, *options: Any, sets: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Return the command line; `sets` come after the small settings."""
    settings = [part for text in (*SETS, *sets) for part in ("--set", text)]
    tests = () if "--test" in options else ("--test", test_pictures())
    subject = ("eval", "finetune", pretrained(recipe), "--images", train_pictures())
    shared = ("--out", out, "--device", "cpu", *SMALL)
    return (*subject, *tests, *shared, *settings, *options)


def finetune(
    recipe: str, out: Path, *options: Any, sets: tuple[str, ...] = (), home: Path | None = None
) -> fx.Ran:
    return fx.stud(*words(recipe, out, *options, sets=sets), home=home)
