"""Repair: whatever a file has suffered, `verify` names it and `repair` brings back the very bytes;
nothing else moves.

The caches are small (2 shards, 2 views, synthetic teacher), so that every file of them can be
damaged in every way.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from featcache import teachers
from featcache.errors import IdentityError, UserError
from featcache.extraction import extract, plan
from featcache.extraction.progress import ExtractProgress
from featcache.maintenance import repair, verify
from featcache.models.contract import Teacher
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.storage import commit, json_file, manifest
from featcache.storage import lease as leases
from featcache.storage.store import SHARDS, STORES
from tests.conftest import Ran, copy_tree, files_below, flip, make_plan

DAMAGE: dict[str, Callable[[Path], None]] = {
    "one bit": lambda path: flip(path, path.stat().st_size // 2, 0),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]) and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "gone": lambda path: path.unlink(),
}


@functools.cache
def sound(folder: Path, store: str) -> Path:
    out = folder.parent / f"sound-{store}"
    extract.run(make_plan(folder, store=store, views=2, rows_per_shard=7), out, batch_size=4)
    return out


def load_of(folder: Path) -> repair.Load:
    def load(about: dict) -> tuple[Source, Teacher]:
        name, weights = about["identity"]["teacher"]["name"], about["provenance"]["weights"]
        return open_source(folder), teachers.load(name, weights)

    return load


def never(about: dict) -> tuple[Source, Teacher]:
    pytest.fail("neither pictures nor teacher are needed")


def told(cache: Path) -> str:
    """All that verify says, whether it raises at once or lists."""
    try:
        return "\n".join(verify.verify_cache(cache)[0])
    except UserError as error:
        return str(error)


def sweep(
    cache: Path, folder: Path, cases: Iterator[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """Damage, look, repair, compare; (file, damage, what was wrong) of each case that failed."""
    whole, wrong = files_below(cache), []
    for name, how in cases:
        DAMAGE[how](cache / name)
        if not all(part in told(cache) for part in (str(cache), Path(name).name)):
            wrong.append((name, how, "verify does not name it: " + told(cache)))
        repair.run(cache, load_of(folder))
        if (after := files_below(cache)) != whole:
            wrong.append(
                (
                    name,
                    how,
                    "repair leaves "
                    f"{[n for n in whole.keys() | after if whole.get(n) != after.get(n)]}",
                )
            )
            for each, data in whole.items():
                (cache / each).parent.mkdir(parents=True, exist_ok=True)
                (cache / each).write_bytes(data)
            for each in after.keys() - whole.keys():
                (cache / each).unlink()
    assert told(cache) == ""
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_every_file_with_every_damage(pictures: Path, tmp_path: Path, store: str) -> None:
    cache = copy_tree(sound(pictures, store), tmp_path / "c")
    assert "quarantine.json" in files_below(cache)
    cases = ((name, how) for name in sorted(files_below(cache)) for how in DAMAGE)
    assert sweep(cache, pictures, cases) == []


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_every_file_with_one_damage_or_another(photos: Path, tmp_path: Path, store: str) -> None:
    """The kinds of damage in turn, where nothing is in quarantine."""
    cache = copy_tree(sound(photos, store), tmp_path / "c")
    assert "quarantine.json" not in files_below(cache)
    names = sorted(files_below(cache))
    assert sweep(cache, photos, zip(names, itertools.cycle(DAMAGE))) == []


@pytest.fixture
def cache(pictures: Path, tmp_path: Path) -> Path:
    return copy_tree(sound(pictures, "zarr"), tmp_path / "c")


CHUNKS = [f"{SHARDS}/00000{i}.zarr/area/c.0.0" for i in range(2)]


def test_a_sound_cache_is_left_alone(cache: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert repair.run(cache, never) == {"restored": [], "shards": []}
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times


def test_only_the_bad_shard_is_extracted_again(cache: Path, pictures: Path) -> None:
    whole, progress = files_below(cache), ExtractProgress()
    times = {path: path.stat().st_mtime_ns for path in cache.glob(f"{SHARDS}/000000*/**/*")}
    flip(cache / CHUNKS[1])
    done = repair.run(cache, load_of(pictures), progress=progress)
    assert done == {"restored": [], "shards": [str(cache / SHARDS / "000001.json")]}
    assert progress.pictures == 6
    assert {path: path.stat().st_mtime_ns for path in cache.glob(f"{SHARDS}/000000*/**/*")} == times
    assert files_below(cache) == whole


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "name", ["manifest.json", f"{SHARDS}/manifest.copy.json", "quarantine.json"]
)
@pytest.mark.parametrize("how", DAMAGE)
def test_what_the_files_themselves_can_tell_needs_no_pictures(
    cache: Path, name: str, how: str
) -> None:
    whole = files_below(cache)
    DAMAGE[how](cache / name)
    assert repair.run(cache, never) == {"restored": [str(cache / name)], "shards": []}
    assert files_below(cache) == whole


def test_manifest_and_copy_both_damaged(cache: Path, pictures: Path) -> None:
    for name in ("manifest.json", f"{SHARDS}/manifest.copy.json"):
        flip(cache / name, 100)
    before = files_below(cache)
    with pytest.raises(
        UserError, match=r"manifest\.json and its copy .*both damaged; extract again"
    ):
        repair.run(cache, load_of(pictures))
    assert files_below(cache) == before


def test_a_manifest_that_is_not_its_copy(cache: Path, pictures: Path) -> None:
    """Each sound by itself, as after a hand copied one over: verify must not call this sound."""
    about = manifest.read(cache)
    about["provenance"]["source"] = "elsewhere"
    json_file.write_json(cache / SHARDS / "manifest.copy.json", about)
    assert "manifest.copy.json" in told(cache)
    repair.run(cache, never)
    assert told(cache) == ""


def test_several_things_at_once(cache: Path, pictures: Path) -> None:
    whole = files_below(cache)
    names = [
        "manifest.json",
        "quarantine.json",
        next(name for name in whole if name.endswith(".safetensors")),
        *CHUNKS,
    ]
    for name in (*names, f"{SHARDS}/000001.json"):
        DAMAGE["gone"](cache / name)
    done = repair.run(cache, load_of(pictures))
    assert files_below(cache) == whole
    assert len(done["shards"]) == 2


def test_a_full_disk_puts_the_shard_back_without_a_further_lease(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease is a file, for which there is no room either."""
    DAMAGE["one bit"](cache / CHUNKS[0])
    before = files_below(cache)

    def full(*args: object, **kwargs: object) -> None:
        def no_lease(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(leases, "acquire", no_lease)
        no_lease()

    monkeypatch.setattr(extract, "extract_shard", full)
    with pytest.raises((UserError, OSError)):
        repair.run(cache, load_of(pictures))
    assert files_below(cache) == before


def test_a_batch_size_that_is_not_recorded_is_the_usual_one(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs write manifests too, and older ones of ours noted none."""
    cache = copy_tree(sound(pictures, "zarr"), tmp_path / "c")
    about = manifest.read(cache)
    about["provenance"].pop("batch_size")
    for path in (cache / manifest.NAME, cache / SHARDS / manifest.COPY):
        json_file.write_json(path, about)
    (cache / SHARDS / "000001.json").unlink()
    before = files_below(sound(pictures, "zarr"))
    repair.run(cache, load_of(pictures))
    after = files_below(cache)
    assert {name for name in before if before[name] != after[name]} == {
        manifest.NAME, f"{SHARDS}/{manifest.COPY}",
    }  # fmt: skip
    assert "records no batch size, 32 is taken" in caplog.text


@pytest.mark.slow
def test_real_weights_and_another_batch_size_are_as_at_extraction(
    photos: Path, tmp_path: Path
) -> None:
    """A network's bits depend on the batch: the manifest's counts."""
    vit = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"
    made = make_plan(photos, vit, "random:0", tokens="ranked", keep=7, pixels=True, order="topk")
    extract.run(made, tmp_path / "c", batch_size=7)
    whole = files_below(tmp_path / "c")
    for shard in ("000000", "000002"):
        (tmp_path / "c" / SHARDS / f"{shard}.json").unlink()
    repair.run(tmp_path / "c", load_of(photos))
    assert files_below(tmp_path / "c") == whole


# ---------------------------------------------------------------- a repair that fails


def test_other_pictures_and_no_pictures_change_nothing(
    cache: Path, photos: Path, tmp_path: Path
) -> None:
    flip(cache / CHUNKS[0])
    before = files_below(cache)
    with pytest.raises(
        IdentityError, match=r"cannot repair .*identity\.pictures.*--images SRC, --weights FILE"
    ):
        repair.run(cache, load_of(photos))
    assert files_below(cache) == before
    with pytest.raises(UserError, match="no pictures found"):
        repair.run(cache, load_of(tmp_path / "nowhere"))
    assert files_below(cache) == before


def test_a_picture_that_vanishes_on_the_way_puts_the_shard_back(
    cache: Path, pictures: Path, tmp_path: Path
) -> None:
    """Both shards are bad and the second cannot be made: the first is repaired, the second as it
    was."""
    whole, folder = files_below(cache), copy_tree(pictures, tmp_path / "pictures")
    for name in CHUNKS:
        flip(cache / name)
    before = files_below(cache)

    def load(about: dict) -> tuple[Source, Teacher]:
        found = load_of(folder)(about)
        (folder / "rgba.png").unlink()  # the last but one
        return found

    with pytest.raises(UserError, match="'rgba' cannot be read"):
        repair.run(cache, load)
    assert files_below(cache) == {**before, CHUNKS[0]: whole[CHUNKS[0]]}
    repair.run(cache, load_of(pictures))
    assert files_below(cache) == whole


def test_a_stopped_repair_puts_the_shard_back(cache: Path, pictures: Path) -> None:
    flip(cache / CHUNKS[0])
    before = files_below(cache)

    def stop(progress: ExtractProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair.run(cache, load_of(pictures), progress=ExtractProgress(stop))
    assert files_below(cache) == before


@pytest.mark.parametrize("then", ["repair", "extract", "extract, damage, repair"])
def test_a_killed_repair_is_taken_up(cache: Path, pictures: Path, then: str) -> None:
    """It died with the bad shard out of sight and nothing in its place."""
    whole = files_below(cache)
    flip(cache / CHUNKS[0])
    commit.move_to_backup(cache, "000000", "zarr")
    assert "000000.json: missing" in told(cache)
    if then.startswith("extract"):
        extract.run(make_plan(pictures, views=2, rows_per_shard=7), cache, batch_size=4)
        assert {path.name for path in commit.leftovers(cache)} == {
            "000000.zarr.bad",
            "000000.json.bad",
        }
        assert {
            name: data for name, data in files_below(cache).items() if ".bad" not in name
        } == whole
    if then.endswith("damage, repair"):
        flip(cache / CHUNKS[0])
    if then.endswith("repair"):
        repair.run(cache, load_of(pictures))
        assert files_below(cache) == whole


def test_an_unfinished_cache_is_finished(cache: Path, pictures: Path) -> None:
    whole = files_below(cache)
    (cache / SHARDS / "000001.json").unlink()
    shutil.rmtree(cache / SHARDS / "000001.zarr")
    repair.run(cache, load_of(pictures))
    assert files_below(cache) == whole


# ---------------------------------------------------------------- the command


def test_the_command(
    featcache_command: Callable[..., Ran], cache: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = files_below(cache)
    assert featcache_command("repair", cache).out == f"{cache}: nothing to fix\n"
    flip(cache / CHUNKS[1])
    ran = featcache_command("verify", cache)
    assert ran.status == 1
    assert f"`featcache repair {cache}` fixes it" in ran.error
    ran = featcache_command("repair", cache, "--images", tmp_path / "nowhere")
    assert ran.status == 1
    assert "nowhere" in ran.error
    ran = featcache_command("repair", cache)  # pictures from where they were
    assert ran.status == 0, ran.err
    assert ran.out == f"made again {cache}/{SHARDS}/000001.json\n"
    assert files_below(cache) == whole
    (cache / "manifest.json").unlink()
    assert f"`featcache repair {cache}`" in featcache_command("verify", cache).error
    moved = copy_tree(pictures, tmp_path / "moved")
    flip(cache / CHUNKS[0])
    ran = featcache_command("repair", cache, "--images", moved, "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out) == {
        "cache": str(cache),
        "restored": [f"{cache}/manifest.json"],
        "shards": [f"{cache}/{SHARDS}/000000.json"],
    }
    assert files_below(cache) == whole
    (tmp_path / "file").touch()
    for name in ("nothing", "file", "pictures"):
        ran = featcache_command("repair", tmp_path / name)
        assert ran.status == 1
        assert f"no cache at '{tmp_path / name}'" in ran.error


def test_the_plan_of_a_manifest_is_the_plan_it_came_from(photos: Path) -> None:
    made = make_plan(
        photos, tokens="ranked", keep=3, pixels=True, order="uniform", rows_per_shard=9
    )
    again = repair.plan_from_manifest(made.manifest(), made.source, made.teacher)
    assert again == made
    assert isinstance(again, plan.Plan)
