"""Teachers with an RMS norm, without a final norm and without attention serve from extraction to a
trained student, or are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.student_fixtures as fx
from featcache import teachers
from featcache.errors import UserError
from featcache.models.timm_wrapper import TimmVit
from featcache.reading.cache import Cache
from student.evals.semantic import chosen_patches

TINY = "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"
RMS = f"timm:vit_tiny_patch16_224,{TINY},norm_layer=rmsnorm"
BARE = f"radiov3-b16,{TINY}"  # no final norm, seven tokens that are not stored
AIM = f"aimv2-l14,{TINY}"  # an RMS norm, and neither [CLS] nor an attention pool
WIDE = AIM.replace("embed_dim=24", "embed_dim=64").replace("num_heads=3", "num_heads=4")
KINDS = {"rms": RMS, "none": BARE, "no attention": AIM, "wide": WIDE}
TRIED = ("rms", "none", "no attention")
WEIGHTS = ("--weights", "random:0")
STEPS = ("--batch-size", "8", "--steps", "2", "--workers", "1")


def make(kind: str, out: Path, *options: str) -> Path:
    given = ("--policy", str(fx.policy_file()), *WEIGHTS, *options)
    return fx.extract(fx.pictures(), out, *given, teacher=KINDS[kind])


def sets(kind: str) -> tuple[str, ...]:
    return ("mask=uniform",) if kind == "no attention" else ()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: make(kind, folder / str(i)) for i, kind in enumerate(TRIED)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRIED)
def test_a_cache_is_made_verified_and_trained_from(
    kind: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = caches[kind]
    images = ("--images", str(fx.pictures()))
    ran = fx.good(fx.feat("verify", str(cache), "--recompute", "3", *images, *WEIGHTS, "--json"))
    assert ran.json["recompute"]["compared"] == 3
    assert ran.json["recompute"]["attention_error"] < 1e-4
    for recipe in ("maskalign", "kd"):  # levels, and f
        run = tmp_path / recipe
        given = ("--cache", str(cache), *images, *STEPS)
        fx.good(fx.train(recipe, run, *given, sets=sets(kind)))
        assert np.isfinite(fx.losses(run)).all()


@pytest.mark.parametrize("kind", TRIED)
def test_a_cache_gives_the_teachers_output(kind: str, caches: dict[str, Path]) -> None:
    """f is made of y, which a cache gives too, by the norm written out."""
    with Cache(caches[kind]) as cache:
        f = cache.derive("f", [3], view=1)[0]
        y = cache.derive("y", [3], view=1)[0]
        tail = cache.tail()
    if kind == "none":
        np.testing.assert_allclose(f, y)
        return
    root = np.sqrt((y.astype(np.float64) ** 2).mean(-1, keepdims=True) + tail["eps"])
    np.testing.assert_allclose(f, y / root * tail["rms_gamma"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", TRIED)
def test_the_teacher_in_the_loop_gives_the_same_losses(
    kind: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    images = ("--images", str(fx.pictures()), "--cache", str(caches[kind]))
    online = ("--teacher", "online", *WEIGHTS)
    for name, more in (("cached", ()), ("online", online)):
        fx.good(fx.train("kd", tmp_path / name, *images, *STEPS, *more, sets=sets(kind)))
    np.testing.assert_allclose(
        fx.losses(tmp_path / "online"), fx.losses(tmp_path / "cached"), rtol=2e-3
    )


@pytest.mark.parametrize("kind", TRIED)
def test_a_teacher_is_judged(kind: str, tmp_path: Path) -> None:
    images = fx.save_pictures(tmp_path / "labelled", 24, classes=3)
    for pool in ("cls", "mean"):
        given = ("--images", str(images), "--teacher", KINDS[kind], *WEIGHTS, "--pool", pool)
        ran = fx.good(fx.stud("eval", "knn", *given, "--device", "cpu", home=tmp_path / "home"))
        assert "24" in ran.out + ran.err


def test_a_cache_whose_end_told_nothing_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version wrote no tail of a teacher without a final norm; the file stays as the
    manifest has it."""
    with monkeypatch.context() as earlier:
        earlier.setattr(TimmVit, "tail", lambda self: {})
        make("none", tmp_path / "c")
    make("none", tmp_path / "c")
    fx.good(fx.feat("verify", str(tmp_path / "c")))
    with Cache(tmp_path / "c") as cache, pytest.raises(UserError, match="has nothing"):
        cache.derive("f", [0])


# ---------------------------------------------------------------- no attention


