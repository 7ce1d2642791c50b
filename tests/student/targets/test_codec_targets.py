"""Training from caches in q8, t4 and t3: what is decoded of a batch, the teacher in the loop,
memory, two teachers, the search for a cache, and the PyTorch dataset."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from featcache import rng
from featcache.reading.cache import Cache
from featcache.reading.feature_reader import FeatureReader
from featcache.reading.tensors import to_tensor
from featcache.targets import codecs
from featcache.torch import Dataset
from student import checkpoint
from student.recipes import TargetSpec
from student.targets.cached import CachedTargets
from tests import student_fixtures as fx

WIDE = "synthetic:levels=4,tokens=16,width=64,size=32"
OTHER = "synthetic:levels=3,tokens=16,width=128,size=32"
LAYOUTS = {"raster": (), "ranked": ("--tokens", "ranked"), "kept": ("--tokens", "ranked")}
LAYOUTS["kept"] += ("--keep", "6")
LOSSY = ("q8", "t4", "t3")
STEPS = ("--steps", "4", "--batch-size", "8", "--precision", "fp32")


@functools.cache
def cache_path(codec: str, layout: str = "raster") -> Path:
    """24 pictures x 3 views in shards of five, levels 2 to 4 of 16 patches and a width of 64; not
    to be written into."""
    options = ("--codec", codec, "--rows-per-shard", "5", *LAYOUTS[layout])
    out = fx.root() / f"codec-{codec}-{layout}"
    return fx.extract(fx.pictures(), out, *options, teacher=WIDE)


def add_other(cache: Path, codec: str, *options: str) -> Path:
    """A second teacher's level 3, in a codec of its own."""
    words = ("--teacher", OTHER, "--images", str(fx.pictures()), "--size", "32", "--views", "3")
    more = ("--levels", "3", "--codec", codec, "--rows-per-shard", "5", "--add", *options)
    fx.good(fx.feat("extract", *words, *more, "--out", str(cache)))
    return cache


def in_image_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(B, L, T, D) ranked by (B, P) -> (B, L, 1 + P, D), NaN for what is not there."""
    out = np.full((*values.shape[:2], 1 + order.shape[1], values.shape[3]), np.nan, np.float32)
    for row, tokens in enumerate(values):
        out[row, :, 0] = tokens[:, 0]
        for rank in range(values.shape[2] - 1):
            out[row, :, 1 + order[row, rank]] = tokens[:, 1 + rank]
    return out


def whole_features(cache: Cache, rows: np.ndarray, views: np.ndarray, layout: str) -> np.ndarray:
    """(B, L, 1 + P, D): each level of each row decoded alone."""
    stored = np.stack([cache.derive("h", rows, views, level=level) for level in (2, 3, 4)], 1)
    order = cache.read(rows, views, ("mask_order",))["mask_order"].astype(int)
    return stored if layout == "raster" else in_image_order(stored, order)


# --- what is decoded of a batch -------------------------------------------------------------------


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visible_tokens_alone_are_decoded(
    codec: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the whole decode to the bit, and everything else is NaN."""
    rows, views = np.array([3, 0, 23, 7]), np.array([0, 2, 1, 0])
    visible = np.array([[0, 5, 15], [2, 1, 0], [7, 8, 9], [15, 14, 3]])
    counted: list[int] = []
    with Cache(cache_path(codec, layout)) as cache:
        expected = whole_features(cache, rows, views, layout)
        reader = FeatureReader(cache)
        host = cache.read(rows, views, reader.fields)
        arrays = {name: to_tensor(values) for name, values in host.items()}
        everything = reader.features(arrays).numpy()
        np.testing.assert_array_equal(everything, expected)
        decode = reader.codec.decode

        def counting(coded: Any, state: Any) -> Any:
            counted.append(coded["features"].shape[2])
            return decode(coded, state)

        reader.codec = reader.codec._replace(decode=counting)
        got = reader.features(arrays, torch.from_numpy(visible)).numpy()
    assert counted == [4]  # [CLS] and three patches
    tokens = np.zeros((4, 17), bool)
    tokens[:, 0] = True
    tokens[np.arange(4)[:, None], 1 + visible] = True
    at = np.broadcast_to(tokens[:, None], expected.shape[:3])
    np.testing.assert_array_equal(got[at], expected[at])
    assert np.isnan(got[~at]).all()
    if layout != "kept":
        assert not np.isnan(got[at]).any()
    else:
        assert np.isnan(got[at]).any()  # 6 of 16 patches are stored


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_no_more_than_the_visible_ones_is_read(layout: str) -> None:
    """A prefix of a ranked cache, as mask=stored reads it: in the order of the picture all the
    same."""
    rows, views = np.array([3, 0, 23]), np.array([0, 2, 1])
    with Cache(cache_path("t3", layout)) as cache:
        order = cache.read(rows, views, ("mask_order",))["mask_order"].astype(int)
        visible = np.sort(order[:, :4], 1) if layout != "raster" else np.tile(np.arange(4), (3, 1))
        expected = whole_features(cache, rows, views, layout)
        reader = FeatureReader(cache)
        host = cache.read(rows, views, reader.fields, None, 5)
        arrays = {name: to_tensor(values) for name, values in host.items()}
        got = reader.features(arrays, torch.from_numpy(visible)).numpy()
    for row in range(3):
        at = [0, *(1 + visible[row])]
        np.testing.assert_array_equal(got[row][:, at], expected[row][:, at])


