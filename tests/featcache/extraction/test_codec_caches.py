"""Caches in q8, t4 and t3: how they begin, whoever begins them; what they decode to; what is added
to them; and what is told of a state that is not the one."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from featcache import Cache, teachers
from featcache.errors import IdentityError, UserError
from featcache.extraction import extract
from featcache.extraction.extract import ExtractJob
from featcache.maintenance import recompute, repair, transfer, verify
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.storage import json_file, manifest
from tests import codec_caches as cc
from tests.codec_caches import LAYOUTS, LOSSY, OTHER, VIT, WIDE
from tests.conftest import Ran, Running, copy_tree, files_below, flip, make_photos, python, waves
from tests.featcache.extraction.test_launcher import DYING, FAST, KILLED, SLOW, wait_for

Start = Callable[..., Running]
Command = Callable[..., Ran]
COPY = "shards/state.copy.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven photos in three shards; of thirteen files the first, and one in their midst, cannot be
    used."""
    root = make_photos(tmp_path_factory.mktemp("codecs") / "pictures")
    (root / "a.png").write_text("not a picture")
    (root / "half.jpg").write_bytes((root / "photo1.jpg").read_bytes()[:500])
    return root


def never(about: dict[str, Any]) -> Any:
    pytest.fail("neither pictures nor teacher are needed")


def load_of(folder: Path) -> repair.Load:
    def load(about: dict[str, Any]) -> tuple[Source, Any]:
        name, weights = about["identity"]["teacher"]["name"], about["provenance"]["weights"]
        return open_source(folder), teachers.load(name, weights)

    return load


# ---------------------------------------------------------------- the state's mean


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("layout", "views"),
    [
        *((layout, 3) for layout in LAYOUTS),
        ("raster", 25),
        *(pytest.param(layout, 25, marks=pytest.mark.slow) for layout in ("ranked", "kept")),
    ],
)
def test_the_mean_is_that_of_the_first_256_views_as_fp16_stores_them(
    pictures: Path, tmp_path: Path, layout: str, views: int
) -> None:
    options = {"views": views, **LAYOUTS[layout]}
    fp16 = cc.made(pictures, **options)
    expected = cc.mean_of(fp16)
    if views == 25:
        assert not np.array_equal(expected, cc.mean_of(fp16, views=275))
    found = cc.state(cc.made(pictures, codec="q8", **options))
    np.testing.assert_array_equal(found["mean"], expected)
    assert found["levels"].tolist() == [2, 5]


@pytest.mark.slow
def test_the_mean_of_a_network(pictures: Path) -> None:
    """In the batches that the cache is made in: a network gives other bits in others."""
    fp16 = cc.made(pictures, teacher=VIT)
    found = cc.state(cc.made(pictures, teacher=VIT, codec="t4"))
    np.testing.assert_array_equal(found["mean"], cc.mean_of(fp16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "workers", "shares", "store"),
    [
        (1, 1, 1, "zarr"),
        (7, 3, 1, "zarr"),
        (64, 1, 1, "webdataset"),
        (4, 2, 3, "zarr"),
        (4, 2, 3, "webdataset"),
    ],
)
def test_the_same_bytes_whatever_the_batch_and_whoever_begins(
    pictures: Path, tmp_path: Path, batch_size: int, workers: int, shares: int, store: str
) -> None:
    """The second share of three begins the cache, of which the first pictures are not."""
    wanted = cc.plan(pictures, codec="t3", store=store)
    for i in sorted(range(shares), key=lambda i: i != 1):
        extract.run(
            wanted, tmp_path / "c", batch_size=batch_size, workers=workers, share=(i, shares)
        )
    here = files_below(tmp_path / "c")
    there = files_below(cc.made(pictures, codec="t3", store=store))
    assert here.keys() == there.keys()
    differing = {name for name in here if here[name] != there[name]}
    # which note the batch size
    noting = {"manifest.json", "shards/manifest.copy.json"} if batch_size != 4 else set()
    assert differing == noting


@pytest.mark.slow
def test_teachers_of_one_pass_get_what_they_get_alone(pictures: Path, tmp_path: Path) -> None:
    """Two teachers with two codecs, decoded together."""
    jobs = [
        ExtractJob(cc.plan(pictures, codec="t3"), tmp_path / "a"),
        ExtractJob(cc.plan(pictures, OTHER, codec="q8"), tmp_path / "b"),
    ]
    extract.run_jobs(jobs, batch_size=4)
    assert files_below(tmp_path / "a") == files_below(cc.made(pictures, codec="t3"))
    assert files_below(tmp_path / "b") == files_below(cc.made(pictures, teacher=OTHER, codec="q8"))


