"""Repair of what `copy` made: some shards, or fewer views and levels, with the pictures of the
whole.

And what several repairs, deaths and notices leave: a cache whose other shards were never out of
sight.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import featcache
from featcache.errors import IdentityError, UnreadableError, UserError
from featcache.extraction import extend, extract
from featcache.extraction.progress import ExtractProgress
from featcache.maintenance import repair, transfer, verify
from featcache.storage import commit, json_file, lease, manifest
from featcache.storage.store import SHARDS, STORES
from tests.conftest import Ran, Running, copy_tree, files_below, flip, make_plan
from tests.featcache.extraction.test_launcher import wait_for
from tests.featcache.maintenance.test_repair import load_of, never, told

Start = Callable[..., Running]
SLOW = """
import time
from featcache.pictures import decode as picture_decode
from featcache.maintenance import transfer
decode, copy = picture_decode.decode, transfer._copy_file
picture_decode.decode = lambda data: (time.sleep(0.1), decode(data))[1]
transfer._copy_file = lambda *a: (time.sleep(0.1), copy(*a))[1]
"""


@functools.cache
def sound(folder: Path, store: str) -> Path:
    """Thirteen pictures, two of them in quarantine, in four shards."""
    out = folder.parent / f"four-{store}"
    extract.run(make_plan(folder, store=store, views=2, rows_per_shard=4), out, batch_size=4)
    return out


def numbers(store: str, shard: int) -> str:
    return (
        f"{SHARDS}/{shard:06d}.zarr/area/c.0.0"
        if store == "zarr"
        else f"{SHARDS}/{shard:06d}.webdataset/v1.tar"
    )


@pytest.fixture
def cache(pictures: Path, tmp_path: Path) -> Path:
    return copy_tree(sound(pictures, "zarr"), tmp_path / "c")


# ---------------------------------------------------------------- copies


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("damage", ["a flipped bit", "no record", "nothing left"])
@pytest.mark.parametrize("store", STORES)
def test_some_shards_are_repaired_from_the_pictures_of_all(
    pictures: Path, tmp_path: Path, store: str, damage: str
) -> None:
    out = tmp_path / "part"
    transfer.copy(sound(pictures, store), out, shards=(1, 3))
    whole = files_below(out)
    assert manifest.read(out)["identity"]["pictures"]["count"] < 8  # one of them is in quarantine
    if damage == "a flipped bit":
        flip(out / numbers(store, 1), 4)
    else:
        (out / SHARDS / "000001.json").unlink()
    if damage == "nothing left":
        shutil.rmtree(out / SHARDS / f"000001.{store}")
    assert told(out)
    done = repair.run(out, load_of(pictures))
    assert done["shards"] == [str(out / SHARDS / "000001.json")]
    assert files_below(out) == whole


def test_some_shards_are_not_repaired_from_other_pictures(
    pictures: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "part"
    transfer.copy(sound(pictures, "zarr"), out, shards=(1, 3))
    flip(out / numbers("zarr", 1))
    before = files_below(out)
    with pytest.raises(IdentityError, match=r"cannot repair .*identity\.pictures"):
        repair.run(out, load_of(photos))
    assert files_below(out) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [{"views": 1}, {"levels": (1,)}, {"views": 1, "shards": (0, 2)}], ids=str
)
def test_fewer_views_or_levels_are_repaired_to_the_same_bytes(
    pictures: Path, tmp_path: Path, chosen: dict
) -> None:
    """Statistics too: a copy counts what is stored, an extraction what it has before encoding."""
    out = tmp_path / "flat"
    transfer.copy(sound(pictures, "zarr"), out, **chosen)
    whole = files_below(out)
    flip(out / numbers("zarr", 1))
    repair.run(out, load_of(pictures))
    assert files_below(out) == whole


# ---------------------------------------------------------------- what belongs together


def test_a_stranger_among_what_was_added_is_named(pictures: Path, tmp_path: Path) -> None:
    """Sound in itself, and from other crops: verify names it, repair does not call the cache
    repaired."""
    out = copy_tree(sound(pictures, "zarr"), tmp_path / "c")
    other = make_plan(pictures, views=2, rows_per_shard=4, order="uniform")
    extract.run(other, tmp_path / "other", batch_size=4)
    (out / extend.PARTS).mkdir()
    (tmp_path / "other").rename(out / extend.PARTS / "other")
    found, _ = verify.verify_cache(out)
    assert len(found) == 1
    assert "does not belong to cache" in found[0]
    assert str(out / extend.PARTS / "other") in found[0]
    with pytest.raises(UserError, match=r"does not belong to cache .* move it away"):
        repair.run(out, never)


@pytest.mark.parametrize(
    "rows", [[], [{"key": "photo0", "reason": "?"}]], ids=["emptied", "of another cache"]
)
def test_a_quarantine_that_the_records_do_not_tell_of(
    cache: Path, rows: list[dict[str, str]]
) -> None:
    whole = files_below(cache)
    json_file.write_json(cache / "quarantine.json", {"pictures": rows})
    assert f"{cache}/quarantine.json: does not list" in told(cache)
    assert repair.run(cache, never) == {"restored": [f"{cache}/quarantine.json"], "shards": []}
    assert files_below(cache) == whole


def test_a_quarantine_where_nothing_was_put_into_it(photos: Path, tmp_path: Path) -> None:
    extract.run(make_plan(photos), tmp_path / "c", batch_size=4)
    whole = files_below(tmp_path / "c")
    json_file.write_json(
        tmp_path / "c/quarantine.json", {"pictures": [{"key": "photo0", "reason": "?"}]}
    )
    assert "quarantine.json: does not list" in told(tmp_path / "c")
    repair.run(tmp_path / "c", never)
    assert files_below(tmp_path / "c") == whole


# ---------------------------------------------------------------- a place that cannot be read


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", ["manifest.json", f"{SHARDS}/000001.json", numbers("zarr", 1)])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
def test_what_cannot_be_read_is_not_taken_for_damage(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A stale mount must not set a shard aside; a bad sector is the file's own, and does."""
    before, read, opened = files_below(cache), Path.read_bytes, Path.open

    def refuse(path: Path) -> None:
        if path == cache / name:
            raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (refuse(path), read(path))[1])
        patch.setattr(
            Path,
            "open",
            lambda path, *args, **kwargs: (refuse(path), opened(path, *args, **kwargs))[1],
        )
        if number == errno.EIO:
            assert str(cache / name) in told(cache)
        else:
            for work in (verify.verify_cache, functools.partial(repair.run, load=never)):
                with pytest.raises(UnreadableError, match=os.strerror(number)) as caught:
                    work(cache)
                assert str(cache / name) in str(caught.value)
                assert "damaged" not in str(caught.value)
    assert files_below(cache) == before