def test_without_attention_the_order_is_uniform_and_nothing_else_is_stored(
    caches: dict[str, Path],
) -> None:
    with Cache(caches["no attention"]) as cache:
        assert cache.identity["order"] == "uniform"
        assert "attention" not in cache.fields
        orders = cache.read(np.arange(len(cache)), 0, ("mask_order",))["mask_order"]
        assert cache.manifest["arrays"]["mask_order"]["item"] == [16]
    assert sorted(orders[0].tolist()) == list(range(16))
    assert len({tuple(order) for order in orders.tolist()}) == len(orders)
    shard = json.loads(next((caches["no attention"] / "shards").glob("0*.json")).read_text())
    assert "attention" not in shard["statistics"]
    for kind in ("rms", "none"):
        with Cache(caches[kind]) as cache:
            assert cache.identity["order"] == "attentive"
            assert "attention" in cache.fields


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--tokens", "ranked", "--keep", "5"), ("--codec", "q8")])
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_without_attention_other_layouts_work_too(
    options: tuple[str, ...], store: str, tmp_path: Path
) -> None:
    cache = make("wide", tmp_path / "c", *options, "--store", store)
    fx.good(fx.feat("verify", str(cache)))
    derived = ("derive", str(cache), str(tmp_path / "d"), "--levels", "3")
    fx.good(fx.feat(*derived))
    with Cache(tmp_path / "d") as other:
        assert "attention" not in other.fields
    images = ("--images", str(fx.pictures()))
    fx.good(fx.feat("info", str(cache)))
    mask = "mask=stored" if "--keep" in options else "mask=uniform"
    given = ("--cache", str(cache), *images, *STEPS)
    fx.good(fx.train("maskalign", tmp_path / "r", *given, sets=(mask, "mask_ratio=0.7")))


@pytest.mark.parametrize("order", ["attentive", "topk"])
def test_an_order_by_attention_that_there_is_not_is_refused(order: str, tmp_path: Path) -> None:
    ran = fx.feat(
        "extract", "--teacher", AIM, *WEIGHTS, "--images", str(fx.pictures()), "--size", "32",
        "--order", order, "--levels", "last:1", "--out", str(tmp_path / "c"),
    )  # fmt: skip
    assert ran.status == 2
    assert f"--order {order}: teacher {AIM!r} has no [CLS] token and no attention pool" in ran.line
    assert "--order uniform" in ran.line


@pytest.mark.parametrize("mask", ["attentive", "topk"])
@pytest.mark.parametrize("online", [False, True])
def test_a_mask_by_attention_that_there_is_not_is_refused(
    mask: str, online: bool, caches: dict[str, Path], tmp_path: Path
) -> None:
    where: tuple[str, ...] = ("--cache", str(caches["no attention"]))
    if online:
        where = ("--teacher", "online", "--teacher-name", AIM, *WEIGHTS)
        where += ("--policy", str(fx.policy_file()))
    images = ("--images", str(fx.pictures()))
    recipe = "mrmae" if mask == "topk" else "maskalign"
    ran = fx.train(recipe, tmp_path / "r", *where, *images, *STEPS, sets=(f"mask={mask}",))
    assert ran.status == 1
    assert f"mask={mask} reads attention, and teacher {AIM!r} has none" in ran.line
    assert "--set mask=uniform, or take another teacher" in ran.line
    assert "extract" not in ran.line  # none would store it
    assert not (tmp_path / "r").exists()


def test_several_teachers_take_each_its_own_order(tmp_path: Path) -> None:
    images, clip = fx.pictures(), f"timm:vit_tiny_patch16_224,{TINY}"
    cache = fx.extract(
        images, tmp_path / "c", "--teacher", AIM, *WEIGHTS, "--levels", "last:1", teacher=clip
    )
    with Cache(cache) as both:
        orders = [both.manifest_of(name)["identity"]["order"] for name in both.teachers]
        assert orders == ["attentive", "uniform"]
        assert "attention" in both.fields
        assert f"{AIM}/attention" not in both.fields


def test_a_recipe_that_needs_attention_is_refused_by_name(tmp_path: Path) -> None:
    ran = fx.feat(
        "extract", "--for", "kd", "--teacher", AIM, *WEIGHTS, "--images", str(fx.pictures()),
        "--size", "32", "--out", str(tmp_path / "c"), "--dry-run",
    )  # fmt: skip
    assert ran.status == 2
    assert "attention is not stored" in ran.line


def test_patches_that_no_teacher_attends_to_are_not_chosen() -> None:
    teacher: Any = teachers.load(AIM, "random:0")
    choose = chosen_patches(teacher, 0.5, "cpu").choose
    with pytest.raises(UserError, match="gives no attention of"):
        choose(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