def test_all_tokens_where_fp16_is_read() -> None:
    """Leaving out costs more there than it saves."""
    rows, views = np.array([3, 0]), np.array([0, 2])
    with Cache(cache_path("fp16")) as cache:
        reader = FeatureReader(cache)
        host = cache.read(rows, views, reader.fields)
        arrays = {name: to_tensor(values) for name, values in host.items()}
        got = reader.features(arrays, torch.tensor([[1], [2]])).numpy()
        np.testing.assert_array_equal(got, host["features"].astype(np.float32))


@pytest.mark.parametrize("layout", ["raster", "ranked"])
def test_targets_of_a_step_hold_what_is_visible(layout: str) -> None:
    spec = TargetSpec(
        teacher=WIDE, levels=(4, 2), fields=("features",), patches=16, visible_only=True
    )
    with Cache(cache_path("t4", layout)) as cache:
        source = CachedTargets(cache, spec, np.arange(len(cache)))
        rows, views = np.arange(5), np.array([0, 1, 2, 0, 1])
        host = source.fetch(rows, views)
        host["drawn"] = {"ids_keep": torch.tensor([[0, 3, 9]] * 5)}
        got = source.to_device(host, torch.device("cpu"))[0]["features"].numpy()
        whole = whole_features(cache, rows, views, layout)[:, [2, 0]]
    np.testing.assert_array_equal(got[:, :, [0, 1, 4, 10]], whole[:, :, [0, 1, 4, 10]])
    hidden = [token for token in range(17) if token not in (0, 1, 4, 10)]
    assert np.isnan(got[:, :, hidden]).all()


# --- the teacher in the loop ----------------------------------------------------------------------

RUNS = [
    ("maskalign", ()),
    ("maskalign", ("target_norm=l2", "mask=uniform")),
    ("mralign", ("mask=stored",)),
    ("fd", ()),
    ("kd", ()),
    ("mvp", ()),
    ("caev2", ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "sets"), RUNS, ids=str)
def test_the_teacher_online_gives_what_the_cache_does(
    recipe: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    """Its levels go through t3: the same losses and weights to the bit, which are not those of
    fp16."""
    given = ("--images", fx.pictures(), *STEPS)
    lossy = ("--cache", cache_path("t3"))
    cached = fx.good(fx.train(recipe, tmp_path / "a", *lossy, *given, sets=sets))
    online = fx.good(
        fx.train(recipe, tmp_path / "b", *lossy, "--teacher", "online", *given, sets=sets)
    )
    exact = ("--cache", cache_path("fp16"))
    fx.good(fx.train(recipe, tmp_path / "c", *exact, *given, sets=sets))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")
    assert fx.losses(tmp_path / "a") != fx.losses(tmp_path / "c")
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "c"), rtol=0.1)
    assert "note: the cache keeps its levels in codec t3, which is lossy: at a" in cached.err
    assert "note: the teacher's levels go through codec t3, as in the cache" in online.err
    assert checkpoint.read_config(tmp_path / "b")["targets"]["codec"] == "t3"


def test_nothing_is_said_of_a_codec_that_loses_nothing(tmp_path: Path) -> None:
    given = ("--images", fx.pictures(), *STEPS, "--cache", cache_path("fp16"))
    for name, more in (("a", ()), ("b", ("--teacher", "online"))):
        ran = fx.good(fx.train("maskalign", tmp_path / name, *given, *more))
        assert "codec" not in ran.err
    # half precision is all that lies between them
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "b"), rtol=1e-3)