# ---------------------------------------------------------------- several, killed, stopped


def test_one_shard_at_a_time_is_out_of_sight(cache: Path, pictures: Path) -> None:
    whole, missing, totals = files_below(cache), set(), set()
    for shard in range(4):
        flip(cache / numbers("zarr", shard))

    def look(progress: ExtractProgress) -> None:
        missing.add(
            4 - len([path for path in cache.glob(f"{SHARDS}/0*.json") if path.stem.isdecimal()])
        )
        totals.add(progress.total)

    repair.run(cache, load_of(pictures), progress=ExtractProgress(look))
    assert missing <= {0, 1}
    assert totals == {13}
    assert files_below(cache) == whole


def test_what_a_killed_repair_left_goes_with_the_next(cache: Path, pictures: Path) -> None:
    """It died when the new shard was complete and the old one still there."""
    whole = files_below(cache)
    commit.move_to_backup(cache, "000000", "zarr")
    copy_tree(sound(pictures, "zarr") / SHARDS / "000000.zarr", cache / SHARDS / "000000.zarr")
    shutil.copy(sound(pictures, "zarr") / SHARDS / "000000.json", cache / SHARDS / "000000.json")
    assert any(name.endswith(".bad") for name in files_below(cache))
    repair.run(cache, never)
    assert files_below(cache) == whole


