"""A CLIP may see pixels normalised by ImageNet's statistics, as MILAN's released code had it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache import teachers
from featcache.errors import UsageError
from featcache.reading.cache import Cache
from student.recipes import milan
from tests import student_fixtures as fx
from tests.featcache.teachers.test_families import small_clip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_the_tower_sees_pixels_by_imagenets_statistics(tmp_path: Path) -> None:
    """Its levels are those of the tower itself on numbers that are worked out here."""
    spec = f"open_clip:{small_clip(tmp_path)}"
    teacher: Any = teachers.load(f"{spec},pixels=imagenet", "random:1")
    px = teacher.input_px
    images = torch.arange(2 * 3 * px * px).view(2, 3, px, px) * 37 % 256
    seen: list[torch.Tensor] = []
    handle = teacher.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (ours,), _ = teacher(images.to(torch.uint8), (1,))
    handle.remove()
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    torch.testing.assert_close(seen[0], (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    (plain,), _ = teachers.load(spec, "random:1")(images.to(torch.uint8), (1,))
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [("", OPENAI), (",pixels=own", OPENAI), (",pixels=imagenet", (MEAN, STD))],
)
def test_registered_towers(options: str, expected: Any) -> None:
    teacher = teachers.load(f"clip-b32{options}", "random:0")
    assert (teacher.pixel_mean, teacher.pixel_std) == expected


def test_other_statistics_are_refused() -> None:
    with pytest.raises(UsageError, match="pixels=dino; allowed: own, the tower's own statistics"):
        teachers.load("clip-b16,pixels=dino", "random:0")


def test_it_is_part_of_a_caches_identity_and_serves_milan(tmp_path: Path) -> None:
    """Two caches of the same weights; MILAN learns from the one that it names, and the teacher in
    the loop sees the same pixels."""
    found = {}
    for name, options in {"own": "", "imagenet": ",pixels=imagenet"}.items():
        spec = f"open_clip:{small_clip(tmp_path)}{options}"
        words = ("--teacher", spec, "--weights", "random:1", "--images", str(fx.pictures()))
        more = ("--size", "48", "--levels", "last:1", "--out", str(tmp_path / name))
        fx.good(fx.feat("extract", *words, *more))
        with Cache(tmp_path / name) as cache:
            found[name] = (cache.identity["teacher"], cache.manifest["id"], spec)
    own, imagenet = (found[name][0] for name in ("own", "imagenet"))
    assert own["weight_hash"] == imagenet["weight_hash"]
    assert (tuple(own["pixel_mean"]), tuple(own["pixel_std"])) == OPENAI
    assert (tuple(imagenet["pixel_mean"]), tuple(imagenet["pixel_std"])) == (MEAN, STD)
    assert found["own"][1] != found["imagenet"][1]
    options = ("--cache", tmp_path / "imagenet", "--images", fx.pictures(), "--steps", "3")
    options += ("--batch-size", "8", "--precision", "fp32", "--teacher-name", found["imagenet"][2])
    sets = ("target=z", "drop_path=0")
    for name, more in {"a": (), "b": ("--teacher", "online")}.items():
        own_options = options[:-2] if name == "a" else options
        fx.good(fx.train("milan", tmp_path / name, *own_options, *more, sets=sets))
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "b"), rtol=2e-3)
    saved = json.loads((tmp_path / "a/config.json").read_text())
    assert saved["config"]["teacher"] == found["imagenet"][2]


def test_the_recipe_names_it() -> None:
    """The spec that MILAN's docstring tells is one that loads."""
    (spec,) = {word for word in milan.__doc__.split() if "pixels=imagenet" in word}
    assert teachers.is_registered(spec.removeprefix("teacher=").rstrip(");"))
