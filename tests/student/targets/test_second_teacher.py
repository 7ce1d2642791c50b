"""A second teacher's targets from a cache: against numpy, ranked or not, and what is told where
they are not there."""

from __future__ import annotations

import functools
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.reading.cache import Cache
from student import checkpoint, config
from student.recipes import mrmae
from student.targets.cached import CachedTargets
from tests import student_fixtures as fx

OTHER = "synthetic:levels=3,tokens=16,width=20,size=32"
ONE = ("--steps", "1", "--batch-size", "8")
JOINT = (f"joint={OTHER}",)
CPU = torch.device("cpu")


@functools.cache
def both_path() -> Path:
    """The fixture's pictures and views with levels 2 to 4 of one teacher and 2 to 3 of another,
    added."""
    return add(Path(shutil.copytree(fx.cache_path(), fx.root() / "both")))


@functools.cache
def ranked_path() -> Path:
    """The same, where each teacher's patches lie in an order of its own."""
    return add(
        Path(shutil.copytree(fx.ranked_path(), fx.root() / "both-ranked")),
        "--tokens",
        "ranked",
    )


def add(cache: Path, *options: str, levels: str = "last:2") -> Path:
    words = (
        "--teacher",
        OTHER,
        "--images",
        str(fx.pictures()),
        "--size",
        "32",
        "--views",
        str(fx.VIEWS),
    )
    fx.good(fx.feat("extract", *words, "--levels", levels, "--add", "--out", str(cache), *options))
    return cache


def spec_of(cache: Cache, target: str) -> mrmae.Config:
    facts = [
        f"teacher={fx.TEACHER}",
        "teacher_depth=4",
        "teacher_width=24",
        "img_size=32",
        "patch_size=8",
    ]
    return config.from_overrides(
        mrmae.Config, [*facts, *JOINT, "joint_depth=3", "joint_width=20", f"target={target}"]
    )


@pytest.mark.parametrize("path", [both_path, ranked_path])
@pytest.mark.parametrize("target", ["fd", "f", "h"])
def test_second_targets_equal_numpys(path: object, target: str) -> None:
    """In float64 from what the cache stores of the second teacher, in image order; the first one's
    beside it."""
    assert callable(path)
    with Cache(path()) as cache:
        spec = mrmae.needs(spec_of(cache, target))
        rows, view = np.arange(5), np.array([0, 1, 2, 0, 1])
        source = CachedTargets(cache, spec, np.arange(len(cache)))
        got, masks = source.to_device(source.fetch(rows, view), CPU)
        first = "features" if target == "h" else "targets"
        assert set(got) == {first, "second"}
        np.testing.assert_array_equal(
            masks["attention"], cache.read(rows, view, ("attention",))["attention"]
        )

        stored = cache.read(rows, view, (f"{OTHER}/features", f"{OTHER}/mask_order"), [3])
        expected = stored[f"{OTHER}/features"][:, 0].astype(np.float64)
        if path is ranked_path:  # token 1 + j is patch order[j]
            raster = np.empty_like(expected)
            for i, order in enumerate(stored[f"{OTHER}/mask_order"].astype(int)):
                raster[i, 0] = expected[i, 0]
                raster[i, 1 + order] = expected[i, 1:]
            assert not np.array_equal(raster, expected)
            expected = raster
        tail = {name: value.astype(np.float64) for name, value in cache.tail(OTHER).items()}
        if target != "h":
            expected = expected * tail["gamma"] + tail["beta"]
        if target == "fd":
            expected = (expected - expected.mean(-1, keepdims=True)) / np.sqrt(
                expected.var(-1, keepdims=True) + 1e-5
            )
        assert expected.shape == (5, 17, 20)
        np.testing.assert_allclose(got["second"].numpy(), expected, rtol=1e-3, atol=1e-3)


class OtherEps(Cache):
    """As a teacher whose norm has DINO's eps would have left it."""

    def tail(self, teacher: str | None = None) -> dict[str, np.ndarray]:
        return {**super().tail(teacher), "eps": np.array(1e-6, np.float32)}