@pytest.mark.slow
def test_a_repair_waits_for_another_and_finds_its_work_done(cache: Path, pictures: Path) -> None:
    whole, said = files_below(cache), []
    flip(cache / numbers("zarr", 2))
    held = lease.acquire(cache, "000002")
    assert held is not None

    def waiting(shards: int) -> None:
        said.append(shards)
        (cache / numbers("zarr", 2)).write_bytes(whole[numbers("zarr", 2)])
        held.release()

    progress = ExtractProgress(waiting=waiting)
    repair.run(cache, load_of(pictures), progress=progress)
    assert said == [1]
    assert progress.pictures == 0
    assert files_below(cache) == whole


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("look", [1, 2, 3])
def test_another_repair_may_clear_up_at_any_moment(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """Before any look of this one at what it set aside."""
    whole = files_below(cache)
    flip(cache / numbers("zarr", 1))
    read, asked = json_file.read_json, []

    def read_json(path: Path) -> dict[str, object]:
        if path == commit.backup_path(cache / SHARDS / "000001.json"):
            asked.append(path)
            if len(asked) == look:
                commit.remove_backup(cache, "000001", "zarr")
        return read(path)

    monkeypatch.setattr(json_file, "read_json", read_json)
    repair.run(cache, load_of(pictures))
    assert asked
    assert files_below(cache) == whole


@pytest.mark.slow
def test_two_repairs_at_once(cache: Path, start: Start) -> None:
    whole = files_below(cache)
    for shard in range(4):
        flip(cache / numbers("zarr", shard))
    both = [start("repair", cache, before=SLOW) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0], [each.said for each in both]
    assert files_below(cache) == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_repair_leaves_the_shard_it_had_in_hand(
    cache: Path, start: Start, number: signal.Signals
) -> None:
    whole = files_below(cache)
    for shard in (1, 3):
        flip(cache / numbers("zarr", shard))
    before = files_below(cache)
    running = start("repair", cache, before=SLOW)
    wait_for(lambda: list((cache / SHARDS).glob("000003.zarr.*.tmp")))
    running.signal(number)
    assert running.wait() == 75
    assert running.said.splitlines()[-1].startswith("stopped")
    assert files_below(cache) == {**before, numbers("zarr", 1): whole[numbers("zarr", 1)]}
    assert start("repair", cache).wait() == 0
    assert files_below(cache) == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_copy_keeps_whole_shards_and_continues(
    pictures: Path, tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    source, out = sound(pictures, "zarr"), tmp_path / "copy"
    running = start("copy", source, out, before=SLOW)
    wait_for(lambda: list((out / SHARDS).glob("000001.zarr.*.tmp")))
    running.signal(number)
    assert running.wait() == 75
    assert running.said.splitlines()[-1].startswith("stopped")
    left, whole = files_below(out), files_below(source)
    assert f"{SHARDS}/000000.json" in left
    assert not [name for name in left if "tmp" in name or "lease" in name]
    assert all(whole[name] == data for name, data in left.items())
    assert start("copy", source, out).wait() == 0
    assert files_below(out) == whole


def test_the_command_says_how_many(featcache_command: Callable[..., Ran], cache: Path) -> None:
    for shard in (1, 3):
        flip(cache / numbers("zarr", shard))
    ran = featcache_command("repair", cache, "--json")
    assert [Path(name).stem for name in json.loads(ran.out)["shards"]] == ["000001", "000003"]


# ---------------------------------------------------------------- rows that others count on


def test_a_picture_that_went_bad_takes_no_row_away(
    cache: Path, pictures: Path, tmp_path: Path
) -> None:
    """The rows of a shard stay what they were: those of its old record, or of the parts beside
    it."""
    folder = copy_tree(pictures, tmp_path / "pictures")
    good = (folder / "photo2.jpg").read_bytes()
    (folder / "photo2.jpg").write_bytes(b"xx")
    shard = next(i for i in range(4) if "photo2" in keys_of(cache, i))
    flip(cache / numbers("zarr", shard))
    before = files_below(cache)
    with pytest.raises(UserError, match=r"picture 'photo2' has a row in .* and cannot be used now"):
        repair.run(cache, load_of(folder))
    assert files_below(cache) == before
    (folder / "photo2.jpg").write_bytes(good)
    repair.run(cache, load_of(folder))
    assert files_below(cache) == files_below(sound(pictures, "zarr"))


def test_a_repaired_picture_gets_no_row_in_a_repair(
    cache: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = copy_tree(pictures, tmp_path / "pictures")
    shutil.copy(folder / "photo1.jpg", folder / "half.jpg")
    whole = files_below(cache)
    shard = next(
        i for i in range(4) if "half" in {row["key"] for row in record_of(cache, i)["quarantined"]}
    )
    flip(cache / numbers("zarr", shard))
    repair.run(cache, load_of(folder))
    assert files_below(cache) == whole


def test_an_addition_has_the_rows_of_its_cache(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """A picture that went bad since stops it, with nothing lost; one that was repaired since stays
    without a row."""
    folder = copy_tree(pictures, tmp_path / "pictures")
    good = (folder / "photo2.jpg").read_bytes()
    (folder / "photo2.jpg").write_bytes(b"xx")
    shutil.copy(folder / "photo1.jpg", folder / "half.jpg")

    def add() -> None:
        plan = make_plan(folder, views=2, rows_per_shard=4, levels=(2,))
        job = extend.plan_part(plan, cache)
        assert job is not None
        extract.run(job.plan, job.out, batch_size=4)

    with pytest.raises(UserError, match=r"picture 'photo2' has a row in .* and cannot be used now"):
        add()
    (folder / "photo2.jpg").write_bytes(good)
    add()
    assert verify.verify_cache(cache)[0] == []


def test_other_pictures_under_the_same_keys_are_refused(
    cache: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = copy_tree(pictures, tmp_path / "pictures")
    shutil.copy(folder / "photo0.jpg", folder / "photo2.jpg")
    flip(cache / numbers("zarr", next(i for i in range(4) if "photo2" in keys_of(cache, i))))
    before = files_below(cache)
    with pytest.raises(IdentityError, match="the pictures given are not those of the extraction"):
        repair.run(cache, load_of(folder))
    assert files_below(cache) == before


def test_several_damaged_records_are_repaired_in_one_go(cache: Path, pictures: Path) -> None:
    whole = files_below(cache)
    for shard in (0, 1, 3):
        (cache / SHARDS / f"{shard:06d}.json").write_text("{}")
    assert len(repair.run(cache, load_of(pictures))["shards"]) == 3
    assert files_below(cache) == whole


def test_a_shard_of_other_pictures_is_named(
    photos: Path, tmp_path: Path, featcache_command: Callable[..., Ran]
) -> None:
    """Same teacher, crops and count, another list: each key has its own numbers, and some keys are
    gone."""
    folder = copy_tree(photos, tmp_path / "pictures")
    (folder / "rgba.png").rename(folder / "other.png")
    for name, source in (("a", photos), ("b", folder)):
        extract.run(make_plan(source, rows_per_shard=4), tmp_path / name, batch_size=4)
    shutil.rmtree(tmp_path / "a" / SHARDS / "000002.zarr")
    copy_tree(tmp_path / "b" / SHARDS / "000002.zarr", tmp_path / "a" / SHARDS / "000002.zarr")
    shutil.copy(tmp_path / "b" / SHARDS / "000002.json", tmp_path / "a" / SHARDS / "000002.json")
    ran = featcache_command("verify", tmp_path / "a")
    assert ran.status == 1
    assert "the keys of its shards are not those of its list of pictures" in ran.error
    assert "fixes it" not in ran.error


def record_of(cache: Path, shard: int) -> dict:
    return json_file.read_json(cache / SHARDS / f"{shard:06d}.json")


def keys_of(cache: Path, shard: int) -> list[str]:
    with featcache.open(cache) as opened:
        first = sum(record["rows"] for record in opened.records[:shard])
        return opened.keys[first : first + record_of(cache, shard)["rows"]]
