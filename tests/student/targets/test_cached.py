"""Views and targets of a step: which view is shown, what a mask depends on, and what the teacher in
the loop gives."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache import rng, teachers
from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.targets.attention import mask_order
from featcache.views.draw import draw_views, stored_view
from featcache.views.policy import Policy
from student import config, recipes
from student.data.loader import Loader
from student.data.prefetch import to_device
from student.recipes import TargetSpec
from student.setup import cache_match
from student.targets.assemble import draw_masks
from student.targets.cached import CachedTargets
from student.targets.online import OnlineTargets
from tests import student_fixtures as fx

CPU = torch.device("cpu")


def settings_of(recipe: str, *changes: str) -> Any:
    kind = recipes.load(recipe).Config
    facts = cache_match.cache_facts(fx.open_cache().identity)
    settings = config.parse_settings(kind, [*fx.RECIPES[recipe], *changes])
    return cache_match.config_with_facts(kind, settings, facts)


# --- which view -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 9), first=st.integers(0, 10**6), n=st.integers(1, 50))
def test_every_view_equally_often(count: int, first: int, n: int) -> None:
    """In any `count` epochs in a row each picture shows each of its views once."""
    digests = rng.key_digests(f"{first}-{i}" for i in range(n))
    shown = np.stack([stored_view(digests, first + epoch, count) for epoch in range(count)])
    assert (np.sort(shown, 0) == np.arange(count)[:, None]).all()


def test_a_batch_mixes_views() -> None:
    """3,000 pictures in one epoch: each of 4 views has its quarter, within five standard
    deviations."""
    counts = np.bincount(
        stored_view(rng.key_digests(f"n{i}" for i in range(3000)), 5, 4), minlength=4
    )
    assert (abs(counts - 750) < 5 * (3000 * 0.25 * 0.75) ** 0.5).all()


def test_literal_views() -> None:
    """(epoch + first word of BLAKE2b-128(key)) mod 4, by hand with hashlib."""
    import hashlib

    keys = ["a", "n01/b", "c.d", "ü"]
    words = [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()[:8], "little")
        for key in keys
    ]
    for epoch in (0, 1, 7, 2**33):
        expected = [(epoch + word) % 4 for word in words]
        assert stored_view(rng.key_digests(keys), epoch, 4).tolist() == expected


def test_views_in_cache_and_online_agree_and_fresh_ones_count_epochs() -> None:
    cache = fx.open_cache()
    digests = cache.keys.digests
    spec = TargetSpec(teacher="", levels=(), fields=(), patches=16)
    stored = CachedTargets(cache, spec, np.arange(len(cache)))
    online = OnlineTargets(stored.policy, spec, None, fx.VIEWS)
    fresh = OnlineTargets(stored.policy, spec, None, None)
    for epoch in range(5):
        assert stored.view(digests, epoch).tolist() == online.view(digests, epoch).tolist()
        assert set(fresh.view(digests, epoch).tolist()) == {epoch}


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["attentive", "uniform", "stored"])
def test_masks_do_not_depend_on_the_batch(mask: str) -> None:
    """A picture's mask alone, in another order, or among others: (seed, epoch, key) and its own row
    decide."""
    settings_ = settings_of("mralign", f"mask={mask}")
    digests = rng.key_digests(f"k{i}" for i in range(10))
    weights = np.random.default_rng(0).random((10, 16)).astype(np.float32)
    orders = np.argsort(np.random.default_rng(1).random((10, 16)), 1).astype(np.uint8)

    def masks(rows: list[int], seed: int = 3, epoch: int = 2) -> Any:
        sources: dict[str, Any] = {"attention": weights[rows], "mask_order": orders[rows]}
        return draw_masks(settings_, {"digests": digests[rows], "round": epoch}, sources, seed)[
            "ids_keep"
        ]

    together = masks(list(range(10)))
    assert together.shape == (10, 4)
    for rows in ([4], [9, 0, 4], [4, 4]):
        torch.testing.assert_close(masks(rows), together[rows], rtol=0, atol=0)
    changes = [
        torch.equal(masks(list(range(10)), **other), together)
        for other in ({"seed": 4}, {"epoch": 3})
    ]
    assert changes == [mask == "stored"] * 2
    if mask == "stored":
        assert together.tolist() == np.sort(orders[:, :4], 1).tolist()


def test_masks_part_the_patches() -> None:
    settings_ = settings_of("maskalign", "mask=uniform")
    digests = rng.key_digests(f"k{i}" for i in range(6))
    drawn = draw_masks(settings_, {"digests": digests, "round": 0}, {}, 0)
    both = torch.cat([drawn["ids_keep"], drawn["ids_masked"]], 1).sort(1).values
    assert drawn["ids_keep"].shape == (6, int(16 * (1 - 0.7)))
    assert both.tolist() == [list(range(16))] * 6
    assert drawn["ids_keep"].dtype == torch.int64


# --- the teacher in the loop ----------------------------------------------------------------------


def loader_of(targets_: Any, keys: list[str], source: Source, batch: int = 6) -> Loader:
    return Loader(
        source=source,
        targets=targets_,
        pictures=np.arange(len(keys)),
        digests=rng.key_digests(keys),
        seed=0,
        batch_size=batch,
    )


def hosts(targets_: Any, steps: int = 4) -> list[dict[str, Any]]:
    source = open_source(fx.pictures())
    loader = loader_of(targets_, list(source.keys), source)
    with ThreadPoolExecutor(2) as pool:
        return [loader.batch(step, 0, pool) for step in range(steps)]


def test_online_targets_equal_an_independent_computation() -> None:
    """The view drawn and cropped by hand, the teacher called on one picture, h = (y - mean) / std
    in numpy."""
    teacher = teachers.load(fx.TEACHER)
    spec = TargetSpec(
        teacher=fx.TEACHER,
        levels=(2, 4),
        fields=("features", "attention", "mask_order"),
        patches=16,
    )
    policy = Policy(size=fx.SIZE, seed=5)
    online = OnlineTargets(policy, spec, teacher, fx.VIEWS, "attentive")
    for host in hosts(online):
        got, sources = online.to_device(host, CPU)
        assert got["features"].shape == (6, 2, 17, 24)
        for i, key in enumerate(host["keys"]):
            view, digest = int(host["view"][i]), rng.key_digests([key])
            with Image.open(fx.pictures() / f"{key}.png") as picture:
                sizes = np.array([(picture.height, picture.width)])
                drawn = draw_views(policy, digest, sizes, [view])
                top, left, height, width = drawn.crop[0, 0].tolist()
                crop = picture.convert("RGB").crop((left, top, left + width, top + height))
            pixels = np.asarray(crop.resize((fx.SIZE, fx.SIZE), Image.Resampling.BICUBIC))
            pixels = pixels[:, ::-1].copy() if drawn.flip[0, 0] else pixels.copy()
            ys, attention = teacher(
                torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), (2, 4)
            )
            for level, y in enumerate(ys):
                y64 = y[0].numpy().astype(np.float64)
                h = (y64 - y64.mean(-1, keepdims=True)) / np.sqrt(y64.var(-1, keepdims=True) + 1e-5)
                np.testing.assert_allclose(
                    got["features"][i, level].numpy(), h, rtol=1e-4, atol=1e-5
                )
            np.testing.assert_array_equal(sources["attention"][i], attention[0].numpy())
            order = mask_order("attentive", attention.numpy(), digest, view, policy.seed)
            np.testing.assert_array_equal(sources["mask_order"][i], order[0])


@pytest.mark.parametrize("fields", [("features", "attention"), ("features", "mask_order")])
def test_online_gives_what_the_cache_holds(fields: tuple[str, ...]) -> None:
    """attention and mask_order to the bit, features within fp16's rounding."""
    cache = fx.open_cache()
    spec = TargetSpec(teacher=fx.TEACHER, levels=(3, 4), fields=fields, patches=16)
    source = open_source(fx.pictures())
    stored = CachedTargets(cache, spec, cache.keys.find(source.keys))
    online = OnlineTargets(
        stored.policy, spec, teachers.load(fx.TEACHER), fx.VIEWS, cache.identity["order"]
    )
    for ours, theirs in zip(hosts(stored), hosts(online), strict=True):
        np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
        (a, from_cache), (b, from_teacher) = (
            stored.to_device(ours, CPU),
            online.to_device(theirs, CPU),
        )
        error = (a["features"] - b["features"]).norm(dim=-1) / b["features"].norm(dim=-1)
        assert 0 < float(error.max()) < 1e-3
        np.testing.assert_array_equal(from_cache[fields[1]], from_teacher[fields[1]])