def test_a_teachers_own_eps() -> None:
    with OtherEps(both_path()) as cache:
        source = CachedTargets(cache, mrmae.needs(spec_of(cache, "f")), np.arange(len(cache)))
        rows, view = np.arange(4), np.zeros(4, np.int64)
        got, _ = source.to_device(source.fetch(rows, view), CPU)
        stored = cache.read(rows, view, (f"{OTHER}/features", f"{OTHER}/feature_stats"), [3])
        h, std = (
            stored[f"{OTHER}/{name}"][:, 0].astype(np.float64)
            for name in ("features", "feature_stats")
        )
        std = std[..., 1:]
        tail = cache.tail(OTHER)
        expected = h * std / np.sqrt(std**2 - 1e-5 + 1e-6) * tail["gamma"] + tail["beta"]
        np.testing.assert_allclose(got["second"].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("path", [both_path, ranked_path])
def test_two_teachers_train_with_a_head_each(path: object, tmp_path: Path) -> None:
    """Depth and width of the second teacher are facts of the cache."""
    assert callable(path)
    steps = ("--steps", "12", "--batch-size", "12", "--precision", "fp32")
    fx.good(fx.train("mrmae", tmp_path / "run", "--cache", path(), *steps, sets=JOINT))
    saved = checkpoint.read_config(tmp_path / "run")["config"]
    assert (saved["joint_depth"], saved["joint_width"]) == (3, 20)
    assert fx.weights(tmp_path / "run")["joint_head.weight"].shape == (20, 48)
    losses = fx.losses(tmp_path / "run")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_two_teachers_from_memory(tmp_path: Path) -> None:
    """--resident holds the second teacher's arrays too: the same losses."""
    options = (
        "--cache",
        ranked_path(),
        "--steps",
        "4",
        "--batch-size",
        "12",
        "--precision",
        "fp32",
    )
    fx.good(fx.train("mrmae", tmp_path / "a", *options, sets=JOINT))
    fx.good(fx.train("mrmae", tmp_path / "b", *options, "--resident", sets=JOINT))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")


def test_a_setting_against_the_second_teachers_facts(tmp_path: Path) -> None:
    ran = fx.train(
        "mrmae", tmp_path / "run", "--cache", both_path(), *ONE, sets=(*JOINT, "joint_width=768")
    )
    assert ran.status == 2
    assert "joint_width=768 does not fit: the targets have joint_width=20" in ran.line


def proposed(line: str) -> list[str]:
    return shlex.split(line.split("featcache extract", 1)[1])


def test_a_second_teacher_that_is_not_there_is_added(tmp_path: Path) -> None:
    """The command that the error proposes adds it, and the same training is then served."""
    there = Path(shutil.copytree(fx.cache_path(), tmp_path / "cache"))
    ran = fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT)
    assert ran.status == 1
    assert f"field {OTHER}/features is missing" in ran.line
    fx.good(fx.feat("extract", *proposed(ran.line)))
    fx.good(fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT))


@pytest.mark.slow
def test_a_level_of_the_second_teacher_is_added(tmp_path: Path) -> None:
    there = add(Path(shutil.copytree(fx.cache_path(), tmp_path / "cache")), levels="1,2")
    ran = fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT)
    assert ran.status == 1
    assert f"level 3 of {OTHER} is missing, it has 1, 2" in ran.line
    fx.good(fx.feat("extract", *proposed(ran.line)))
    fx.good(fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT))


@pytest.mark.slow
def test_views_that_only_the_first_teacher_has_are_added(tmp_path: Path) -> None:
    there = add(Path(shutil.copytree(fx.cache_path(), tmp_path / "cache")), levels="last:1")
    words = (
        "--teacher",
        fx.TEACHER,
        "--images",
        str(fx.pictures()),
        "--size",
        "32",
        "--views",
        "4",
    )
    fx.good(fx.feat("extract", *words, "--levels", "last:3", "--add", "--out", str(there)))
    ran = fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT)
    assert ran.status == 1
    assert f"3 of its 4 views have {OTHER}" in ran.line
    fx.good(fx.feat("extract", *proposed(ran.line)))
    fx.good(fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT))


@pytest.mark.slow
def test_a_second_teacher_of_which_few_patches_are_kept(tmp_path: Path) -> None:
    there = Path(shutil.copytree(fx.cache_path(), tmp_path / "cache"))
    add(there, "--tokens", "ranked", "--keep", "5")
    ran = fx.train("mrmae", tmp_path / "run", "--cache", there, *ONE, sets=JOINT)
    assert ran.status == 1
    assert f"of {OTHER} it keeps 5 patches, and others may be visible" in ran.line
    fx.good(fx.feat("extract", *proposed(ran.line), "--out", str(tmp_path / "whole")))
    fx.good(fx.train("mrmae", tmp_path / "run", "--cache", tmp_path / "whole", *ONE, sets=JOINT))


def test_none_in_an_empty_home(tmp_path: Path) -> None:
    """One command makes both teachers' arrays."""
    home, options = tmp_path / "home", ("--images", fx.pictures(), *ONE)
    sets = (*JOINT, f"teacher={fx.TEACHER}", "img_size=32", "patch_size=8")
    ran = fx.train("mrmae", tmp_path / "run", *options, sets=sets, home=home)
    assert ran.status == 1
    fx.good(fx.feat("extract", *proposed(ran.line), home=home))
    fx.good(fx.train("mrmae", tmp_path / "run", *options, sets=sets, home=home))
