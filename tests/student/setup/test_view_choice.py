"""One cache of wide crops for recipes of narrower ones: what is shown, said, recorded and
refused."""

from __future__ import annotations

import functools
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import UsageError, UserError
from featcache.reading import crop_range, join
from featcache.reading.cache import Cache
from student import checkpoint, recipes
from student.data.loader import Loader
from student.setup import view_choice
from student.targets.cached import CachedTargets
from student.training import metrics
from tests import student_fixtures as fx

STEPS = ("--steps", "6", "--batch-size", "10", "--precision", "fp32")
ALLOWED = ("--without-view", "0.2")


@functools.cache
def wide_path() -> Path:
    """24 pictures, 3 views in (0.08, 1), levels 2 to 4."""
    return fx.extract(fx.pictures(), fx.root() / "wide", "--scale", "0.08,1")


def areas(cache: Cache) -> dict[str, list[float]]:
    """Of every picture by its key, the stored areas of its views."""
    rows = np.arange(len(cache))
    table = np.stack([cache.read(rows, view, ("area",))["area"] for view in range(cache.views)], 1)
    return dict(zip(cache.keys, table.tolist(), strict=True))


def every(cache: Cache) -> tuple[Any, Any]:
    rows = np.arange(len(cache), dtype=np.int64)
    return rows + 100, rows


# --- the choice -----------------------------------------------------------------------------------


def test_the_published_range_is_shown_and_said() -> None:
    with Cache(wide_path()) as cache:
        low = {key: [area >= 0.6 for area in row] for key, row in areas(cache).items()}
        lost = [key for key, row in low.items() if not any(row)]
        assert 0 < len(lost) < 6  # the case is one where something is left out
        show = view_choice.choose_views(cache, *every(cache), (0.6, 1.0), most_left_out=0.5)
        kept = [i for i, row in enumerate(low.values()) if any(row)]
        assert show.rows.tolist() == kept
        assert show.pictures.tolist() == [i + 100 for i in kept]
        share = np.mean(list(low.values()))
        assert show.notes == (
            f"crops of 0.6-1 of the area are shown, 0.08-1 are stored: {share:.1%} of the views",
            f"{len(lost)} {'picture' if len(lost) == 1 else 'pictures'} have none of these and are "
            f"left out: {', '.join(lost[:5])}",
        )
        assert show.record == {
            "crops": {"scale": [0.6, 1.0], "left_out": len(lost), "left_out_first": lost}
        }
        assert show.schedule is not None
        digests = cache.keys.digests[kept]
        for epoch in range(6):
            for key, view in zip(
                [cache.keys[i] for i in kept], show.schedule.view(digests, epoch), strict=True
            ):
                assert low[key][view], (key, epoch)


def test_a_range_that_was_asked_for_departs_from_the_published_one() -> None:
    with Cache(wide_path()) as cache:
        show = view_choice.choose_views(cache, *every(cache), (0.2, 1.0), (0.6, 1.0), 0.5)
        assert show.notes[0] == "crops of 0.6-1 of the area; the recipe was published with 0.2-1"
        assert show.record["crops"]["scale"] == [0.6, 1.0]
        whole = view_choice.choose_views(cache, *every(cache), (0.2, 1.0), (0.08, 1.0))
        assert whole.schedule is None
        assert whole.record == {}
        assert whole.notes == ("crops of 0.08-1 of the area; the recipe was published with 0.2-1",)
        assert len(whole.rows) == 24


def test_the_caches_own_range_is_all_of_it() -> None:
    with Cache(wide_path()) as cache:
        show = view_choice.choose_views(cache, *every(cache), (0.08, 1.0))
        assert (show.schedule, show.notes, show.record) == (None, (), {})


def test_a_narrower_cache_is_used_as_it_is_and_says_so() -> None:
    """No rejection makes wider crops of narrower ones."""
    with Cache(fx.cache_path()) as cache:
        show = view_choice.choose_views(cache, *every(cache), (0.08, 1.0))
        assert show.schedule is None
        assert show.notes == ("crops of 0.2-1 of the area; the recipe was published with 0.08-1",)