def test_the_cache_gives_float32_features() -> None:
    cache = fx.open_cache()
    spec = TargetSpec(teacher=fx.TEACHER, levels=(4,), fields=("features",), patches=16)
    stored = CachedTargets(cache, spec, np.arange(len(cache)))
    got, sources = stored.to_device(hosts(stored, 1)[0], CPU)
    assert got["features"].dtype == torch.float32
    assert sources == {}


def test_nothing_is_computed_where_nothing_is_needed() -> None:
    spec = TargetSpec(teacher="", levels=(), fields=(), patches=16)
    online = OnlineTargets(Policy(size=fx.SIZE), spec, None, None)
    assert online.to_device(hosts(online, 1)[0], CPU) == ({}, {})


# --- ranked caches --------------------------------------------------------------------------------


def test_ranked_tokens_go_back_to_their_patches() -> None:
    """All tokens: what the raster cache holds. The first five: those, and NaN on every patch beyond
    them."""
    raster, ranked = fx.open_cache(), Cache(fx.ranked_path())
    rows = np.arange(len(raster))
    spec = TargetSpec(teacher=fx.TEACHER, levels=(2, 4), fields=("features",), patches=16)
    order = raster.read(rows[:6], 1, ("mask_order",))["mask_order"].astype(int)
    plain = CachedTargets(raster, spec, rows)
    whole = plain.to_device(plain.fetch(rows[:6], np.ones(6, int)), CPU)[0]["features"]
    for tokens in (None, 17, 5, 1):
        some = CachedTargets(ranked, spec, rows, tokens=tokens)
        host = some.fetch(rows[:6], np.ones(6, int))
        assert host["features"].shape == (6, 2, tokens or 17, 24)
        got, sources = some.to_device(host, CPU)
        assert sources == {}  # the order was read to place tokens, not to draw a mask from
        there = np.zeros((6, 17), bool)
        there[:, 0] = True
        np.put_along_axis(there, 1 + order[:, : (tokens or 17) - 1], True, axis=1)
        for i in range(6):
            assert torch.equal(got["features"][i][:, there[i]], whole[i][:, there[i]])
            assert got["features"][i][:, ~there[i]].isnan().all()


