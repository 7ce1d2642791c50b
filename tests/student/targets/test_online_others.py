"""A tokenizer and a second teacher in the loop give what a cache of the same views holds."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache import rng, teachers
from featcache.models.tokenizer import TokenizerTeacher
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.views.draw import draw_views
from student import checkpoint
from student.recipes import TargetSpec, mrmae
from student.targets.cached import CachedTargets
from student.targets.online import OnlineTargets
from student.targets.online_others import OnlineSecond, OnlineTokens
from tests import student_fixtures as fx
from tests.student.targets import test_second_teacher as second
from tests.student.targets.test_cached import hosts

CPU = torch.device("cpu")
STEPS = ("--steps", "6", "--batch-size", "8", "--precision", "fp32")
DVAE = "dvae,img_size=32,width=16,vocabulary=64"  # 4 x 4 patches
# 16 patches of 2 x 2 pixels: a quarter of their mean red, a word of 64
REDS = """
import torch
from torch import nn

TOKENIZER = True


class Reds(nn.Module):
    name, weights, pixel_filter = "reds", "none", "lanczos"
    input_px, patches, vocabulary = 8, 16, 64

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(0))

    def forward(self, images):
        red = images[:, 0].long().unflatten(1, (4, 2)).unflatten(3, (4, 2))
        return (red.sum((2, 4)) // 16).flatten(1)


def load(name, options, weights):
    return Reds()
"""


@functools.cache
def folder() -> Path:
    """The fixture's cache, with the ids of two tokenizers added."""
    out = fx.root() / "tokenizers"
    out.mkdir()
    shutil.copytree(fx.cache_path(), out / "cache")
    (out / "reds.py").write_text(REDS)
    for teacher, weights in {str(out / "reds.py"): (), DVAE: ("--weights", "random:3")}.items():
        words = ("--teacher", teacher, *weights, "--images", str(fx.pictures()), "--size", "32")
        more = ("--views", str(fx.VIEWS), "--add", "--out", str(out / "cache"))
        fx.good(fx.feat("extract", *words, *more))
    return out


def reds() -> str:
    return str(folder() / "reds.py")


def spec_of(name: str) -> TargetSpec:
    field = f"{name}/token_ids"
    return TargetSpec(teacher="", levels=(), fields=(field,), patches=16, vocabulary=64)


def online(cache: Cache, name: str, weights: str | None) -> OnlineTargets:
    """The targets of a tokenizer in the loop, over the views of a cache."""
    tokenizer = teachers.load_any(name, weights, "cpu")
    assert isinstance(tokenizer, TokenizerTeacher)
    spec = spec_of(name)
    policy = CachedTargets(cache, spec, np.arange(len(cache))).policy
    others = [OnlineTokens(tokenizer, spec.fields[0], spec)]
    return OnlineTargets(policy, spec, None, fx.VIEWS, others=others)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), [("reds", None), (DVAE, "random:3")])
def test_ids_equal_the_caches(name: str, weights: str | None) -> None:
    name = reds() if name == "reds" else name
    with Cache(folder() / "cache") as cache:
        rows = cache.keys.find(open_source(fx.pictures()).keys)
        stored = CachedTargets(cache, spec_of(name), rows)
        seen: set[int] = set()
        for ours, theirs in zip(hosts(stored), hosts(online(cache, name, weights)), strict=True):
            np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
            (a, _), (b, _) = (
                stored.to_device(ours, CPU),
                online(cache, name, weights).to_device(theirs, CPU),
            )
            assert a["token_ids"].dtype == b["token_ids"].dtype == torch.int64
            assert torch.equal(a["token_ids"], b["token_ids"])
            seen |= set(b["token_ids"].flatten().tolist())
        assert len(seen) > 1