@pytest.mark.parametrize("wanted", [(0.08, 1.0), (0.05, 0.5), (0.5, 0.4), (0.5, 1.5)])
def test_a_range_that_the_cache_does_not_hold(wanted: tuple[float, float]) -> None:
    with (
        Cache(fx.cache_path()) as cache,
        pytest.raises(UsageError, match=r"the cache holds crops of 0\.2-1 of the"),
    ):
        view_choice.choose_views(cache, *every(cache), (0.2, 1.0), wanted)


def test_too_many_pictures_without_a_view() -> None:
    """The message counts them and names three ways out; each of them works, the command that adds
    views too."""
    with Cache(wide_path()) as cache:
        low = {key: [area >= 0.6 for area in row] for key, row in areas(cache).items()}
        lost = [key for key, row in low.items() if not any(row)]
        with pytest.raises(UserError) as caught:
            view_choice.choose_views(cache, *every(cache), (0.6, 1.0))
        message = str(caught.value)
        assert f"{len(lost)} picture" in message
        assert (
            f"of 24 ({len(lost) / 24:.2%}) have no view with a crop of 0.6-1 of the area among "
            "their 3" in message
        )
        assert f"the first is {lost[0]!r}; allowed: 0.10%" in message
        assert "show all views with --scale 0.08,1" in message
        share = float(message.split("--without-view ")[1].split(",")[0])
        assert len(lost) / 24 <= share <= len(lost) / 24 + 0.001
        assert len(
            view_choice.choose_views(cache, *every(cache), (0.6, 1.0), most_left_out=share).rows
        ) == 24 - len(lost)
        by_shape: dict[int, list[float]] = {}
        for key, row in low.items():
            with Image.open(fx.pictures() / f"{key}.png") as picture:
                shape = round(abs(math.log(picture.height / picture.width)) / 0.1)
            by_shape.setdefault(shape, []).append(1 - np.mean(row))
        words = shlex.split(message.split("featcache extract", 1)[1])
        views = int(words[words.index("--views") + 1])
        left = [
            sum(len(each) * np.mean(each) ** v for each in by_shape.values())
            for v in (views, views - 1)
        ]
        assert left[0] <= 0.5 < left[1]  # half a picture, where 0.1 % is none of 24


def test_the_share_that_is_named_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """27 of 3,000: 0.009, although 0.009 * 3000 is a little less than 27."""
    rows = np.arange(24).repeat(125)
    accepted = np.ones((3000, 3), bool)
    accepted[:27] = False
    monkeypatch.setattr(crop_range, "accepted_views", lambda *_: accepted)
    with Cache(wide_path()) as cache:
        with pytest.raises(UserError, match=r"--without-view 0\.009,"):
            view_choice.choose_views(cache, rows, rows, (0.6, 1.0))
        assert (
            len(view_choice.choose_views(cache, rows, rows, (0.6, 1.0), most_left_out=0.009).rows)
            == 2973
        )


