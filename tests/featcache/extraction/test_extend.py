"""Adding views, levels and teachers: the union reads as if all had been extracted at once, and
nothing is rewritten."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache.errors import UsageError, UserError
from featcache.extraction import extend, extract, plan
from featcache.extraction.progress import ExtractProgress
from featcache.maintenance import repair, verify
from featcache.models.contract import Teacher
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.storage import manifest
from featcache.storage.store import STORES
from featcache.teachers import load
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, copy_tree, files_below, flip

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=16,embed_dim=24,depth=6,num_heads=3"
teacher = functools.cache(load)


def make(
    folder: Path, name: str = SYNTHETIC, weights: str | None = None, **changes: object
) -> plan.Plan:
    """Two views and levels 2, 3 of the synthetic teacher, or two levels of a ViT."""
    policy = changes.pop("policy", Policy(size=28))
    options = {
        "views": 2,
        "levels": (2, 3) if name == SYNTHETIC else (5, 6),
        "rows_per_shard": 5,
        **changes,
    }
    return plan.Plan(
        source=open_source(folder), teacher=teacher(name, weights), policy=policy, **options
    )


def add(wanted: plan.Plan, out: Path) -> Path:
    """Do what the command does with --add; return the folder of the part."""
    part = extend.plan_part(wanted, out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return part[1]


def numbers(cache: featcache.Cache, teacher: str | None = None) -> dict[str, np.ndarray]:
    """Every array of one teacher, (n, V, ...)."""
    names = [
        name
        for name in cache.fields
        if name.startswith(f"{teacher}/") or (teacher is None and "/" not in name)
    ]
    count = cache.views if teacher is None else cache.views_of(teacher)
    return {
        name.rpartition("/")[2]: np.stack(
            [cache.read(range(len(cache)), v, [name])[name] for v in range(count)], 1
        )
        for name in names
    }


def assert_equal(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() <= wanted.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


@functools.cache
def base(pictures: Path, store: str) -> Path:
    out = pictures.parent / f"base-{store}"
    extract.run(make(pictures, store=store), out, batch_size=4)
    return out


@functools.cache
def grown(pictures: Path, store: str) -> Path:
    """Levels, then views, then a second teacher, then views again, which that teacher follows."""
    out = copy_tree(base(pictures, store), pictures.parent / f"grown-{store}")
    add(make(pictures, levels=(1,), store=store), out)
    add(make(pictures, views=4, levels=(1, 2, 3), store=store), out)
    add(make(pictures, VIT, "random:0", levels=(6,), store=store), out)
    add(make(pictures, VIT, "random:0", levels=(3, 6), store=store), out)
    add(make(pictures, views=5, levels=(1, 2, 3), store=store), out)
    add(make(pictures, VIT, "random:0", levels=(6,), store=store), out)
    return out


@functools.cache
def at_once(pictures: Path, name: str = SYNTHETIC) -> dict[str, np.ndarray]:
    """All of it by one extraction."""
    out = pictures.parent / ("once-" + name[:4])
    levels, weights = ((1, 2, 3), None) if name == SYNTHETIC else ((3, 6), "random:0")
    extract.run(make(pictures, name, weights, views=5, levels=levels), out, batch_size=4)
    with featcache.open(out) as cache:
        return numbers(cache)


# ---------------------------------------------------------------- the union


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("store", STORES)
def test_the_union_equals_one_extraction(pictures: Path, store: str) -> None:
    with featcache.open(grown(pictures, store)) as cache:
        assert (cache.views, cache.levels) == (5, (1, 2, 3))
        assert cache.teachers == [SYNTHETIC, VIT]
        assert (cache.levels_of(VIT), cache.views_of(VIT)) == ((3, 6), 5)
        own = numbers(cache)
        assert own.keys() == at_once(pictures).keys()
        assert_equal(own, at_once(pictures))
        theirs = numbers(cache, VIT)
        assert theirs.keys() == {"features", "feature_stats", "attention", "mask_order"}
        # batches are others, so the last bit may be
        for key in ("features", "feature_stats", "attention"):
            np.testing.assert_allclose(
                theirs[key], at_once(pictures, VIT)[key], rtol=1e-2, atol=1e-2
            )


@pytest.mark.slow
@settings(max_examples=80)
@given(
    rows=st.lists(st.integers(0, 10), min_size=1, max_size=9),
    views=st.data(),
    levels=st.one_of(st.none(), st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=4)),
    tokens=st.one_of(st.none(), st.integers(1, 5)),
    store=st.sampled_from(list(STORES)),
    check=st.booleans(),
)
def test_views_of_several_parts_in_one_read(
    pictures: Path, rows: list[int], views: st.DataObject, levels: list[int] | None,
    tokens: int | None, store: str, check: bool,
) -> None:  # fmt: skip
    view = views.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    slots = [level - 1 for level in (levels or (1, 2, 3))]
    fields = ["features", "feature_stats", "attention", "crop", "source_size"]
    wanted = at_once(pictures)
    with featcache.open(grown(pictures, store)) as cache:
        got = cache.read(rows, view, fields, levels=levels, tokens=tokens, check=check)
    for name in fields:
        picked = wanted[name][rows, view]
        picked = (
            picked[:, slots][:, :, :tokens] if name in ("features", "feature_stats") else picked
        )
        np.testing.assert_array_equal(got[name], picked, err_msg=name)


def test_the_bases_files_stay_as_they_were(pictures: Path) -> None:
    before, after = (files_below(path(pictures, "zarr")) for path in (base, grown))
    assert {name: data for name, data in after.items() if not name.startswith("parts/")} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"parts"}
    assert not [name for name in after if "tmp" in name or "lease" in name]


@pytest.mark.slow
def test_ranked_tokens_and_stored_pixels_are_added_alike(photos: Path, tmp_path: Path) -> None:
    options = {"tokens": "ranked", "keep": 3, "pixels": True}
    extract.run(make(photos, **options), tmp_path / "c", batch_size=4)
    add(make(photos, levels=(1,), **options), tmp_path / "c")
    part = add(make(photos, views=3, levels=(1, 2, 3), tokens="ranked", keep=3), tmp_path / "c")
    assert "pixels" in manifest.read(part)["arrays"]  # as the cache has them
    extract.run(make(photos, views=3, levels=(1, 2, 3), **options), tmp_path / "once", batch_size=4)
    with featcache.open(tmp_path / "c") as cache, featcache.open(tmp_path / "once") as once:
        assert_equal(numbers(cache), numbers(once))
        for tokens in (1, 2, 4):
            got, wanted = (
                each.read([9, 1, 1], [2, 0, 1], tokens=tokens)["features"] for each in (cache, once)
            )
            np.testing.assert_array_equal(got, wanted)


def test_what_is_there_is_not_added_again(pictures: Path) -> None:
    for wanted in (
        make(pictures),
        make(pictures, levels=(1,)),
        make(pictures, views=4),
        make(pictures, views=1, levels=(3,)),
        make(pictures, VIT, "random:0", levels=(3,)),
    ):
        assert extend.plan_part(wanted, grown(pictures, "zarr")) is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policy": Policy(size=28, seed=1)}, "identity.policy.seed is 1, the cache has 0"),
        ({"policy": Policy(size=30)}, "identity.policy.size"),
        ({"order": "uniform"}, "identity.order"),
        ({"tokens": "ranked"}, "identity.tokens"),
        ({"store": "webdataset"}, "identity.store"),
        ({"pixels": True}, "identity.pixels"),
        ({"views": 9}, "one after the other"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_field(
    pictures: Path, tmp_path: Path, change: dict, told: str
) -> None:
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    with pytest.raises(UsageError) as caught:
        extend.plan_part(make(pictures, **{"levels": (1,), **change}), out)
    assert told in str(caught.value)
    assert not (out / "parts").exists()


def test_other_pictures_and_other_weights_are_refused(
    pictures: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"identity\.pictures"):
        extend.plan_part(make(photos, levels=(1,)), base(pictures, "zarr"))
    extract.run(make(photos, VIT, "random:0"), tmp_path / "vit", batch_size=4)
    with pytest.raises(UsageError, match=r"identity\.teacher\.weight_hash.*same weights"):
        extend.plan_part(make(photos, VIT, "random:1", levels=(4,)), tmp_path / "vit")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": "random:1"}, "identity.teacher.weight_hash"),
        ({"tokens": "ranked"}, "identity.tokens"),
        ({"order": "topk"}, "identity.order"),
    ],
    ids=str,
)
def test_a_second_teachers_parts_must_agree(pictures: Path, change: dict, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        extend.plan_part(
            make(pictures, VIT, **{"weights": "random:0", "levels": (4,), **change}),
            grown(pictures, "zarr"),
        )
    assert told in str(caught.value)


def test_an_unfinished_cache_gets_nothing_added(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    (out / "shards/000001.json").unlink()
    with pytest.raises(UserError, match=r"is incomplete; finish it first"):
        extend.plan_part(make(pictures, levels=(1,)), out)
    with pytest.raises(UserError, match="no cache at"):
        extend.plan_part(make(pictures, levels=(1,)), tmp_path)


def test_an_unfinished_addition_is_not_seen_and_is_resumed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    wanted = make(pictures, levels=(1,))
    part = extend.plan_part(wanted, out)
    assert part is not None

    def stop(progress: ExtractProgress) -> None:
        if progress.pictures >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract.run(*part, batch_size=4, progress=ExtractProgress(stop))
    assert len(list(part[1].glob("shards/0*.json"))) == 1
    with featcache.open(out) as cache:
        assert cache.levels == (2, 3)
    with pytest.raises(
        UserError, match=r"an addition is unfinished, .*levels 1 .*finish it, or remove"
    ):
        extend.plan_part(make(pictures, views=3), out)
    assert extend.plan_part(wanted, out) == part
    progress = ExtractProgress()
    extract.run(*part, batch_size=4, progress=progress)
    assert progress.pictures == 8  # of thirteen
    with featcache.open(out) as cache:
        assert cache.levels == (1, 2, 3)
    add(wanted, whole := copy_tree(base(pictures, "zarr"), tmp_path / "whole"))
    assert files_below(out) == files_below(whole)


def test_an_addition_that_died_before_its_manifest_is_no_obstacle(
    pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    part = extend.plan_part(make(pictures, levels=(1,)), out)
    assert part is not None
    part[1].mkdir(parents=True)
    with featcache.open(out) as cache:
        assert cache.levels == (2, 3)
    assert verify.verify_cache(out)[0] == []
    add(make(pictures, levels=(1,)), out)
    with featcache.open(out) as cache:
        assert cache.levels == (1, 2, 3)


def test_a_part_of_other_rows_is_not_read(pictures: Path, photos: Path, tmp_path: Path) -> None:
    """Copied in by hand from a cache of other pictures."""
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    extract.run(make(photos, levels=(1,)), tmp_path / "stray", batch_size=4)
    (out / "parts").mkdir()
    (tmp_path / "stray").rename(out / "parts/stray")
    with pytest.raises(
        UserError, match=r"parts/stray' does not belong to cache .*pictures.count.*move it away"
    ):
        featcache.open(out)


# ---------------------------------------------------------------- verify, repair, info


def test_damage_in_a_part_is_found_and_repaired(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(grown(pictures, "zarr"), tmp_path / "c")
    before = files_below(out)
    parts = sorted((out / "parts").iterdir())
    assert len(parts) == 6
    places = [
        parts[0] / "shards/000001.zarr/features/c.0.1.0.0.0",
        parts[2] / "manifest.json",
        parts[3] / "shards/000000.json",
    ]
    for place in places:
        flip(place, place.stat().st_size // 2)

    def load_of(about: dict) -> tuple[Source, Teacher]:
        return open_source(pictures), load(
            about["identity"]["teacher"]["name"], about["provenance"]["weights"]
        )

    with pytest.raises(UserError, match=str(places[1])):
        verify.verify_cache(out)
    done = repair.run(out, load_of)
    assert [str(places[1])] == done["restored"]
    assert len(done["shards"]) == 2
    assert files_below(out) == before
    assert verify.verify_cache(out) == ([], 7 * 3)


def test_the_command_adds_shows_and_has_nothing_more_to_do(
    featcache_command: Callable[..., Ran], pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(base(pictures, "zarr"), tmp_path / "c")
    args = (
        "extract",
        "--teacher",
        SYNTHETIC,
        "--images",
        pictures,
        "--size",
        28,
        "--out",
        out,
        "--batch-size",
        4,
    )
    told = featcache_command(*args, "--add", "--levels", 1, "--dry-run")
    assert told.status == 0, told.err
    assert "would write" in told.out
    assert "3 shards" in told.out
    assert not (out / "parts").exists()
    for text in ("11 pictures", "nothing to add"):
        ran = featcache_command(*args, "--add", "--levels", 1)
        assert ran.status == 0, ran.err
        assert text in ran.out
    ran = featcache_command(*args, "--add", "--levels", "all", "--views", 3, "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["rows"], facts["complete"], facts["new_pictures"]) == (11, True, 13)
    text = featcache_command("info", out).out
    assert len([line for line in text.splitlines() if line.startswith("added: ")]) == 2
    facts = json.loads(featcache_command("info", out, "--json").out)
    assert facts["views"] == 3
    assert facts["arrays"]["features"]["shape"][:3] == [11, 3, 3]
    assert featcache_command("verify", out).status == 0
    ran = featcache_command("verify", out, "--recompute", 8)
    assert ran.status == 0, ran.err
    ran = featcache_command(*args[:-4], "--add", "--levels", 1)
    assert ran.status == 2
    assert "--out CACHE" in ran.error


def test_removing_a_part_leaves_the_cache(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(grown(pictures, "zarr"), tmp_path / "c")
    shutil.rmtree(out / "parts")
    assert files_below(out) == files_below(base(pictures, "zarr"))
