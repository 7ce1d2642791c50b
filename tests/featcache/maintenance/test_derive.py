"""Derived caches: of levels in fp16 they are what an extraction writes, byte for byte; interrupted
and run again; of what was added; what is refused; and repaired from their parent."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import Cache, teachers
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extend, extract
from featcache.maintenance import derive as deriving
from featcache.maintenance import repair, transfer, verify
from featcache.maintenance.derive_plan import Wish
from featcache.models.tokenizer import TokenizerTeacher
from featcache.pictures.open_source import open_source
from featcache.storage import manifest
from featcache.storage.store import record_path
from tests import codec_caches as cc
from tests.codec_caches import LAYOUTS, LOSSY, OTHER, WIDE
from tests.conftest import Ran, Running, copy_tree, files_below, flip, make_photos, python
from tests.featcache.extraction.test_launcher import DYING
from tests.featcache.models.test_tokenizer import Reds

Command = Callable[..., Ran]
Start = Callable[..., Running]
CODECS = ("fp16", *LOSSY)
LESS: dict[str, dict[str, Any]] = {
    "all": {},
    "levels": {"levels": (5,)},
    "views": {"views": 2},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven photos in three shards, and one picture in the first that cannot be used."""
    root = make_photos(tmp_path_factory.mktemp("derive") / "pictures")
    (root / "bad.png").write_text("not a picture")
    return root


def derive(origin: Path, out: Path, **wish: Any) -> list[str]:
    return deriving.derive(origin, out, Wish(**wish))


def wish_of(layout: str) -> dict[str, Any]:
    """The options of a layout, as the command has them."""
    return {name: str(value) for name, value in LAYOUTS[layout].items()}


def never(about: dict[str, Any]) -> Any:
    pytest.fail("neither pictures nor teacher are needed")