def test_more_views_are_counted_by_the_pictures_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 squares of which a tenth of the views is rejected, 50 pictures of 2:1 with eight tenths:
    50 * 0.1^v + 50 * 0.8^v is at most half a picture from v = 21 on; all together, 100 * 0.45^v
    would say 7."""
    accepted = np.ones((100, 10), bool)
    accepted[:50, :1] = False
    accepted[50:, :8] = False
    sizes = np.array([[300, 300]] * 50 + [[200, 400]] * 25 + [[400, 200]] * 25)
    cache: Any = SimpleNamespace(
        views=10,
        manifest={"identity": {}},
        levels=(1,),
        path="c",
        read=lambda *_: {"source_size": sizes.astype(np.int32)},
    )
    monkeypatch.setattr(
        view_choice.extract_command,
        "extract_options",
        lambda manifest, levels, views: ["--views", str(views)],
    )
    text = view_choice._more_views(cache, np.arange(100), accepted, 0.001)
    assert "--views 21 --add" in text


def test_none_accepted_at_all() -> None:
    with (
        Cache(wide_path()) as cache,
        pytest.raises(UserError, match=r"24 pictures of 24 \(100.00%\)") as caught,
    ):
        view_choice.choose_views(cache, *every(cache), (0.0801, 0.0802))  # no view is that small
    assert "add views" not in str(caught.value)
    assert "--without-view" not in str(caught.value)  # nothing would be left


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_shows_the_same(world: int) -> None:
    """Over three epochs, the keys and views of every step; and another order of the source changes
    no view."""
    with Cache(wide_path()) as cache:
        show = view_choice.choose_views(cache, *every(cache), (0.6, 1.0), most_left_out=0.5)
        spec = recipes.load("mae").needs(recipes.load("mae").Config())

        def steps(show: view_choice.ViewSelection, world: int) -> list[dict[str, int]]:
            targets = CachedTargets(cache, spec, show.rows, schedule=show.schedule)
            digests = cache.keys.digests[show.rows]
            ranks = [
                Loader(
                    source=join.StoredPixels(cache),
                    targets=targets,
                    pictures=show.rows,
                    digests=digests,
                    seed=3,
                    batch_size=4 // world,
                    world=world,
                    rank=rank,
                )
                for rank in range(world)
            ]
            found: list[dict[str, int]] = []
            for step in range(3 * ranks[0].steps_per_epoch):
                seen = {}
                for loader in ranks:
                    at, epoch = loader.rows(step)
                    keys = [cache.keys[row] for row in show.rows[at].tolist()]
                    seen |= dict(zip(keys, targets.view(digests[at], epoch).tolist(), strict=True))
                found.append(seen)
            return found

        alone = steps(show, 1)
        assert steps(show, world) == alone
        assert len({view for seen in alone for view in seen.values()}) == 3
        back = view_choice.choose_views(
            cache, *(part[::-1].copy() for part in every(cache)), (0.6, 1.0), most_left_out=0.5
        )
        assert show.schedule is not None
        assert back.schedule is not None
        digests = cache.keys.digests[show.rows]
        for epoch in range(4):
            assert (
                show.schedule.view(digests, epoch).tolist()
                == back.schedule.view(digests, epoch).tolist()
            )


# --- in training ----------------------------------------------------------------------------------


def shown_areas(run: Path, cache: Cache) -> None:
    """Every view that the run's configuration lets a picture show lies in its range."""
    about = checkpoint.read_config(run)["targets"]
    scale = about["crops"]["scale"]
    pictures, rows, _ = join.join_by_key(cache, join.StoredPixels(cache))
    show = view_choice.choose_views(cache, pictures, rows, (scale[0], scale[1]), most_left_out=1.0)
    assert show.record["crops"] == about["crops"]


def test_a_wide_cache_trains_a_recipe_of_narrower_crops(tmp_path: Path) -> None:
    """The same targets give by hand what is shown; the run says and records it."""
    options = ("--cache", wide_path(), "--images", fx.pictures(), *STEPS, *ALLOWED)
    ran = fx.good(fx.train("maskalign", tmp_path / "a", *options))
    assert "note: crops of 0.2-1 of the area are shown, 0.08-1 are stored: " in ran.err
    with Cache(wide_path()) as cache:
        shown_areas(tmp_path / "a", cache)
        expected = np.mean(
            [area >= np.float32(0.2) for row in areas(cache).values() for area in row]
        )
        assert f"{expected:.1%} of the views" in ran.err
    whole = fx.good(fx.train("maskalign", tmp_path / "b", *options, "--scale", "0.08,1"))
    assert "note: crops of 0.08-1 of the area; the recipe was published with 0.2-1" in whole.err
    assert "crops" not in checkpoint.read_config(tmp_path / "b")["targets"]
    assert fx.losses(tmp_path / "a") != fx.losses(tmp_path / "b")


@pytest.mark.slow
def test_every_recipe_of_other_crops_is_served_by_one_wide_cache(tmp_path: Path) -> None:
    """(0.2, 1), (0.4, 1) and (0.08, 1) from the same cache; caev2 without its jitter, which is
    told."""
    options = ("--cache", wide_path(), "--images", fx.pictures(), *STEPS, "--without-view", "0.5")
    for levels in ("top:1", "top:2", "top:3"):
        sets = (f"level_weights={levels}",)
        fx.good(fx.train("maskalign", tmp_path / levels, *options, sets=sets))
    for recipe, said in (
        ("mrmae", "crops of 0.2-1 of the area are shown"),
        ("milan", "crops of 0.2-1 of the area are shown"),
        ("kd", "crops of 0.2-1 of the area are shown"),
        ("mvp", "crops of 0.2-1 of the area are shown"),
        ("caev2", "crops of 0.4-1 of the area are shown"),
        ("fd", ""),
    ):
        sets = ("jitter=0",) if recipe == "caev2" else ()
        ran = fx.good(fx.train(recipe, tmp_path / recipe, *options, sets=sets))
        assert said in ran.err, recipe
        assert bool(said) == ("are shown" in ran.err)


