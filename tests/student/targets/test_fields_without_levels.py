"""A recipe reads levels of one teacher beside a tokenizer's ids and another teacher's attention."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.reading.cache import Cache
from featcache.torch import Dataset
from student.recipes import TargetSpec
from student.targets.cached import CachedTargets
from tests import student_fixtures as fx

OTHER = "synthetic:levels=3,tokens=16,width=20,size=32"
TOKENIZER = '''
import torch
from torch import nn

TOKENIZER = True


class Fixed(nn.Module):
    """The same ids for every picture."""

    name, weights, pixel_filter = "fixed", "none", "lanczos"
    input_px, patches, vocabulary = 16, 16, 16

    def __init__(self):
        super().__init__()
        self.register_buffer("ids", torch.arange(16))

    def forward(self, images):
        return self.ids.expand(len(images), 16)


def load(name, options, weights):
    return Fixed()
'''
RECIPE = '''
"""maskalign, beside whose features token ids and another teacher's attention are read."""
from dataclasses import dataclass, replace

from student.recipes import maskalign


@dataclass(frozen=True, kw_only=True)
class Config(maskalign.Config):
    ids: str  # to be set
    other: str


class Model(maskalign.Model):
    def forward(self, batch):
        assert batch["token_ids"].tolist() == [list(range(16))] * len(batch["images"])
        return super().forward(batch)


def needs(config):
    spec = maskalign.needs(config)
    return replace(spec, fields=(*spec.fields, config.ids, config.other), vocabulary=16)
'''


@functools.cache
def folder() -> Path:
    """The fixture's cache, a tokenizer's ids added, and levels of another teacher."""
    out = fx.root() / "many"
    out.mkdir()
    shutil.copytree(fx.cache_path(), out / "cache")
    (out / "ids.py").write_text(TOKENIZER)
    (out / "recipe.py").write_text(RECIPE)
    for teacher, levels in ((str(out / "ids.py"), "1"), (OTHER, "last:2")):
        options = ("--add", "--size", "32", "--views", str(fx.VIEWS), "--levels", levels)
        words = ("--teacher", teacher, "--images", str(fx.pictures()), *options)
        fx.good(fx.feat("extract", *words, "--out", str(out / "cache")))
    return out


def ids() -> str:
    return f"{folder()}/ids.py/token_ids"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--resident",), ("--aug-repeats", "2")])
def test_a_recipe_that_wants_both_trains(tmp_path: Path, options: tuple[str, ...]) -> None:
    """And has the losses of the recipe that wants the features alone."""
    words = ("--cache", folder() / "cache", "--steps", "2", "--batch-size", "8", *options)
    plain = fx.train("maskalign", tmp_path / "plain", *words)
    sets = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    own = ("--set", f"ids={ids()}", "--set", f"other={OTHER}/attention", "--device", "cpu")
    recipe = ("--recipe", folder() / "recipe.py", "--out", tmp_path / "both")
    both = fx.stud("train", *recipe, *sets, *own, *words)
    fx.good(plain), fx.good(both)
    assert fx.losses(tmp_path / "both") == fx.losses(tmp_path / "plain")


def test_a_recipe_that_wants_ids_which_are_not_there_is_told_how_to_make_them(
    tmp_path: Path,
) -> None:
    sets = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    own = ("--set", "ids=dvae/token_ids", "--set", f"other={OTHER}/attention", "--device", "cpu")
    recipe = ("--recipe", folder() / "recipe.py", "--out", tmp_path / "run")
    ran = fx.stud("train", *recipe, *sets, *own, "--cache", folder() / "cache")
    assert ran.status == 1
    assert "field dvae/token_ids is missing" in ran.line
    assert "--teacher dvae" in ran.line


def test_a_setting_without_a_default_is_asked_for(tmp_path: Path) -> None:
    recipe = ("--recipe", folder() / "recipe.py", "--out", tmp_path / "run", "--device", "cpu")
    ran = fx.stud("train", *recipe, "--set", "ids=x/token_ids", "--cache", folder() / "cache")
    assert ran.status == 2
    assert "cannot set other: given nothing, and it has no default" in ran.line


def test_a_batch_holds_the_levels_and_the_ids() -> None:
    with Cache(folder() / "cache") as cache:
        spec = TargetSpec(
            teacher=fx.TEACHER, levels=(2, 4), patches=16, vocabulary=16,
            fields=("features", "attention", ids(), f"{OTHER}/attention"),
        )  # fmt: skip
        targets = CachedTargets(cache, spec, np.arange(len(cache)))
        host = targets.fetch(np.arange(3), np.ones(3, np.int64))
        assert host["features"].shape[1] == 2
        assert host[f"{OTHER}/attention"].shape == (3, 16)
        batch, _ = targets.to_device(host, torch.device("cpu"))
        assert batch["token_ids"].tolist() == [list(range(16))] * 3
        whole = cache.read(np.arange(3), 1, ("features",))["features"][:, [0, 2]]
        np.testing.assert_array_equal(host["features"], whole)


def test_a_dataset_gives_both() -> None:
    data = Dataset(
        fx.pictures(),
        folder() / "cache",
        levels=[3],
        fields=("features", ids(), f"{OTHER}/attention"),
    )
    sample = data[0]
    assert sample["features"].shape == (1, 17, 24)
    assert sample[ids()].tolist() == list(range(16))
    assert sample[f"{OTHER}/attention"].shape == (16,)