def test_a_recipe_that_reads_no_features_is_told_nothing(tmp_path: Path) -> None:
    given = ("--images", fx.pictures(), *STEPS, "--cache", cache_path("t3"))
    ran = fx.good(fx.train("mae", tmp_path / "run", *given))
    assert "codec" not in ran.err


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("recipe", "layout", "sets"),
    [
        ("maskalign", "raster", ()),
        ("mralign", "ranked", ("mask=stored",)),
        ("maskalign", "ranked", ("mask=uniform",)),
        ("maskalign", "kept", ("mask=stored",)),
        ("fd", "raster", ()),
    ],
)
def test_what_is_absent_is_computed_as_it_was_stored(
    recipe: str, layout: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    whole = cache_path("t3", layout)
    part = Path(shutil.copytree(whole, tmp_path / "part"))
    shutil.rmtree(part / "shards/000001.zarr")
    given = ("--images", fx.pictures(), *STEPS)
    fallback = ("--fallback", "online", "--fallback-limit", "0.25")
    fx.good(fx.train(recipe, tmp_path / "a", "--cache", whole, *given, sets=sets))
    ran = fx.good(fx.train(recipe, tmp_path / "b", "--cache", part, *given, *fallback, sets=sets))
    assert "the teacher computes the targets of 5 of 24 pictures" in ran.err
    assert "in codec t3" in ran.err
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_memory_the_same_losses(layout: str, tmp_path: Path) -> None:
    sets = () if layout == "raster" else ("mask=stored",)
    given = ("--cache", cache_path("t4", layout), "--images", fx.pictures(), *STEPS)
    fx.good(fx.train("maskalign", tmp_path / "a", *given, sets=sets))
    fx.good(fx.train("maskalign", tmp_path / "b", *given, "--resident", sets=sets))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")


@pytest.mark.slow
def test_ranked_and_raster_caches_train_alike(tmp_path: Path) -> None:
    """The means are summed in another order of the tokens, and exact all the same."""
    given = ("--images", fx.pictures(), *STEPS)
    for layout in ("raster", "ranked"):
        fx.good(
            fx.train("maskalign", tmp_path / layout, "--cache", cache_path("q8", layout), *given)
        )
    assert fx.losses(tmp_path / "raster") == fx.losses(tmp_path / "ranked")


# --- two teachers ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("own", "second"), [("t4", "q8"), ("fp16", "t3"), ("t3", "fp16")])
def test_two_teachers_in_two_codecs(own: str, second: str, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_path(own), tmp_path / "cache"))
    add_other(cache, second)
    exact = Path(shutil.copytree(cache_path("fp16"), tmp_path / "exact"))
    add_other(exact, "fp16")
    spec = TargetSpec(
        teacher=WIDE,
        levels=(4,),
        fields=("features", f"{OTHER}/features"),
        patches=16,
        second=OTHER,
        second_level=3,
    )
    rows, views, found = np.arange(6), np.arange(6) % 3, {}
    for path in (cache, exact):
        with Cache(path) as opened:
            source = CachedTargets(opened, spec, np.arange(24))
            found[path] = source.to_device(source.fetch(rows, views), torch.device("cpu"))[0]
    for name, codec in (("features", own), ("second", second)):
        got, wanted = found[cache][name], found[exact][name]
        assert torch.equal(got, wanted) == (codec == "fp16"), name
        lost = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert lost.max() <= codecs.get_codec(codec).tolerance
    options = ("--cache", cache, "--images", fx.pictures(), *STEPS)
    sets = (f"joint={OTHER}",)
    ran = fx.good(fx.train("mrmae", tmp_path / "a", *options, sets=sets))
    assert "note: the cache keeps its levels in codec" in ran.err
    fx.good(fx.train("mrmae", tmp_path / "b", *options, "--resident", sets=sets))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")


# --- the search for a cache -----------------------------------------------------------------------

MASKALIGN = (f"teacher={WIDE}", "img_size=32", "patch_size=8")