def shards_of(cache: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(the files of all shards, their records); without what names the cache or is counted before
    encoding."""
    files = {
        name: data for name, data in files_below(cache / "shards").items() if "manifest" not in name
    }
    records = {name for name in files if name.endswith(".json") and "zarr.json" not in name}
    found = {name: json.loads(files.pop(name)) for name in sorted(records)}
    for record in found.values():
        for name in ("checksum", "content"):
            record.pop(name, None)
    files.pop("state.copy.safetensors", None)  # it names the cache
    return files, found


def assert_as_extracted(derived: Path, direct: Path) -> None:
    """Every byte of every shard, every number of the state, the tail and the quarantine."""
    (here, records), (there, expected) = shards_of(derived), shards_of(direct)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    assert records.keys() == expected.keys()
    for name, record in records.items():
        stats, before = record.pop("statistics"), expected[name].pop("statistics")
        features = stats.pop("features")
        assert features == pytest.approx(before.pop("features"), rel=1e-3)
        assert (stats, record) == (before, expected[name])
    about, wanted = manifest.read(derived), manifest.read(direct)
    assert {**about["identity"], "parent": 0} == {**wanted["identity"], "parent": 0}
    for field in ("arrays", "shards", "format"):
        assert about[field] == wanted[field]
    assert about["files"].keys() == wanted["files"].keys()
    if wanted["identity"]["codec"] != "fp16":
        for name, values in cc.state(direct).items():
            np.testing.assert_array_equal(cc.state(derived)[name], values, err_msg=name)
    (tail,) = (n for n in wanted["files"] if wanted["identity"]["codec"] not in n.split("."))
    assert (derived / tail).read_bytes() == (direct / tail).read_bytes()
    for name in ("quarantine.json", "zarr.json"):
        path = direct / name
        assert path.exists() == (derived / name).exists()
        assert not path.exists() or path.read_bytes() == (derived / name).read_bytes()
    assert verify.verify_cache(derived)[0] == []


# ---------------------------------------------------------------- as an extraction writes it


FEW = {
    ("q8", "raster", "all"),
    ("t4", "kept", "views"),
    *(("t3", layout, "all") for layout in LAYOUTS),
    ("t3", "kept", "levels"),
    ("fp16", "ranked", "all"),
    ("fp16", "kept", "views"),
    ("fp16", "raster", "levels"),
}


def combinations() -> list[Any]:
    """All in both stores; by default those that differ most, and one of them in tars."""
    every = itertools.product(("zarr", "webdataset"), CODECS, LAYOUTS, LESS)
    found = []
    for store, *options in every:
        run = tuple(options) in FEW and (store == "zarr" or options[:2] == ["t4", "kept"])
        if options != ["fp16", "raster", "all"]:
            marks = () if run else pytest.mark.slow
            found.append(pytest.param(store, *options, marks=marks))
    return found


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("store", "codec", "layout", "less"), combinations())
def test_derived_is_what_an_extraction_writes(
    pictures: Path, tmp_path: Path, store: str, codec: str, layout: str, less: str
) -> None:
    origin = cc.made(pictures, store=store)
    wish = {**LESS[less], **wish_of(layout), **({} if codec == "fp16" else {"codec": codec})}
    assert derive(origin, tmp_path / "c", **wish) == []
    direct = cc.made(pictures, store=store, codec=codec, **LAYOUTS[layout], **LESS[less])
    assert_as_extracted(tmp_path / "c", direct)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp16", "q8"])
@pytest.mark.parametrize("layout", ["raster", "kept"])
def test_from_ranked_tokens(pictures: Path, tmp_path: Path, codec: str, layout: str) -> None:
    """Back to image order, and fewer of them."""
    wish = {"tokens": "raster", **wish_of(layout)}
    derive(cc.made(pictures, tokens="ranked"), tmp_path / "c", codec=codec, **wish)
    assert_as_extracted(tmp_path / "c", cc.made(pictures, codec=codec, **LAYOUTS[layout]))


@pytest.mark.slow
def test_from_kept_tokens_fewer_and_by_a_share(pictures: Path, tmp_path: Path) -> None:
    derive(cc.made(pictures, **LAYOUTS["kept"]), tmp_path / "c", keep="3", codec="t4")
    assert_as_extracted(tmp_path / "c", cc.made(pictures, codec="t4", tokens="ranked", keep=3))
    derive(cc.made(pictures), tmp_path / "share", tokens="ranked", keep="0.25")
    assert_as_extracted(tmp_path / "share", cc.made(pictures, tokens="ranked", keep=4))


@pytest.mark.slow
def test_more_than_256_views(pictures: Path, tmp_path: Path) -> None:
    """The means are of the first of them, in (row, view) order."""
    derive(cc.made(pictures, views=25), tmp_path / "c", codec="t4")
    np.testing.assert_array_equal(
        cc.state(tmp_path / "c")["mean"], cc.mean_of(cc.made(pictures, views=25))
    )


@pytest.mark.slow
def test_pixels_stay(pictures: Path, tmp_path: Path) -> None:
    derive(cc.made(pictures, pixels=True), tmp_path / "c", codec="t3", tokens="ranked")
    direct = cc.made(pictures, pixels=True, codec="t3", tokens="ranked")
    assert_as_extracted(tmp_path / "c", direct)


@pytest.mark.slow
def test_of_an_archive_and_of_format_3(pictures: Path, tmp_path: Path) -> None:
    transfer.copy(cc.made(pictures), tmp_path / "archive", compress=True)
    derive(tmp_path / "archive", tmp_path / "a", codec="t3")
    derive(cc.made(pictures, format=3), tmp_path / "b", codec="t3")
    for name in ("a", "b"):
        assert_as_extracted(tmp_path / name, cc.made(pictures, codec="t3"))


@pytest.mark.slow
def test_blocks_of_one_view_change_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what was measured."""
    derive(cc.made(pictures), tmp_path / "whole", codec="t3")
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 1)
    derive(cc.made(pictures), tmp_path / "views", codec="t3")
    assert files_below(tmp_path / "views") == files_below(tmp_path / "whole")


def test_what_is_lost_is_that_of_the_extraction(pictures: Path, tmp_path: Path) -> None:
    """But for the teacher's own noise, which nobody measures without it."""
    derive(cc.made(pictures), tmp_path / "c", codec="q8")
    here = manifest.read(tmp_path / "c")["provenance"]["distortion"]
    there = manifest.read(cc.made(pictures, codec="q8"))["provenance"]["distortion"]
    assert here == {name: there[name] for name in here}
    assert {"views", "cosine", "mse", "worst", "added_loss"} == here.keys()