def test_two_teachers_of_one_command(
    featcache_command: Command, pictures: Path, tmp_path: Path
) -> None:
    """As one after the other: the cache is begun before what is added to it."""
    words = ("--images", pictures, "--size", 28, "--levels", "last:1", "--codec", "t3")
    both = ("--teacher", WIDE, "--teacher", OTHER)
    ran = featcache_command("extract", *both, *words, "--out", tmp_path / "both")
    assert ran.status == 0, ran.err
    for teacher, more in ((WIDE, ()), (OTHER, ("--add",))):
        given = ("--teacher", teacher, *words, "--out", tmp_path / "one", *more)
        ran = featcache_command("extract", *given)
        assert ran.status == 0, ran.err
    assert files_below(tmp_path / "both") == files_below(tmp_path / "one")


def test_a_picture_is_decoded_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.views import pixel_path

    original, calls = pixel_path.decode, []
    monkeypatch.setattr(pixel_path, "decode", lambda data: (calls.append(1), original(data))[1])
    cc.extracted(pictures, tmp_path / "c", codec="q8")
    assert len(calls) == 11 + 2 * 2  # those that cannot be used are tried again


def test_no_picture_to_begin_with(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / f"pictures/{i}.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"^none of 3 pictures can be used.*--images") as caught:
        cc.extracted(tmp_path / "pictures", tmp_path / "c", codec="t4")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- several processes, and deaths


@pytest.mark.slow
def test_three_processes_at_once_give_the_same_bytes(
    pictures: Path, tmp_path: Path, start: Start
) -> None:
    words = ("--teacher", WIDE, "--size", 28, "--views", 3, "--levels", "2,5", "--codec", "t3")
    words += ("--rows-per-shard", 5, "--batch-size", 4, "--workers", 2, "--images", pictures)
    running = [
        start("extract", *words, "--out", tmp_path / "c", before=f"{SLOW}\n{FAST}")
        for _ in range(3)
    ]
    assert [each.wait() for each in running] == [0, 0, 0], [each.said for each in running]
    assert files_below(tmp_path / "c") == files_below(cc.made(pictures, codec="t3"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_by_hand_before_the_state_is_there(
    pictures: Path, tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    words = ("--teacher", WIDE, "--size", 28, "--views", 3, "--levels", "2,5", "--codec", "t3")
    words += ("--rows-per-shard", 5, "--batch-size", 4, "--workers", 2, "--images", pictures)
    slow = SLOW.replace("0.08", "0.5")
    running = start("extract", *words, "--out", tmp_path / "c", before=f"{slow}\n{SAYING}")
    wait_for(lambda: "third picture" in running.said)
    running.signal(number)
    assert running.wait(30) == 75
    note, line = (each for each in running.said.splitlines() if each != "third picture")
    assert note == "note: codec t3 first looks at up to 256 views"
    assert line.startswith("stopped")
    assert not (tmp_path / "c").exists()
    cc.extracted(pictures, tmp_path / "c", codec="t3")
    assert files_below(tmp_path / "c") == files_below(cc.made(pictures, codec="t3"))


SAYING = """
import itertools
import featcache.views.pixel_path as i
saying, count = i.decode, itertools.count()
i.decode = lambda data: (next(count) == 2 and print("third picture", flush=True), saying(data))[1]
"""


def test_a_full_disk_as_the_state_is_written(
    featcache_command: Command, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    options = ("--teacher", WIDE, "--images", pictures, "--size", 28, "--out", tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(json_file, "_sync", full)
        ran = featcache_command("extract", *options, "--codec", "t3")
    assert ran.status == 1
    assert "No space left on device" in ran.error
    assert [path for path in (tmp_path / "c").rglob("*") if path.is_file()] == []
    assert featcache_command("extract", *options, "--codec", "t3").status == 0


# the function that the killed process enters for the n-th time, and dies in
STAGES = {
    "while pictures are looked at": ("views.pixel_path:decode", 3),
    "before the state is linked": ("storage.json_file:link_or_create", 1),
    "after the state is linked": ("storage.json_file:sync_folder", 1),
    "while it is measured": ("targets.distortion:compare", 1),
    "between state and manifest": ("extraction.target_folder:begin_folder", 1),
    "before the tail": ("storage.json_file:write_file", 3),
    "before the copy of the state": ("storage.json_file:write_file", 4),
    "after the first record": ("storage.commit:publish", 2),
}


@pytest.fixture(scope="module")
def killed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    options = json.dumps({"codec": "t3"})
    ran = python(DYING + KILLED, pictures, root, WIDE, json.dumps(STAGES), options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{stage} 9" for stage in STAGES], ran.stdout + ran.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_run_again_gives_the_same_bytes(
    pictures: Path, killed: Path, stage: str
) -> None:
    whole = files_below(cc.made(pictures, codec="t3", levels=[1, 5]))
    before = files_below(killed / stage) if (killed / stage).exists() else {}
    assert before != whole
    cc.extracted(pictures, killed / stage, codec="t3", levels=(1, 5))
    assert files_below(killed / stage) == whole


@pytest.mark.slow
@pytest.mark.parametrize("other", ["another cache", "damaged", "empty", "a folder"])
def test_a_state_that_is_not_this_caches_is_refused(
    pictures: Path, tmp_path: Path, other: str
) -> None:
    """In a folder that holds nothing else."""
    there = cc.state_path(cc.made(pictures, codec="t4", views=2))
    path = tmp_path / "c" / there.name
    path.parent.mkdir()
    shutil.copy(there, path)
    if other == "damaged":
        flip(path, 3)
    elif other == "empty":
        path.write_bytes(b"")
    elif other == "a folder":
        path.unlink()
        path.mkdir()
    before = files_below(tmp_path / "c")
    with pytest.raises(UserError, match=r"no state of the cache that is to be made") as caught:
        cc.extracted(pictures, tmp_path / "c", codec="t4")
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path / "c") == before


def test_a_state_of_another_codec_is_no_empty_folder(pictures: Path, tmp_path: Path) -> None:
    there = cc.state_path(cc.made(pictures, codec="q8"))
    (tmp_path / "c").mkdir()
    shutil.copy(there, tmp_path / "c")
    for codec in ("t4", "fp16"):
        with pytest.raises(UserError, match="exists and is no cache"):
            cc.extracted(pictures, tmp_path / "c", codec=codec)


# ---------------------------------------------------------------- what is read


FORMS = [
    pytest.param(codec, form, marks=() if form == "zarr" or codec == "t3" else pytest.mark.slow)
    for codec in LOSSY
    for form in ("zarr", "webdataset", "format 3")
]


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "form"), FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_come_back_within_the_codecs_error(
    pictures: Path, codec: str, layout: str, form: str
) -> None:
    options = {"format": 3} if form == "format 3" else {"store": form}
    cache = cc.made(pictures, codec=codec, **LAYOUTS[layout], **options)
    exact = cc.by_zarr(cc.made(pictures, **LAYOUTS[layout]), "features")
    mean = cc.mean_of(cc.made(pictures, **LAYOUTS[layout]))
    bits = {"q8": 8, "t4": 4, "t3": 3}[codec]
    with Cache(cache) as opened:
        assert opened.arrays["features"].item == (2, exact.shape[3], 4 + 64 * bits // 8)
        for view in range(3):
            for i, level in enumerate((2, 5)):
                got = opened.derive("h", view=view, level=level)
                cc.assert_near(got, exact[:, view, i], codec, mean[i])
                few = opened.derive("h", [7, 3], view, level=level, tokens=4)
                np.testing.assert_array_equal(few, got[[7, 3], :4])
    assert verify.verify_cache(cache)[0] == []


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_coded_is_as_in_fp16(pictures: Path, codec: str) -> None:
    """Statistics, attention, crops and hashes of pixels."""
    with Cache(cc.made(pictures)) as exact, Cache(cc.made(pictures, codec=codec)) as cache:
        names = [name for name in exact.fields if name != "features"]
        here, there = (each.read(range(11), 2, names) for each in (cache, exact))
        for name in names:
            np.testing.assert_array_equal(here[name], there[name], err_msg=name)


# ---------------------------------------------------------------- additions


@pytest.mark.slow
def test_added_views_have_the_means_that_are_there(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t4", views=2), tmp_path / "c")
    before = files_below(out)
    part = cc.add(pictures, out, codec="t4", views=4)
    assert {name: data for name, data in files_below(out).items() if name in before} == before
    here, there = cc.state(out), cc.state(part)
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])
    exact = cc.by_zarr(cc.made(pictures, views=4), "features")
    mean = cc.mean_of(cc.made(pictures, views=2))
    for view in range(4):
        cc.assert_near(cc.levels_of(out, 5, view), exact[:, view, 1], "t4", mean[1])
    assert verify.verify_cache(out)[0] == []


@pytest.mark.slow
def test_added_levels_get_means_of_their_own(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    part = cc.add(pictures, out, codec="t3", levels=(1, 2, 4, 5))
    assert cc.state(part)["levels"].tolist() == [1, 4]
    every = cc.made(pictures, levels=[1, 2, 4, 5])
    np.testing.assert_array_equal(cc.state(part)["mean"], cc.mean_of(every)[[0, 2]])
    assert_reads(out, every, "t3", (1, 2, 4, 5))
    views = cc.add(pictures, out, codec="t3", levels=(1, 2, 4, 5), views=4)
    np.testing.assert_array_equal(cc.state(views)["mean"], cc.mean_of(every))
    more = cc.made(pictures, levels=[1, 2, 4, 5], views=4)
    assert_reads(out, more, "t3", (1, 2, 4, 5), mean=cc.mean_of(every))


def assert_reads(
    out: Path, exact: Path, codec: str, levels: tuple[int, ...], mean: np.ndarray | None = None
) -> None:
    """Every view and level decodes to what an fp16 cache has, whichever part it lies in; all levels
    of several views at once too."""
    from featcache.reading.feature_reader import FeatureReader
    from featcache.reading.tensors import to_tensor

    values = cc.by_zarr(exact, "features")
    mean = cc.mean_of(exact) if mean is None else mean
    rows, view = np.arange(11), np.arange(11) % values.shape[1]
    with Cache(out) as cache:
        assert (cache.levels, cache.views) == (levels, values.shape[1])
        for chosen in (levels, levels[::-1], levels[1:2]):
            reader = FeatureReader(cache, levels=chosen)
            arrays = cache.read(rows, view, reader.fields, chosen)
            h = reader.features({name: to_tensor(each) for name, each in arrays.items()}).numpy()
            for k, level in enumerate(chosen):
                i = levels.index(level)
                cc.assert_near(h[:, k], values[rows, view, i], codec, mean[i])


@pytest.mark.slow
def test_other_pictures_make_no_state_of_what_is_added(pictures: Path, tmp_path: Path) -> None:
    """They are refused before anything is written; with the pictures of the rows all is as ever."""
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    before = files_below(out)
    other = copy_tree(pictures, tmp_path / "other")
    Image.fromarray(255 - waves(50, 60, 3.0)).save(other / "rgb.png")
    for teacher, levels in ((WIDE, (1, 2, 5)), (OTHER, (3,))):
        with pytest.raises(IdentityError, match="likely another picture under this key"):
            cc.add(other, out, teacher, codec="t3", levels=levels)
        assert files_below(out) == before
    cc.add(pictures, out, codec="t3", levels=(1, 2, 5))
    expected = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "expected")
    cc.add(pictures, expected, codec="t3", levels=(1, 2, 5))
    assert files_below(out) == files_below(expected)


@pytest.mark.slow
def test_the_means_of_what_is_added_are_of_the_rows_that_are_there(
    pictures: Path, tmp_path: Path
) -> None:
    """A picture that can be used now, and has no row, is not among them; one that has a row and is
    gone is told before anything is written."""
    folder = copy_tree(pictures, tmp_path / "pictures")
    out = cc.extracted(folder, tmp_path / "c", codec="q8")
    before = files_below(out)
    shutil.copy(folder / "rgb.png", folder / "a.png")
    good = (folder / "grey.png").read_bytes()
    (folder / "grey.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"'grey' has a row in .* and cannot be used now"):
        cc.add(folder, out, codec="q8", levels=(1, 2, 5))
    assert files_below(out) == before
    (folder / "grey.png").write_bytes(good)
    part = cc.add(folder, out, codec="q8", levels=(1, 2, 5))
    every = cc.made(pictures, levels=[1, 2, 5])
    np.testing.assert_array_equal(cc.state(part)["mean"], cc.mean_of(every)[:1])


@pytest.mark.slow
def test_an_added_teacher_has_a_codec_and_a_state_of_its_own(
    pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    part = cc.add(pictures, out, OTHER, codec="q8")
    exact = cc.made(pictures, teacher=OTHER)
    np.testing.assert_array_equal(cc.state(part)["mean"], cc.mean_of(exact))
    got = cc.levels_of(out, 3, 1, teacher=OTHER)
    cc.assert_near(got, cc.by_zarr(exact, "features")[:, 1, 0], "q8", cc.mean_of(exact)[0])
    plain = copy_tree(cc.made(pictures), tmp_path / "plain")
    cc.add(pictures, plain, OTHER, codec="q8")
    np.testing.assert_array_equal(cc.levels_of(plain, 3, 1, teacher=OTHER), got)
    assert verify.verify_cache(out)[0] == verify.verify_cache(plain)[0] == []


def test_what_is_added_has_the_codec_that_is_there(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    with pytest.raises(UserError, match=r"identity\.codec is 't4', the cache has 't3'"):
        cc.add(pictures, out, codec="t4", views=4)
    assert files_below(out) == files_below(cc.made(pictures, codec="t3"))


def test_an_addition_after_the_state_is_lost_is_one_line(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    cc.state_path(out).unlink()
    before = files_below(out)
    with pytest.raises(UserError, match=r"t3\.safetensors: missing.*featcache repair") as caught:
        cc.add(pictures, out, codec="t3", views=4)
    assert "\n" not in str(caught.value)
    assert files_below(out) == before


def test_parts_of_two_states_are_one_line(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t4", views=2), tmp_path / "c")
    part = cc.add(pictures, out, codec="t4", views=4)
    change(part, mean=cc.state(part)["mean"] + np.float32(0.5))
    cc.correct_state(part)
    for read in (
        lambda: cc.levels_of(out, 5, 0),
        lambda: cc.add(pictures, out, codec="t4", views=5),
        lambda: transfer.copy(out, tmp_path / "flat", views=3),
    ):
        with pytest.raises(UserError, match="two of its parts were encoded with") as caught:
            read()
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a state that is not the one


def change(part: Path, **values: np.ndarray) -> None:
    """Write some tensors of a state anew, under the name of the same cache."""
    about = manifest.read(part)
    save_file({**cc.state(part), **values}, cc.state_path(part), {"cache": about["id"]})


def swapped(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values[..., ::-1])


def twice_the_first(order: np.ndarray) -> np.ndarray:
    order = order.copy()
    order[:, 1] = order[:, 0]
    return order


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shape": (lambda s: {"mean": s["mean"][:1].copy()}, "'mean' is torch.float32"),
    "width": (lambda s: {"mean": s["mean"][:, :32].copy()}, "'mean' is torch.float32"),
    "dtype": (lambda s: {"mean": s["mean"].astype("f2")}, "'mean' is torch.float16"),
    "nan": (
        lambda s: {"mean": s["mean"] * np.float32("nan")},
        "'mean' is not",
    ),
    "table": (lambda s: {"table": swapped(s["table"])}, "'table' is not the codec's"),
    "signs": (lambda s: {"signs": s["signs"] * 0}, "'signs' are not 1 and -1"),
    "order": (lambda s: {"order": twice_the_first(s["order"])}, "'order' is no permutation"),
    "order too large": (lambda s: {"order": s["order"] + 7}, "'order' is no permutation"),
    "one more": (lambda s: {"scale": s["mean"]}, "it holds"),
    "levels": (lambda s: {"levels": s["levels"] + 1}, "says nothing of level 2"),
    "levels of floats": (lambda s: {"levels": s["levels"] + 0.5}, "'levels' is no list of levels"),
    "no levels": (lambda s: {"levels": s["levels"][:0].copy()}, "'levels' is no list of levels"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_state_under_a_good_checksum_is_one_line(
    pictures: Path, tmp_path: Path, what: str
) -> None:
    """Its numbers become places in memory: nothing decodes."""
    out = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "c")
    values, expected = WRONG[what]
    change(out, **values(cc.state(out)))
    cc.correct_state(out)
    with pytest.raises(UserError) as caught:
        cc.levels_of(out, 5, 0)
    assert expected in str(caught.value)
    assert str(cc.state_path(out)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_safetensors_under_a_good_checksum_is_one_line(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "c")
    for data in (b"", b"x", b"\xff" * 8, (10**15).to_bytes(8, "little") + b"{}"):
        cc.state_path(out).write_bytes(data)
        cc.correct_state(out)
        (out / "shards/000001.json").unlink(missing_ok=True)  # one that lacks
        for use in (
            lambda: cc.levels_of(out, 5, 0),
            lambda: cc.extracted(pictures, out, codec="t4"),
        ):
            with pytest.raises(
                UserError, match=r"cannot be read as safetensors|is empty"
            ) as caught:
                use()
            assert "\n" not in str(caught.value)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "checksum differs": lambda path: flip(path, -1),
    "bytes,": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    " bytes, ": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "0 bytes": lambda path: path.write_bytes(b""),
}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("codec", ["q8", "t3"])
def test_a_damaged_state_is_told_and_restored_from_its_copy(
    featcache_command: Command, pictures: Path, tmp_path: Path, codec: str, damage: str
) -> None:
    out = copy_tree(cc.made(pictures, codec=codec), tmp_path / "c")
    whole, path = files_below(out), cc.state_path(out)
    DAMAGE[damage](path)
    with pytest.raises(UserError) as caught:
        cc.levels_of(out, 5, 0)
    for part in (str(path), damage.strip(), f"featcache repair {out}"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    (problem,) = verify.verify_cache(out)[0]
    assert str(path) in problem
    ran = featcache_command("verify", out)
    assert ran.status == 1
    assert path.name in ran.err
    assert repair.run(out, never)["restored"][0] == str(path)
    assert files_below(out) == whole


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_is_restored_from_the_state(
    pictures: Path, tmp_path: Path, damage: str
) -> None:
    out = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "c")
    whole = files_below(out)
    DAMAGE[damage](out / COPY)
    cc.levels_of(out, 5, 0)  # it is not needed
    (problem,) = verify.verify_cache(out)[0]
    assert str(out / COPY) in problem
    assert repair.run(out, never)["restored"] == [str(out / COPY)]
    assert files_below(out) == whole


def test_state_and_copy_lost_is_one_line(
    featcache_command: Command, pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "c")
    cc.state_path(out).unlink()
    flip(out / COPY, 99)
    ran = featcache_command("repair", out, "--images", pictures)
    assert ran.status == 1
    assert "are both missing or damaged, and without them nothing decodes" in ran.error


def test_a_state_that_the_manifest_does_not_list_is_one_line(
    pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "c")
    about = manifest.read(out)
    del about["files"][cc.state_path(out).name]
    cc.rewrite_manifest(out, about)
    with pytest.raises(UserError, match=r"lists no file of its state|state") as caught:
        cc.levels_of(out, 5, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_damaged_shard_is_extracted_again_with_the_same_state(
    pictures: Path, tmp_path: Path
) -> None:
    out = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "c")
    part = cc.add(pictures, out, codec="t3", views=4)
    whole = files_below(out)
    for damaged in (out, part):
        flip(next((damaged / "shards/000001.zarr/features").glob("c*")), 40)
    assert len(verify.verify_cache(out)[0]) == 2
    repair.run(out, load_of(pictures))
    assert files_below(out) == whole


# ---------------------------------------------------------------- the teacher is asked


def ask(cache: Path, pictures: Path) -> dict[str, Any]:
    with Cache(cache) as opened:
        return recompute.recompute(opened, open_source(pictures), None, 100, 0, "cpu")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_rows_are_within_what_the_codec_loses(
    pictures: Path, codec: str, layout: str
) -> None:
    found = ask(cc.made(pictures, codec=codec, **LAYOUTS[layout]), pictures)
    assert (found["rows"], found["problems"]) == (11, [])
    assert found["feature_error"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("codec", LOSSY)
def test_recomputed_rows_of_a_network_in_another_batch(pictures: Path, codec: str) -> None:
    found = ask(cc.made(pictures, teacher=VIT, codec=codec), pictures)
    assert (found["rows"], found["problems"]) == (11, [])


@pytest.mark.parametrize("codec", LOSSY)
def test_rows_of_another_picture_are_found(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Features of two pictures are exchanged as they are read, past every checksum."""
    original = Cache.read

    def exchanged(self: Cache, rows: Any, view: Any, fields: Any, *rest: Any, **more: Any) -> Any:
        found = original(self, rows, view, fields, *rest, **more)
        if "features" in fields and list(rows) in ([3], [4]):
            other = original(self, [7 - rows[0]], view, ("features",), *rest, **more)
            found = {**found, "features": other["features"]}
        return found

    monkeypatch.setattr(Cache, "read", exchanged)
    cache = cc.made(pictures, codec=codec)
    found = ask(cache, pictures)
    with Cache(cache) as opened:
        keys = [opened.keys[3], opened.keys[4]]
    assert len(found["problems"]) == 2
    for key, problem in zip(keys, found["problems"], strict=True):
        assert repr(key) in problem
        assert "features differ by" in problem


# ---------------------------------------------------------------- copies


def decoded(cache: Path, levels: tuple[int, ...], views: int) -> np.ndarray:
    with Cache(cache) as opened:
        assert (opened.levels, opened.views) == (levels, views)
        return np.stack(
            [
                [opened.derive("h", view=view, level=level) for level in levels]
                for view in range(views)
            ]
        )  # (V, L, n, T, D)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["raster", "kept"])
def test_copies_decode_as_before(pictures: Path, tmp_path: Path, layout: str) -> None:
    origin = cc.made(pictures, codec="t4", **LAYOUTS[layout])
    whole = decoded(origin, (2, 5), 3)
    transfer.copy(origin, tmp_path / "whole")
    assert files_below(tmp_path / "whole") == files_below(origin)
    transfer.copy(origin, tmp_path / "levels", levels=(5,))
    np.testing.assert_array_equal(decoded(tmp_path / "levels", (5,), 3), whole[:, 1:])
    transfer.copy(origin, tmp_path / "views", views=2)
    np.testing.assert_array_equal(decoded(tmp_path / "views", (2, 5), 2), whole[:2])
    transfer.copy(origin, tmp_path / "shards", shards=(1, 3))
    with Cache(origin) as here, Cache(tmp_path / "shards") as there:
        rows = here.keys.find(list(there.keys))
    np.testing.assert_array_equal(decoded(tmp_path / "shards", (2, 5), 3), whole[:, :, rows])
    transfer.convert(origin, tmp_path / "tars", store="webdataset")
    np.testing.assert_array_equal(decoded(tmp_path / "tars", (2, 5), 3), whole)
    transfer.convert(tmp_path / "tars", tmp_path / "back", store="zarr")
    assert files_below(tmp_path / "back") == files_below(origin)
    transfer.copy(origin, tmp_path / "archive", compress=True)
    np.testing.assert_array_equal(decoded(tmp_path / "archive", (2, 5), 3), whole)
    for name in ("whole", "levels", "views", "shards", "tars", "archive"):
        assert verify.verify_cache(tmp_path / name)[0] == []


@pytest.mark.slow
def test_a_flat_copy_of_added_levels_and_views(pictures: Path, tmp_path: Path) -> None:
    out = copy_tree(cc.made(pictures, codec="t3", views=2), tmp_path / "c")
    cc.add(pictures, out, codec="t3", views=2, levels=(1, 2, 5))
    cc.add(pictures, out, codec="t3", views=4, levels=(1, 2, 5))
    whole = decoded(out, (1, 2, 5), 4)
    for name, levels, views in (("all", (1, 2, 5), 4), ("added", (1,), 4), ("two", (1, 5), 2)):
        transfer.copy(out, tmp_path / name, levels=levels, views=views)
        at = [(1, 2, 5).index(level) for level in levels]
        np.testing.assert_array_equal(decoded(tmp_path / name, levels, views), whole[:views, at])
        assert verify.verify_cache(tmp_path / name)[0] == []
        assert not (tmp_path / name / "parts").exists()
    transfer.copy(out, tmp_path / "again", levels=(1, 5), views=2)
    assert files_below(tmp_path / "again") == files_below(tmp_path / "two")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("damaged", ["state", "copy", "shard"])
def test_a_copy_is_repaired(pictures: Path, tmp_path: Path, damaged: str) -> None:
    """Of fewer views, whose shards come from the pictures."""
    transfer.copy(cc.made(pictures, codec="q8"), tmp_path / "c", views=2, levels=(5,))
    whole = files_below(tmp_path / "c")
    path = {
        "state": cc.state_path(tmp_path / "c"),
        "copy": tmp_path / "c" / COPY,
        "shard": next((tmp_path / "c/shards/000001.zarr/features").glob("c*")),
    }[damaged]
    flip(path, 40)
    assert any(path.name in text for text in verify.verify_cache(tmp_path / "c")[0])
    repair.run(tmp_path / "c", load_of(pictures))
    assert files_below(tmp_path / "c") == whole


def test_a_copy_of_a_cache_whose_state_is_damaged_is_one_line(
    pictures: Path, tmp_path: Path
) -> None:
    origin = copy_tree(cc.made(pictures, codec="t4"), tmp_path / "origin")
    flip(cc.state_path(origin), -1)
    for choice in ({}, {"views": 2}, {"levels": (5,)}):
        with pytest.raises(UserError, match=r"checksum differs.*repair") as caught:
            transfer.copy(origin, tmp_path / "c", **choice)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- the command's words


@pytest.mark.parametrize(
    ("word", "near"),
    [("t5", "t4"), ("T4", "t4"), ("q4", "q8"), ("fp32", "fp16"), ("f16", "fp16"), ("", "fp16")],
)
def test_an_unknown_codec_names_those_there_are(
    featcache_command: Command, pictures: Path, tmp_path: Path, word: str, near: str
) -> None:
    options = ("--teacher", WIDE, "--images", pictures, "--size", 28, "--out", tmp_path / "c")
    ran = featcache_command("extract", *options, "--codec", word)
    assert ran.status == 2
    assert near in ran.error
    assert repr(word) in ran.error
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("codec", LOSSY)
def test_a_width_that_no_rotation_takes(
    featcache_command: Command, pictures: Path, tmp_path: Path, codec: str
) -> None:
    teacher = "synthetic:levels=3,tokens=4,width=96,size=28"
    options = ("--teacher", teacher, "--images", pictures, "--size", 28, "--out", tmp_path / "c")
    ran = featcache_command("extract", *options, "--levels", 1, "--codec", codec)
    assert ran.status == 1
    assert "needs a width that 64 divides, the teacher has 96" in ran.error
    assert "--codec fp16" in ran.error
    assert not (tmp_path / "c").exists()


def test_the_command_tells_what_is_lost(
    featcache_command: Command, pictures: Path, tmp_path: Path
) -> None:
    options = ("--teacher", WIDE, "--images", pictures, "--size", 28, "--levels", "2,5")
    ran = featcache_command("extract", *options, "--codec", "t3", "--out", tmp_path / "c")
    assert ran.status == 0, ran.err
    facts = manifest.read(tmp_path / "c")["provenance"]["distortion"]
    # of the first 11 views, as numpy measures it
    exact = cc.by_zarr(cc.made(pictures, views=1), "features").astype(np.float64)[:, 0]
    mean = cc.mean_of(cc.made(pictures, views=1)).astype(np.float64)
    got = np.stack([cc.levels_of(tmp_path / "c", level, 0) for level in (2, 5)], 1)
    lost = np.square(got - exact).sum(-1)
    size = np.square(exact - mean[:, None]).sum(-1)
    assert facts["views"] == 11
    assert facts["mse"] == pytest.approx(lost.sum((0, 2)) / size.sum((0, 2)), rel=1e-3)
    assert facts["worst"] == pytest.approx((lost / size).max((0, 2)), rel=1e-3)
    cosine = (got * exact).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert facts["cosine"] == pytest.approx(cosine.mean((0, 2)), rel=1e-3)
    told = featcache_command("info", tmp_path / "c")
    assert told.status == 0
    assert "codec t3" in told.out


def test_no_measure_of_a_codec_that_loses_nothing(pictures: Path) -> None:
    assert "distortion" not in manifest.read(cc.made(pictures))["provenance"]
    assert not list(cc.made(pictures).glob("*.fp16.safetensors"))


# ---------------------------------------------------------------- not finite


class Broken:
    """The synthetic teacher, but for one number of one view, counted from the first."""

    def __init__(self, value: float, number: int) -> None:
        self.inner, self.value, self.number, self.seen = teachers.load(WIDE), value, number, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Any, levels: Any) -> Any:
        ys, attention = self.inner(images, levels)
        if self.seen <= self.number < self.seen + len(images):
            ys[list(levels).index(5)][self.number - self.seen, 3, 7] = self.value
        self.seen += len(images)
        return ys, attention


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_by_key_view_and_level(
    pictures: Path, tmp_path: Path, value: float
) -> None:
    """In the sample, before anything is written. Views 0 to 2 of picture 0, ...: the eighth is
    picture 2's second."""
    made = cc.plan(pictures, codec="t4")
    made = type(made)(**{**vars_of(made), "teacher": Broken(value, 7)})
    with pytest.raises(UserError) as caught:
        extract.run(made, tmp_path / "c", batch_size=4)
    with Cache(cc.made(pictures)) as cache:
        key = cache.keys[2]
    for part in ("non-finite", repr(key), "view 1", "level 5"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_what_is_not_finite_after_the_sample(pictures: Path, tmp_path: Path) -> None:
    """The state is there already, and stays for the next attempt: the 270th view of 275."""
    views = 25
    made = cc.plan(pictures, codec="q8", views=views)
    # 256 views in batches of 4 of shards whose last batch is short, then the cache's own batches
    broken = Broken(float("nan"), -1)
    made = type(made)(**{**vars_of(made), "teacher": broken})
    with pytest.MonkeyPatch.context() as patch:
        from featcache.extraction import codec_sample

        original = codec_sample.begin_codec

        def begun(*args: Any) -> Any:
            try:
                return original(*args)
            finally:
                broken.seen, broken.number = 0, 5

        patch.setattr(codec_sample, "begin_codec", begun)
        with pytest.raises(UserError, match=r"non-finite.*view 5, level 5"):
            extract.run(made, tmp_path / "c", batch_size=4)
    cc.extracted(pictures, tmp_path / "c", codec="q8", views=views)
    here, there = (
        files_below(path) for path in (tmp_path / "c", cc.made(pictures, codec="q8", views=views))
    )
    assert here.keys() == there.keys()
    # a manifest notes what was measured of this teacher, which is no network
    assert {name for name in here if here[name] != there[name]} == {
        "manifest.json",
        "shards/manifest.copy.json",
    }


def vars_of(made: Any) -> dict[str, Any]:
    """The fields that a plan was made of."""
    import dataclasses

    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