@pytest.mark.slow
def test_a_lossy_cache_is_taken_where_it_is_named_and_never_found(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(cache_path("t3"), home / "small")
    given = ("--images", fx.pictures(), *STEPS)
    ran = fx.train("maskalign", tmp_path / "a", *given, sets=MASKALIGN, home=home)
    assert ran.status == 1
    assert f"{home / 'small'}: it serves in codec t3, which is lossy, and is not taken" in ran.line
    assert "--cache names it" in ran.line
    assert not (tmp_path / "a" / "checkpoints").exists()
    shutil.copytree(cache_path("fp16"), home / "whole")
    fx.good(fx.train("maskalign", tmp_path / "b", *given, sets=MASKALIGN, home=home))
    fx.good(fx.train("maskalign", tmp_path / "c", *given, "--cache", cache_path("fp16")))
    assert fx.losses(tmp_path / "b") == fx.losses(tmp_path / "c")
    ran = fx.good(fx.train("maskalign", tmp_path / "d", *given, "--cache", home / "small"))
    assert "in codec t3, which is lossy" in ran.err


@pytest.mark.slow
def test_a_second_teacher_that_is_lossy_is_not_found_either(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(cache_path("fp16"), home / "both")
    add_other(home / "both", "q8")
    given = ("--images", fx.pictures(), *STEPS)
    joint = (*MASKALIGN, f"joint={OTHER}")
    ran = fx.train("mrmae", tmp_path / "a", *given, sets=joint, home=home)
    assert ran.status == 1
    assert "it serves in codec q8, which is lossy" in ran.line
    # who does not read it finds the cache
    fx.good(fx.train("mrmae", tmp_path / "b", *given, sets=MASKALIGN, home=home))


def test_a_recipe_that_reads_no_features_finds_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(cache_path("t3"), home / "small")
    sets = (*MASKALIGN, "mask=attentive")
    given = ("--images", fx.pictures(), *STEPS)
    ran = fx.good(fx.train("mae", tmp_path / "a", *given, sets=sets, home=home))
    assert "lossy" not in ran.err


# --- a state that is lost -------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
def test_training_does_not_begin_without_the_state(online: bool, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_path("t4"), tmp_path / "cache"))
    (state,) = cache.glob("*.t4.safetensors")
    state.unlink()
    given = ("--images", fx.pictures(), *STEPS, *(("--teacher", "online") if online else ()))
    ran = fx.train("maskalign", tmp_path / "run", "--cache", cache, *given)
    assert ran.status == 1
    assert state.name in ran.line
    assert f"featcache repair {cache}" in ran.line


# --- the PyTorch dataset --------------------------------------------------------------------------


def batches(data: Dataset, **options: Any) -> list[dict[str, Any]]:
    return list(DataLoader(data, batch_size=6, **options))


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "workers",
    [
        {},
        {"num_workers": 2},
        pytest.param(
            {"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow
        ),
    ],
    ids=["here", "forked", "spawned"],
)
def test_the_dataset_decodes_in_workers_or_later(layout: str, workers: dict[str, Any]) -> None:
    path = cache_path("t3", layout)
    decoded = Dataset(fx.pictures(), path, levels=[4, 2], check_sample=False)
    stored = Dataset(fx.pictures(), path, levels=[4, 2], decode=False, check_sample=False)
    with Cache(path) as cache:
        views = rng.key_digests(f"p{i:02d}" for i in range(24))[:, 0] % 3  # of epoch 0
        whole = whole_features(cache, np.arange(24), views.astype(int), layout)[:, [2, 0]]
    for i, (batch, coded) in enumerate(
        zip(batches(decoded, **workers), batches(stored, **workers), strict=True)
    ):
        assert batch["features"].dtype == torch.float32
        np.testing.assert_array_equal(batch["row"], np.arange(6 * i, 6 * i + 6))
        np.testing.assert_array_equal(batch["features"], whole[6 * i : 6 * i + 6])
        assert coded["features"].dtype == torch.uint8
        assert coded["features"].shape[2:] == (7 if layout == "kept" else 17, 4 + 64 * 3 // 8)
        np.testing.assert_array_equal(stored.decode(coded)["features"], whole[6 * i : 6 * i + 6])


def test_the_dataset_gives_two_teachers(tmp_path: Path) -> None:
    cache = add_other(Path(shutil.copytree(cache_path("t4"), tmp_path / "c")), "q8")
    name = f"{OTHER}/features"
    with Cache(cache) as opened:
        expected = opened.derive("h", [5], 1, level=3, teacher=OTHER)
    data = Dataset(fx.pictures(), cache, fields=(name,), check_sample=False)
    for epoch in range(3):
        data.set_epoch(epoch)
        sample = data[5]
        if sample["view"] == 1:
            np.testing.assert_array_equal(sample[name], expected)
            return
    pytest.fail("the view was not shown")