@pytest.mark.slow
@pytest.mark.parametrize("codec", LOSSY)
def test_fewer_of_a_lossy_cache_decode_as_before(
    pictures: Path, tmp_path: Path, codec: str
) -> None:
    """Its codes are not touched: levels, views, order and number of tokens change around them."""
    origin = cc.made(pictures, codec=codec, tokens="ranked")
    with Cache(origin) as cache:
        order = [cache.read(range(11), view, ["mask_order"])["mask_order"] for view in range(3)]
    derive(origin, tmp_path / "less", levels=(5,), views=2, keep="5")
    derive(origin, tmp_path / "raster", tokens="raster")
    for view in range(3):
        whole = cc.levels_of(origin, 5, view)
        raster = cc.levels_of(tmp_path / "raster", 5, view)
        np.testing.assert_array_equal(raster[:, 0], whole[:, 0])
        for row in range(11):
            places = 1 + order[view][row].astype(int)
            np.testing.assert_array_equal(raster[row, places], whole[row, 1:])
        if view < 2:
            np.testing.assert_array_equal(cc.levels_of(tmp_path / "less", 5, view), whole[:, :6])
    assert verify.verify_cache(tmp_path / "less")[0] == []
    assert verify.verify_cache(tmp_path / "raster")[0] == []


# ---------------------------------------------------------------- interrupted, and at once

# the function that the killed process enters for the n-th time, and dies in
STOPS = {
    "before the state": ("storage.codec_state:begin", 1),
    "before the state is linked": ("storage.json_file:link_or_create", 1),
    "while it is measured": ("extraction.codec_sample:measure_codec", 1),
    "between state and manifest": ("extraction.target_folder:begin_folder", 1),
    "before the tail": ("storage.json_file:write_file", 3),
    "before the copy of the state": ("storage.json_file:write_file", 4),
    "before the second record": ("storage.commit:publish", 2),
    "before the quarantine": ("extraction.target_folder:write_quarantine", 1),
}
KILLED = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from featcache.maintenance.derive import derive
from featcache.maintenance.derive_plan import Wish
import featcache.storage.zarr_store, zarr
source, root, stops = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
children = []
for i, (target, call) in enumerate(stops):
    children.append(os.fork())
    if children[-1] == 0:
        patch(target, call)
        derive(source, root / str(i), Wish(codec="t3", tokens="ranked"))
        os._exit(0)
for child in children:
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", flush=True)
"""


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    origin = cc.made(pictures)
    ran = python(DYING + KILLED, origin, tmp_path, json.dumps(list(STOPS.values())))
    assert ran.stdout.split() == ["9"] * len(STOPS), ran.stdout + ran.stderr
    derive(origin, tmp_path / "whole", codec="t3", tokens="ranked")
    whole = files_below(tmp_path / "whole")
    for i, stop in enumerate(STOPS):
        out = tmp_path / str(i)
        assert (files_below(out) if out.exists() else {}) != whole, stop
        derive(origin, out, codec="t3", tokens="ranked")
        assert files_below(out) == whole, stop


def test_running_again_does_nothing(pictures: Path, tmp_path: Path) -> None:
    derive(cc.made(pictures), tmp_path / "c", codec="t3")
    times = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*") if path.is_file()
    }
    derive(cc.made(pictures), tmp_path / "c", codec="t3")
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_two_at_once_give_the_same_bytes(pictures: Path, tmp_path: Path, start: Start) -> None:
    origin, out = cc.made(pictures), tmp_path / "c"
    words = ("derive", origin, out, "--codec", "t4")
    slow = """