def test_pictures_that_are_left_out_are_never_trained_on(tmp_path: Path) -> None:
    options = (
        "--cache",
        wide_path(),
        "--images",
        fx.pictures(),
        "--steps",
        "8",
        "--batch-size",
        "9",
    )
    with Cache(wide_path()) as cache:
        lost = [
            key
            for key, row in areas(cache).items()
            if not any(area >= np.float32(0.6) for area in row)
        ]
    ran = fx.good(
        fx.train("mae", tmp_path / "run", *options, "--scale", "0.6,1", "--without-view", "0.5")
    )
    assert f"left out: {', '.join(lost[:5])}" in ran.err
    saved = checkpoint.read_config(tmp_path / "run")
    assert saved["data"]["pictures"] == 24 - len(lost)
    assert saved["targets"]["crops"]["left_out_first"] == lost
    keys = {key for row in metrics.read(tmp_path / "run") for key in row.get("keys", [])}
    assert not keys & set(lost)


def test_too_many_is_one_line_before_the_run(tmp_path: Path) -> None:
    options = ("--cache", wide_path(), "--images", fx.pictures(), *STEPS, "--scale", "0.6,1")
    ran = fx.train("maskalign", tmp_path / "run", *options)
    assert ran.status == 1
    assert "have no view with a crop of 0.6-1 of the area among their 3" in ran.line
    assert not (tmp_path / "run").exists()


def test_the_teacher_in_the_loop_shows_the_same_views(tmp_path: Path) -> None:
    options = ("--cache", wide_path(), "--images", fx.pictures(), *STEPS, *ALLOWED)
    ran = fx.good(fx.train("kd", tmp_path / "a", *options, sets=("drop_path=0",)))
    online = fx.good(
        fx.train("kd", tmp_path / "b", *options, "--teacher", "online", sets=("drop_path=0",))
    )
    assert "crops of 0.2-1 of the area are shown" in ran.err
    assert "crops of 0.2-1 of the area are shown" in online.err
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "b"), rtol=2e-3)


def test_a_range_without_a_cache_is_refused(tmp_path: Path) -> None:
    options = ("--images", fx.pictures(), "--steps", "1", "--batch-size", "8", "--scale", "0.2,1")
    ran = fx.train("mae", tmp_path / "run", *options)
    assert ran.status == 2
    assert "--scale chooses among the views of a cache, and none is read here" in ran.line


def test_resuming_in_another_range_is_refused(tmp_path: Path) -> None:
    options = ("--cache", wide_path(), "--images", fx.pictures(), *STEPS, *ALLOWED)
    fx.good(fx.train("maskalign", tmp_path / "run", *options))
    ran = fx.train("maskalign", tmp_path / "run", *options, "--scale", "0.08,1", "--resume")
    assert ran.status == 1
    assert "targets.crops" in ran.line


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wide_cache_is_found_by_a_narrower_need(tmp_path: Path) -> None:
    """And one of the published crops before it; one of narrower crops is not taken."""
    home = tmp_path / "home"
    options = ("--images", fx.pictures(), *STEPS, *ALLOWED)
    sets = (f"teacher={fx.TEACHER}", "teacher_depth=4", "teacher_width=24")
    shutil.copytree(wide_path(), home / "wide")
    ran = fx.good(fx.train("maskalign", tmp_path / "a", *options, sets=sets, home=home))
    assert "crops of 0.2-1 of the area are shown, 0.08-1 are stored" in ran.err
    shutil.copytree(fx.cache_path(), home / "narrow")
    ran = fx.good(fx.train("maskalign", tmp_path / "b", *options, sets=sets, home=home))
    assert "are shown" not in ran.err
    shutil.rmtree(home / "wide")
    ran = fx.train("fd", tmp_path / "c", *options, sets=sets, home=home)
    assert ran.status == 1
    assert "its views are drawn at scale [0.2, 1.0]" in ran.line
    assert "--scale 0.08,1" in ran.line