def test_only_the_prefix_is_read(tmp_path: Path) -> None:
    """A ranked cache whose bytes beyond the first five tokens are all lost serves five, checked,
    and not six."""
    shutil.copytree(fx.ranked_path(), tmp_path / "c")
    rows, five = np.arange(24), 5 * 24 * 2
    cache = Cache(tmp_path / "c")
    for part in cache._parts:
        for view in range(fx.VIEWS):
            path, offsets = part.locate(0, part.arrays["features"], view, rows)
            data = bytearray(Path(path).read_bytes())
            for first in offsets.tolist():
                for level in range(3):
                    low = first + level * 17 * 24 * 2
                    data[low + five : low + 17 * 24 * 2] = bytes(17 * 24 * 2 - five)
            Path(path).write_bytes(data)
    spec = TargetSpec(teacher=fx.TEACHER, levels=(2, 4), fields=("features",), patches=16)
    view = np.arange(24) % fx.VIEWS
    host = CachedTargets(cache, spec, rows, tokens=5).fetch(rows, view)
    expected = CachedTargets(Cache(fx.ranked_path()), spec, rows, tokens=5).fetch(rows, view)
    np.testing.assert_array_equal(host["features"], expected["features"])
    with pytest.raises(UserError, match="features"):
        CachedTargets(cache, spec, rows, tokens=6).fetch(rows, view)


# --- images ---------------------------------------------------------------------------------------


def test_images_are_normalised_with_imagenets_statistics() -> None:
    settings_ = settings_of("mae")
    spec = TargetSpec(teacher="", levels=(), fields=(), patches=16)
    cache = fx.open_cache()
    stored = CachedTargets(cache, spec, np.arange(len(cache)))
    (host,) = hosts(stored, 1)
    batch = to_device(settings_, stored, host, CPU, 0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((host["pixels"].astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch["images"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert batch["images"].dtype == torch.float32
    assert set(batch) == {"images", "ids_keep", "ids_masked"}