import time
from featcache.extraction import shard_queue
from featcache.storage import commit
shard_queue.WAIT_S, publish = 0.05, commit.publish
commit.publish = lambda *args: (time.sleep(0.2), publish(*args))[1]
"""
    running = [start(*words, before=slow) for _ in range(2)]
    assert [each.wait() for each in running] == [0, 0], [each.said for each in running]
    derive(origin, tmp_path / "alone", codec="t4")
    assert files_below(out) == files_below(tmp_path / "alone")


# ---------------------------------------------------------------- of what was added


@pytest.fixture(scope="module")
def grown(pictures: Path) -> Path:
    """Levels 2 and 5 of three views; level 1 added, then view 3, then another teacher."""
    out = copy_tree(cc.made(pictures), pictures.parent / "grown")
    cc.add(pictures, out, levels=(1, 2, 5))
    cc.add(pictures, out, levels=(1, 2, 5), views=4)
    cc.add(pictures, out, OTHER, views=4)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["raster", "kept"])
def test_all_that_was_added_is_derived_part_by_part(
    pictures: Path, grown: Path, tmp_path: Path, layout: str
) -> None:
    """The levels of one teacher decode alike in every part."""
    keep = {"keep": "0.3", "tokens": "ranked"} if layout == "kept" else {}
    assert derive(grown, tmp_path / "c", codec="t3", **keep) == []
    with Cache(tmp_path / "c") as cache:
        assert (cache.levels, cache.views, cache.teachers) == ((1, 2, 5), 4, [WIDE, OTHER])
        parent = manifest.read(grown)["id"]
        parts = [tmp_path / "c", *(tmp_path / "c/parts").iterdir()]
        assert len(parts) == 4
        for part in parts:
            about = manifest.read(part)
            assert about["identity"]["parent"] == parent
            assert (about["identity"]["codec"], about["identity"]["tokens"]) == (
                ("t3", "ranked") if keep else ("t3", "raster")
            )
            assert about["identity"].get("keep") == (
                None if not keep else {WIDE: 5, OTHER: 2}[about["identity"]["teacher"]["name"]]
            )
    kept = {"tokens": "ranked", "keep": 5} if keep else {}
    exact = cc.made(pictures, levels=[1, 2, 5], views=4, **kept)
    mean = cc.mean_of(cc.made(pictures, levels=[1, 2, 5], **kept))
    for view in range(4):
        for i, level in enumerate((1, 2, 5)):
            cc.assert_near(
                cc.levels_of(tmp_path / "c", level, view),
                cc.by_zarr(exact, "features")[:, view, i],
                "t3",
                mean[i],
            )
    assert verify.verify_cache(tmp_path / "c")[0] == []


@pytest.mark.slow
def test_merged_it_is_one_flat_cache(pictures: Path, grown: Path, tmp_path: Path) -> None:
    """As one extraction of it."""
    left = derive(grown, tmp_path / "c", codec="t4", views=4, levels=(1, 5))
    assert left == [f"{OTHER}  levels 3  views 0 to 3"]
    assert not (tmp_path / "c/parts").exists()
    assert_as_extracted(tmp_path / "c", cc.made(pictures, codec="t4", views=4, levels=[1, 5]))
    derive(grown, tmp_path / "added", views=2, levels=(1,))
    assert_as_extracted(tmp_path / "added", cc.made(pictures, views=2, levels=[1]))


@pytest.mark.slow
def test_token_ids_that_were_added_stay(pictures: Path, tmp_path: Path) -> None:
    """A tokenizer's part has no features and no codec but fp16: its numbers are copied, and its
    shards repaired."""
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    wanted = cc.make_plan(pictures, levels=(1,))
    part = extend.plan_part(replace(wanted, teacher=TokenizerTeacher(Reds())), origin)
    assert part is not None
    extract.run(*part, batch_size=4)
    assert derive(origin, tmp_path / "c", codec="t3", tokens="ranked", keep="5") == []
    with Cache(origin) as here, Cache(tmp_path / "c") as there:
        assert there.teachers == [WIDE, "reds"]
        for view in range(3):
            ids = [each.read(range(11), view, ["reds/token_ids"]) for each in (here, there)]
            np.testing.assert_array_equal(ids[0]["reds/token_ids"], ids[1]["reds/token_ids"])
    assert verify.verify_cache(tmp_path / "c")[0] == []
    whole = files_below(tmp_path / "c")
    (added,) = (tmp_path / "c/parts").iterdir()
    assert manifest.read(added)["identity"]["codec"] == "fp16"
    record_path(added, "000001").unlink()
    record_path(tmp_path / "c", "000000").unlink()
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole
    assert derive(origin, tmp_path / "flat", codec="t3", views=2) == [
        "reds  levels 1  views 0 to 2"
    ]


@pytest.mark.slow
def test_of_lossy_parts_a_flat_cache_decodes_as_they_do(pictures: Path, tmp_path: Path) -> None:
    origin = copy_tree(cc.made(pictures, codec="t3", views=2), tmp_path / "origin")
    cc.add(pictures, origin, codec="t3", views=2, levels=(1, 2, 5))
    cc.add(pictures, origin, codec="t3", views=3, levels=(1, 2, 5))
    derive(origin, tmp_path / "c", levels=(1, 5), views=3, tokens="ranked", keep="4")
    with Cache(origin) as cache:
        for view in range(3):
            order = cache.read(range(11), view, ["mask_order"])["mask_order"][:, :4].astype(int)
            for level in (1, 5):
                whole = cc.levels_of(origin, level, view)
                expected = [np.stack([h[0], *h[1 + o]]) for h, o in zip(whole, order, strict=True)]
                np.testing.assert_array_equal(cc.levels_of(tmp_path / "c", level, view), expected)


@pytest.mark.slow
def test_an_unfinished_addition_is_left_out(pictures: Path, grown: Path, tmp_path: Path) -> None:
    origin = copy_tree(grown, tmp_path / "origin")
    part = next(
        path
        for path in (origin / "parts").iterdir()
        if manifest.read(path)["identity"].get("first_view")
    )
    record_path(part, "000002").unlink()
    assert derive(origin, tmp_path / "c", codec="q8") == [
        f"{WIDE}  levels 1,2,5  view 3 (unfinished)"
    ]
    with Cache(tmp_path / "c") as cache:
        assert cache.views == 3


@pytest.mark.slow
def test_a_second_teacher_that_is_lossy_already(pictures: Path, tmp_path: Path) -> None:
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    cc.add(pictures, origin, OTHER, codec="q8")
    with pytest.raises(UserError, match=r"in q8, which is lossy: t4 is derived from"):
        derive(origin, tmp_path / "c", codec="t4")
    assert not (tmp_path / "c").exists()
    derive(origin, tmp_path / "same", codec="q8")
    np.testing.assert_array_equal(
        cc.levels_of(tmp_path / "same", 3, 1, teacher=OTHER),
        cc.levels_of(origin, 3, 1, teacher=OTHER),
    )


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "words", "status", "message"),
    [
        (LAYOUTS["kept"], ("--keep", 6), 1, "keeps the first 5 of 16 patches"),
        (LAYOUTS["kept"], ("--tokens", "raster"), 1, "keeps the first 5 of 16 patches"),
        ({}, ("--keep", 3), 2, "give --tokens ranked with it"),
        ({}, ("--tokens", "ranked", "--keep", 17), 2, "--keep"),
        ({"codec": "q8"}, ("--codec", "t4"), 1, "in q8, which is lossy"),
        ({"codec": "t3"}, ("--codec", "fp16"), 1, "in t3, which is lossy"),
        ({}, (), 2, "has all of this already"),
        ({}, ("--codec", "fp16"), 2, "has all of this already"),
        ({"codec": "t3"}, ("--codec", "t3", "--views", 3), 2, "has all of this already"),
        ({}, ("--codec", "t5"), 2, "t4"),
        ({}, ("--levels", "3"), 2, "--levels"),
        ({}, ("--views", 4), 2, "--views 4: 1 to 3 views are stored"),
    ],
    ids=str,
)
def test_what_it_cannot_give_is_one_line(
    featcache_command: Command,
    pictures: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: tuple[Any, ...],
    status: int,
    message: str,
) -> None:
    ran = featcache_command("derive", cc.made(pictures, **changes), tmp_path / "c", *words)
    assert ran.status == status
    assert message in ran.error
    assert not (tmp_path / "c").exists()


def test_a_width_that_no_rotation_takes(tmp_path: Path, pictures: Path) -> None:
    narrow = cc.make_plan(pictures)
    extract.run(narrow, tmp_path / "narrow", batch_size=4)
    with pytest.raises(UserError, match="a width that 64 divides, the teacher has 8"):
        derive(tmp_path / "narrow", tmp_path / "c", codec="t4")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["t3", "fp16"])
@pytest.mark.parametrize("shard", ["000000", "000001"])
def test_a_damaged_parent_is_named_and_nothing_half_written_is_published(
    pictures: Path, tmp_path: Path, codec: str, shard: str
) -> None:
    """In the shards that the state is made of too."""
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    bad = next((origin / f"shards/{shard}.zarr/features").glob("c*"))
    flip(bad, 40)
    for _ in range(2):
        with pytest.raises(UserError, match=f"{bad}.*repair {origin}") as caught:
            derive(origin, tmp_path / "c", codec=codec, tokens="ranked")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "c").glob(f"shards/{shard}*"))
        assert not [name for name in files_below(tmp_path) if ".tmp" in name or ".lease" in name]
    flip(bad, 40)
    derive(origin, tmp_path / "c", codec=codec, tokens="ranked")
    assert_as_extracted(tmp_path / "c", cc.made(pictures, codec=codec, tokens="ranked"))


def test_an_incomplete_parent_is_one_line(pictures: Path, tmp_path: Path) -> None:
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    record_path(origin, "000001").unlink()
    with pytest.raises(UserError, match=r"is incomplete: 1 of 3 shards are missing") as caught:
        derive(origin, tmp_path / "c", codec="t3")
    assert "\n" not in str(caught.value)
    assert "`featcache copy --shards A:B`" in str(caught.value)  # `derive` has no such option
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("lost", ["tail", "state"])
def test_a_parent_without_a_file_beside_the_manifest(
    pictures: Path, tmp_path: Path, lost: str
) -> None:
    origin = copy_tree(cc.made(pictures, codec="t3"), tmp_path / "origin")
    state = cc.state_path(origin)
    (tail,) = {*origin.glob("*.safetensors")} - {state}
    {"tail": tail, "state": state}[lost].unlink()
    with pytest.raises(UserError, match=r"missing.*featcache repair") as caught:
        derive(origin, tmp_path / "c", tokens="ranked")
    assert "\n" not in str(caught.value)
    repair.run(origin, lambda about: (open_source(pictures), teachers.load(WIDE, None)))
    derive(origin, tmp_path / "c", tokens="ranked")


def test_a_place_inside_the_parent_and_one_that_is_taken(pictures: Path, tmp_path: Path) -> None:
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    for inside in (origin, origin / "parts/x", origin / "small"):
        with pytest.raises(UsageError, match="lies in the cache"):
            derive(origin, inside, codec="t3")
    derive(origin, tmp_path / "c", codec="t3")
    before = files_below(tmp_path / "c")
    for wish in ({"codec": "t4"}, {"codec": "t3", "views": 2}, {"tokens": "ranked"}):
        with pytest.raises(IdentityError, match="holds another cache: identity") as caught:
            derive(origin, tmp_path / "c", **wish)
        assert "\n" not in str(caught.value)
    assert files_below(tmp_path / "c") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no cache"):
        derive(origin, tmp_path / "full", codec="t3")


def test_an_extraction_of_the_same_is_another_cache(pictures: Path, tmp_path: Path) -> None:
    """Neither continues the other: a derived cache names its parent."""
    derive(cc.made(pictures), tmp_path / "c", codec="t3")
    with pytest.raises(IdentityError, match=r"identity\.parent"):
        cc.extracted(pictures, tmp_path / "c", codec="t3")


# ---------------------------------------------------------------- commands on a derived cache


def test_the_commands_know_where_it_comes_from(
    featcache_command: Command, pictures: Path, tmp_path: Path
) -> None:
    origin = cc.made(pictures)
    ran = featcache_command("derive", origin, tmp_path / "c", "--codec", "t3", "--json")
    assert ran.status == 0, ran.err
    parent = manifest.read(origin)["id"]
    about = manifest.read(tmp_path / "c")
    assert about["identity"]["parent"] == parent
    assert about["provenance"]["derived_from"] == str(origin)
    told = featcache_command("info", tmp_path / "c")
    assert told.status == 0, told.err
    assert f"derived from {parent}" in told.out
    assert f"featcache derive {origin} {tmp_path / 'c'}" in told.out
    facts = json.loads(featcache_command("info", tmp_path / "c", "--json").out)
    assert facts["identity"]["codec"] == "t3"
    shutil.copytree(tmp_path / "c", tmp_path / "home/small")
    assert "t3 zarr raster" in featcache_command("ls").out
    assert featcache_command("verify", tmp_path / "c").status == 0
    ran = featcache_command("verify", tmp_path / "c", "--recompute", 4, "--images", pictures)
    assert ran.status == 0, ran.err
    words = ("--teacher", WIDE, "--images", pictures, "--size", 28, "--views", 4)
    more = ("--levels", "2,5", "--codec", "t3", "--rows-per-shard", 5, "--add")
    ran = featcache_command("extract", *words, *more, "--out", tmp_path / "c")
    assert ran.status == 1
    assert f"was derived from {parent}; add to that one, and derive again" in ran.error


def test_the_command_that_made_it_makes_it(
    featcache_command: Command, grown: Path, tmp_path: Path
) -> None:
    """As `info` tells it."""
    words = ("--codec", "t4", "--tokens", "ranked", "--keep", 5, "--levels", "1,5", "--views", 2)
    assert featcache_command("derive", grown, tmp_path / "a", *words).status == 0
    facts = json.loads(featcache_command("info", tmp_path / "a", "--json").out)
    command = shlex.split(facts["made_by"])
    assert command[:2] == ["featcache", "derive"]
    again = [str(tmp_path / "b") if word == str(tmp_path / "a") else word for word in command[1:]]
    assert featcache_command(*again).status == 0
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


@pytest.mark.slow
def test_derived_of_derived(pictures: Path, tmp_path: Path) -> None:
    """Step by step the same numbers; the parent is the last one."""
    derive(cc.made(pictures), tmp_path / "ranked", tokens="ranked", views=2)
    derive(tmp_path / "ranked", tmp_path / "c", keep="5", codec="t4")
    assert_as_extracted(tmp_path / "c", cc.made(pictures, codec="t4", views=2, **LAYOUTS["kept"]))
    assert (
        manifest.read(tmp_path / "c")["identity"]["parent"]
        == manifest.read(tmp_path / "ranked")["id"]
    )
    transfer.copy(tmp_path / "c", tmp_path / "copy")
    assert files_below(tmp_path / "copy") == files_below(tmp_path / "c")


# ---------------------------------------------------------------- repaired

LOSSES: dict[str, Callable[[Path], Any]] = {
    "a bit of a shard": lambda c: flip(next(c.glob("shards/000001.zarr/features/c*")), 40),
    "a file of a shard": lambda c: next(c.glob("shards/000001.zarr/attention/c*")).unlink(),
    "a record": lambda c: record_path(c, "000002").unlink(),
    "the state": lambda c: cc.state_path(c).unlink(),
    "its copy": lambda c: (c / "shards/state.copy.safetensors").unlink(),
    "the tail": lambda c: min(c.glob("*.safetensors"), key=lambda p: len(p.name)).unlink(),
    "the manifest": lambda c: (c / "manifest.json").unlink(),
    "the quarantine": lambda c: (c / "quarantine.json").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOSSES)
def test_it_is_repaired_from_its_parent(pictures: Path, tmp_path: Path, lost: str) -> None:
    derive(cc.made(pictures), tmp_path / "c", codec="t3", tokens="ranked", keep="5", views=2)
    whole = files_below(tmp_path / "c")
    LOSSES[lost](tmp_path / "c")
    assert files_below(tmp_path / "c") != whole
    done = repair.run(tmp_path / "c", never)
    assert done["restored"] or done["shards"]
    assert files_below(tmp_path / "c") == whole
    assert repair.run(tmp_path / "c", never) == {"restored": [], "shards": []}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, "0.3"])
def test_parts_are_repaired_from_the_parents(grown: Path, tmp_path: Path, keep: str | None) -> None:
    """A share of the patches is another number of each teacher's."""
    derive(grown, tmp_path / "c", codec="t4", tokens="ranked" if keep else None, keep=keep)
    whole = files_below(tmp_path / "c")
    for part in (tmp_path / "c", *sorted((tmp_path / "c/parts").iterdir())):
        flip(next(part.glob("shards/000001.zarr/features/c*")), 40)
        min(part.glob("*.safetensors"), key=lambda path: len(path.name)).unlink()
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole


def test_merged_it_is_repaired_too(grown: Path, tmp_path: Path) -> None:
    derive(grown, tmp_path / "c", codec="t4", levels=(1, 5), views=4)
    whole = files_below(tmp_path / "c")
    for shard in ("000000", "000002"):
        shutil.rmtree(tmp_path / f"c/shards/{shard}.zarr")
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole


def test_a_parent_that_was_moved_is_given(
    featcache_command: Command, pictures: Path, tmp_path: Path
) -> None:
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    derive(origin, tmp_path / "c", codec="t3")
    whole = files_below(tmp_path / "c")
    origin.rename(tmp_path / "moved")
    LOSSES["a bit of a shard"](tmp_path / "c")
    damaged = files_below(tmp_path / "c")
    ran = featcache_command("repair", tmp_path / "c")
    assert ran.status == 1
    assert f"which is not at {str(origin)!r}; give it with --parent CACHE" in ran.error
    wrong = cc.made(pictures, views=2)
    ran = featcache_command("repair", tmp_path / "c", "--parent", wrong)
    assert ran.status == 1
    assert f"is cache {manifest.read(wrong)['id']}, it was derived from" in ran.error
    ran = featcache_command("repair", tmp_path / "c", "--parent", tmp_path / "nowhere")
    assert (ran.status, "no cache at" in ran.error) == (1, True)
    assert files_below(tmp_path / "c") == damaged
    ran = featcache_command("repair", tmp_path / "c", "--parent", tmp_path / "moved")
    assert ran.status == 0, ran.err
    assert files_below(tmp_path / "c") == whole