def test_ids_are_of_the_same_box_by_the_tokenizers_filter() -> None:
    """Cut by hand from the stored box, resized by Pillow's Lanczos to 8 pixels, and averaged."""
    with Cache(folder() / "cache") as cache:
        targets = online(cache, reds(), None)
        for host in hosts(targets, 2):
            got = targets.to_device(host, CPU)[0]["token_ids"]
            for i, key in enumerate(host["keys"]):
                digest, view = rng.key_digests([key]), int(host["view"][i])
                with Image.open(fx.pictures() / f"{key}.png") as picture:
                    size = np.array([(picture.height, picture.width)])
                    drawn = draw_views(targets.policy, digest, size, [view])
                    top, left, height, width = drawn.crop[0, 0].tolist()
                    box = (left, top, left + width, top + height)
                    small = (
                        picture.convert("RGB").crop(box).resize((8, 8), Image.Resampling.LANCZOS)
                    )
                red = np.asarray(small)[..., 0].astype(int)
                red = red[:, ::-1] if drawn.flip[0, 0] else red
                expected = [
                    int(red[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum()) // 16
                    for y in range(4)
                    for x in range(4)
                ]
                assert got[i].tolist() == expected


@pytest.mark.parametrize("target", ["fd", "f", "h"])
def test_a_second_teachers_target_equals_the_caches(target: str) -> None:
    """Within fp16's rounding of what is stored; the first one's beside it."""
    with Cache(second.both_path()) as cache:
        spec = mrmae.needs(second.spec_of(cache, target))
        rows = cache.keys.find(open_source(fx.pictures()).keys)
        stored = CachedTargets(cache, spec, rows)
        first, other = teachers.load(fx.TEACHER), teachers.load(second.OTHER)
        others = [OnlineSecond(other, f"{second.OTHER}/features", spec)]
        looped = OnlineTargets(stored.policy, spec, first, fx.VIEWS, others=others)
        assert looped.device_arrays({}) == ("pixels",)  # one picture for both
        for ours, theirs in zip(hosts(stored), hosts(looped), strict=True):
            (a, masks), (b, own) = stored.to_device(ours, CPU), looped.to_device(theirs, CPU)
            assert a.keys() == b.keys()
            assert a["second"].shape == b["second"].shape == (6, 17, 20)
            for name in a:
                error = (a[name] - b[name]).norm(dim=-1) / b[name].norm(dim=-1)
                assert 0 < float(error.max()) < 2e-3, name
            np.testing.assert_array_equal(masks["attention"], own["attention"])


def both_ways(recipe: str, tmp_path: Path, cache: Path, sets: tuple[str, ...]) -> fx.Ran:
    """Train from a cache and with the teacher in the loop, whose command is returned."""
    options = ("--cache", cache, "--images", fx.pictures(), *STEPS)
    sets = (*sets, "drop_path=0")
    fx.good(fx.train(recipe, tmp_path / "cached", *options, sets=sets))
    return fx.good(
        fx.train(recipe, tmp_path / "online", *options, "--teacher", "online", sets=sets)
    )


@pytest.mark.slow
def test_cae_trains_with_its_tokenizer_in_the_loop(tmp_path: Path) -> None:
    """To the bit, since ids are; the cache's own teacher is not run. The record and what is said
    name the tokenizer."""
    sets = (f"token_field={reds()}/token_ids", "vocabulary=64")
    ran = both_ways("cae", tmp_path, folder() / "cache", sets)
    assert f"online, teacher {reds()}, 6 steps" in ran.err
    assert fx.losses(tmp_path / "cached") == fx.losses(tmp_path / "online")
    assert fx.same_weights(tmp_path / "cached", tmp_path / "online")
    about = json.dumps(json.loads((tmp_path / "online/config.json").read_text()))
    assert f'"others": {{"{reds()}/token_ids": {{"teacher": "{reds()}", "weight_hash": "' in about


@pytest.mark.slow
def test_cae_trains_without_any_cache(tmp_path: Path) -> None:
    """The grid is the tokenizer's, and so are the weights that are named for it."""
    options = ("--images", fx.pictures(), *STEPS, "--teacher", "online", "--policy")
    sets = (f"token_field={DVAE}/token_ids", "vocabulary=64")
    run = tmp_path / "run"
    losses = []
    # alone in the loop it is what --weights speaks of
    for weights in (("--weights", "random:3"), ("--other-weights", f"{DVAE}=random:3")):
        ran = fx.good(fx.train("cae", run, *options, fx.policy_file(), *weights, sets=sets))
        assert "random:3 - these weights are drawn" in ran.err
        losses.append(fx.losses(run))
        shutil.move(run, tmp_path / f"{len(losses)}")
    assert losses[0] == losses[1]
    run = tmp_path / "2"
    saved = checkpoint.read_config(run)["config"]
    assert (saved["img_size"], saved["patch_size"]) == (32, 8)
    assert np.isfinite(fx.losses(run)).all()


@pytest.mark.slow
@pytest.mark.parametrize("path", [second.both_path, second.ranked_path])
def test_mrmae_trains_with_two_teachers_in_the_loop(path: Any, tmp_path: Path) -> None:
    both_ways("mrmae", tmp_path, path(), second.JOINT)
    losses = [fx.losses(tmp_path / name) for name in ("cached", "online")]
    np.testing.assert_allclose(*losses, rtol=2e-3)
    saved = checkpoint.read_config(tmp_path / "online")["config"]
    assert (saved["joint_depth"], saved["joint_width"]) == (3, 20)


def test_two_teachers_without_a_cache(tmp_path: Path) -> None:
    """The second one's own level and width."""
    sets = (*second.JOINT, f"teacher={fx.TEACHER}")
    options = ("--images", fx.pictures(), *STEPS, "--teacher", "online")
    run = tmp_path / "run"
    fx.good(fx.train("mrmae", run, *options, "--policy", fx.policy_file(), sets=sets))
    assert fx.weights(run)["joint_head.weight"].shape == (20, 48)


@pytest.mark.slow
def test_a_lossy_codec_of_the_second_teacher_alone(tmp_path: Path) -> None:
    cache = Path(shutil.copytree(fx.cache_path(), tmp_path / "cache"))
    words = (
        "--teacher",
        WIDE,
        "--images",
        str(fx.pictures()),
        "--size",
        "32",
        "--levels",
        "last:1",
    )
    more = ("--views", str(fx.VIEWS), "--add", "--out", str(cache), "--codec", "t3")
    fx.good(fx.feat("extract", *words, *more))
    ran = both_ways("mrmae", tmp_path, cache, (f"joint={WIDE}",))
    assert f"note: levels of {WIDE} go through codec t3" in ran.err
    assert "the teacher's levels go through codec" not in ran.err
    losses = [fx.losses(tmp_path / name) for name in ("cached", "online")]
    np.testing.assert_allclose(*losses, rtol=2e-3)


WIDE = "synthetic:levels=3,tokens=16,width=64,size=32"
OTHER_WEIGHTS = "dvae,img_size=32,width=16,vocabulary=64=random:4"


@pytest.mark.parametrize(
    ("sets", "more", "message"),
    [
        ((f"token_field={DVAE}/token_ids", "vocabulary=64"), ("--other-weights", OTHER_WEIGHTS),
         "the cache was made with"),
        ((f"token_field={DVAE}/token_ids", "vocabulary=60"), (), "give vocabulary=64"),
    ],
)  # fmt: skip
def test_other_weights_or_too_few_words(
    sets: tuple[str, ...], more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    options = ("--cache", folder() / "cache", "--images", fx.pictures(), *STEPS, *more)
    ran = fx.train("cae", tmp_path / "run", *options, "--teacher", "online", sets=sets)
    assert ran.status in (1, 2)
    assert message in ran.line


@pytest.mark.parametrize(
    ("recipe", "more"), [("kd", ("--teacher", "online")), ("mrmae", ("--teacher", "cached"))]
)
def test_weights_of_networks_that_are_not_run(
    recipe: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("--cache", fx.cache_path(), "--images", fx.pictures(), *STEPS, *more)
    ran = fx.train(recipe, tmp_path / "run", *options, "--other-weights", "random:0")
    assert ran.status == 2
    assert "--other-weights is about a tokenizer or a second teacher" in ran.line


@pytest.mark.parametrize(
    ("recipe", "sets", "message"),
    [
        ("cae", (f"token_field={fx.TEACHER}/token_ids",), "gives features, and the recipe reads"),
        ("mrmae", ("joint=dvae", f"teacher={fx.TEACHER}"), "gives token ids, and the recipe reads"),
        ("mrmae", ("joint=synthetic:levels=3,tokens=4,width=20,size=32", f"teacher={fx.TEACHER}"),
         "has 4 patches, 16 are needed"),
    ],
)  # fmt: skip
def test_a_network_of_another_kind_or_grid(
    recipe: str, sets: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    options = ("--images", fx.pictures(), *STEPS, "--teacher", "online")
    policy = ("--policy", fx.policy_file())
    ran = fx.train(recipe, tmp_path / "run", *options, *policy, sets=sets)
    assert ran.status in (1, 2)
    assert message in ran.line


def test_a_file_of_settings_chooses_no_code(tmp_path: Path) -> None:
    """A tokenizer of one's own is named on the command line, as a teacher is."""
    sets = {"token_field": f"{reds()}/token_ids", "vocabulary": 64}
    (tmp_path / "c.json").write_text(json.dumps(sets))
    options = ("--images", fx.pictures(), *STEPS, "--teacher", "online")
    words = ("train", "--recipe", "cae", "--config", tmp_path / "c.json", *options, "--out")
    ran = fx.stud(*words, tmp_path / "run", "--device", "cpu")
    assert ran.status == 1
    assert "code and files are taken only from your own command line" in ran.line
    assert "--set" in ran.line