def test_a_damaged_parent_leaves_the_shard_that_is_there(pictures: Path, tmp_path: Path) -> None:
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    derive(origin, tmp_path / "c", codec="t3")
    LOSSES["a bit of a shard"](tmp_path / "c")
    before = files_below(tmp_path / "c")
    bad = next((origin / "shards/000001.zarr/features").glob("c*"))
    flip(bad, 41)
    with pytest.raises(UserError, match=f"{bad}.*repair {origin}"):
        repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == before


COPIES: dict[str, Callable[[Path, Path], Any]] = {
    "whole": lambda c, out: transfer.copy(c, out),
    "views": lambda c, out: transfer.copy(c, out, views=2),
    "levels": lambda c, out: transfer.copy(c, out, levels=(5,)),
    "shards": lambda c, out: transfer.copy(c, out, shards=(1, 3)),
    "archive": lambda c, out: transfer.copy(c, out, compress=True),
    "tars": lambda c, out: transfer.convert(c, out, store="webdataset"),
    "format 3": lambda c, out: transfer.convert(c, out, format=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("codec", ["t3", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_copy_of_it_is_repaired_from_its_parent(
    pictures: Path, tmp_path: Path, copy: str, codec: str
) -> None:
    """However it is written."""
    derive(cc.made(pictures), tmp_path / "d", codec=codec, tokens="ranked", keep="5")
    out = tmp_path / "c"
    COPIES[copy](tmp_path / "d", out)
    whole = files_below(out)
    (record,) = out.glob("shards/000001.json")
    record.unlink()
    min(out.glob("*.safetensors"), key=lambda path: len(path.name)).unlink()
    assert repair.run(out, never)["shards"] == [str(record)]
    assert files_below(out) == whole


@pytest.mark.slow
def test_parts_of_a_copy_are_repaired(grown: Path, tmp_path: Path) -> None:
    derive(grown, tmp_path / "d", codec="q8")
    transfer.copy(tmp_path / "d", tmp_path / "c", shards=(0, 2))
    whole = files_below(tmp_path / "c")
    for part in (tmp_path / "c", *sorted((tmp_path / "c/parts").iterdir())):
        record_path(part, "000001").unlink()
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole


def test_another_shard_of_the_parent_need_not_be_sound(pictures: Path, tmp_path: Path) -> None:
    """The first, of which the state was made and measured."""
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    derive(origin, tmp_path / "c", codec="t3", tokens="ranked")
    whole = files_below(tmp_path / "c")
    flip(next((origin / "shards/000000.zarr/features").glob("c*")), 41)
    LOSSES["a bit of a shard"](tmp_path / "c")
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole


def test_state_and_copy_lost_are_one_line(pictures: Path, tmp_path: Path) -> None:
    derive(cc.made(pictures), tmp_path / "c", codec="t3")
    LOSSES["the state"](tmp_path / "c")
    LOSSES["its copy"](tmp_path / "c")
    with pytest.raises(UserError, match="are both missing or damaged") as caught:
        repair.run(tmp_path / "c", never)
    assert "\n" not in str(caught.value)


def test_a_parent_to_which_something_was_added_since(pictures: Path, tmp_path: Path) -> None:
    """Its own shards are what they were."""
    origin = copy_tree(cc.made(pictures), tmp_path / "origin")
    derive(origin, tmp_path / "c", codec="t3")
    whole = files_below(tmp_path / "c")
    cc.add(pictures, origin, levels=(1, 2, 5))
    LOSSES["a record"](tmp_path / "c")
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole
