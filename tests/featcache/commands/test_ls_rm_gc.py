"""`ls`, `rm` and `gc`: what they tell of caches in every state, and that they remove nothing else
and nobody's work."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.catalog import ledger
from featcache.extraction import extend, extract
from featcache.storage import commit, json_file, lease, manifest
from featcache.storage import owner as storage_owner
from featcache.storage.store import record_path
from tests.conftest import SYNTHETIC, Ran, files_below, flip, make_photos, make_plan, python

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eleven pictures in three shards; level 2 is added to it."""
    photos = make_photos(tmp_path_factory.mktemp("home") / "pictures")
    out = photos.parent / "origin"
    extract.run(make_plan(photos), out, batch_size=4)
    part = extend.plan_part(make_plan(photos, levels=(1, 2, 3)), out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return out


@pytest.fixture
def cache(origin: Path, tmp_path: Path) -> Path:
    """A copy below the home that `featcache_command` works in."""
    return Path(shutil.copytree(origin, tmp_path / "home/one"))


@pytest.fixture(scope="module")
def dead() -> str:
    """The writer of a process that has ended."""
    code = "from featcache.storage.owner import writer_id; print(writer_id())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def part_of(cache: Path) -> Path:
    return next((cache / "parts").iterdir())


# ---------------------------------------------------------------- ls


def test_ls_tells_what_there_is(
    featcache_command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = featcache_command("ls", "--json")
    files = [
        facts
        for record in cache.rglob("0*.json")
        for facts in json.loads(record.read_text())["files"].values()
    ]
    about = manifest.read(cache)
    assert json.loads(ran.out) == [
        {
            "path": str(cache),
            "id": about["id"],
            "teacher": SYNTHETIC,
            "pictures": 11,
            "views": 3,
            "levels": [1, 2, 3],
            "codec": "fp16",
            "store": "zarr",
            "format": 4,
            "compression": "",
            "tokens": "raster",
            "bytes": sum(facts["bytes"] for facts in files),
            "shards": 3,
            "shards_complete": 3,
            "parts": 1,
            "parts_complete": 1,
            "last_used": None,
            "random_weights": False,
        }
    ]
    ledger.log_run(command="train", recipe="mae", cache_id=about["id"])
    head, row = featcache_command("ls").out.splitlines()
    assert re.split(r"  +", head)[:3] == ["path", "id", "teacher"]
    for word in (
        str(cache),
        about["id"],
        "11 x 3",
        "1,2,3",
        "fp16 zarr raster",
        "100 %",
        f"{time.gmtime().tm_year}-",
    ):
        assert word in row


def test_ls_and_info_tell_an_archive(
    featcache_command: Command, cache: Path, tmp_path: Path
) -> None:
    featcache_command("copy", cache, tmp_path / "home/cold", "--compress")
    lines = featcache_command("ls").out.splitlines()
    assert ["fp16 zarr raster archive" in line for line in lines] == [False, True, False]
    assert "zarr store, format 4 (archive)" in featcache_command("info", tmp_path / "home/cold").out
    assert "archive" not in featcache_command("info", cache).out


def test_ls_of_an_empty_home_says_where_it_looked(
    featcache_command: Command, tmp_path: Path
) -> None:
    ran = featcache_command("ls")
    assert (ran.status, ran.out) == (
        0,
        f"no caches below {str(tmp_path / 'home')!r}; FEATCACHE_HOME names the folder\n",
    )
    assert featcache_command("ls", "--json").out == "[]\n"


def test_ls_rounds_what_is_incomplete_down(featcache_command: Command, cache: Path) -> None:
    record_path(cache, "000001").unlink()
    record_path(part_of(cache), "000001").unlink()
    assert "66 % + unfinished addition" in featcache_command("ls").out


def test_ls_names_damaged_caches_beside_the_good(
    featcache_command: Command, cache: Path, tmp_path: Path
) -> None:
    for name, damaged in (("bad1", "manifest.json"), ("bad2", "shards/000000.json")):
        flip(Path(shutil.copytree(cache, tmp_path / "home" / name)) / damaged, 5)
    (tmp_path / "home/bad3").mkdir()
    (tmp_path / "home/bad3/manifest.json").write_text("{}")
    (tmp_path / "home/none").mkdir()
    ran = featcache_command("ls")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == [
        "path",
        str(cache),
        *(f"{tmp_path}/home/bad{i}:" for i in (1, 2, 3)),
    ]
    assert all("is damaged" in line for line in ran.out.splitlines()[2:])
    damaged = {
        Path(facts["path"]).name
        for facts in json.loads(featcache_command("ls", "--json").out)
        if "damaged" in facts
    }
    assert damaged == {"bad1", "bad2", "bad3"}


def test_ls_marks_random_weights(featcache_command: Command, cache: Path) -> None:
    about = manifest.read(cache)
    about["provenance"]["weights"] = "random:3"
    json_file.write_json(cache / "manifest.json", about)
    assert "RANDOM WEIGHTS" in featcache_command("ls").out


def test_ls_gc_and_rm_need_no_torch(cache: Path, tmp_path: Path) -> None:
    code = "import sys; from featcache.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules and 'zarr' not in sys.modules"
    for words in (["ls"], ["gc"], ["rm", cache, "--yes"]):
        ran = python(code, *words, FEATCACHE_HOME=str(tmp_path / "home"))
        assert ran.returncode == 0, ran.stderr


# ---------------------------------------------------------------- rm


def test_rm_removes_the_whole_cache_and_says_how_much(
    featcache_command: Command, cache: Path, tmp_path: Path
) -> None:
    count = sum(map(len, files_below(cache).values()))
    ran = featcache_command("rm", cache, "--yes", "--json")
    assert json.loads(ran.out) == {"removed": {str(cache): count}, "freed": count}
    assert list((tmp_path / "home").iterdir()) == []


def test_rm_needs_yes_without_a_terminal(featcache_command: Command, cache: Path) -> None:
    ran = featcache_command("rm", cache)
    assert (ran.status, "--yes" in ran.error) == (2, True)
    assert cache.is_dir()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("answer", "left"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_rm_asks_at_a_terminal(cache: Path, tmp_path: Path, answer: str, left: bool) -> None:
    import pty

    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    words = [sys.executable, "-m", "featcache", "rm", str(cache)]
    ran = subprocess.run(
        words, stdin=theirs, capture_output=True, text=True, check=False, timeout=60
    )
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == 0, ran.stderr
    assert "remove 1 folder(s), " in ran.stderr
    assert cache.is_dir() == left
    assert ("nothing removed" in ran.stderr) == left


def test_rm_refuses_before_it_removes_anything(
    featcache_command: Command, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/main.tex").write_text("")
    ran = featcache_command("rm", cache, tmp_path / "thesis", "--yes")
    assert (ran.status, "holds no manifest.json" in ran.error) == (1, True)
    (tmp_path / "link").symlink_to(cache)
    assert (
        f"is a link to {str(cache)!r}" in featcache_command("rm", tmp_path / "link", "--yes").error
    )
    assert cache.is_dir()
    assert featcache_command("rm").status == 2


@pytest.mark.parametrize("where", ["base", "addition"])
def test_rm_refuses_what_somebody_writes_into(
    featcache_command: Command, cache: Path, where: str
) -> None:
    held = lease.acquire(cache if where == "base" else part_of(cache), "000001")
    assert held is not None
    ran = featcache_command("rm", cache, "--yes")
    assert (ran.status, "is being written: shard 000001 is held" in ran.error) == (1, True)
    held.release()
    assert featcache_command("rm", cache, "--yes").status == 0
    assert not cache.exists()


def test_rm_looks_first_whether_it_may(
    featcache_command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, access = files_below(cache.parent), os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "shards" and access(path, mode)
    )
    ran = featcache_command("rm", cache, "--yes")
    assert ran.status == 1
    assert f"'{cache.resolve()}/shards': permission denied, nothing removed" in ran.error
    assert files_below(cache.parent) == before


def test_rm_that_fails_on_the_way_says_where_the_rest_lies(
    featcache_command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", f"{path}/manifest.json")

    monkeypatch.setattr(shutil, "rmtree", refused)
    ran = featcache_command("rm", cache, "--yes")
    assert ran.status == 1
    (left,) = cache.parent.glob(f".{cache.name}.*.tmp")
    assert str(left) in ran.error
    assert "`featcache gc`" in ran.error


def test_rm_takes_a_damaged_cache_and_one_a_dead_process_left(
    featcache_command: Command, cache: Path, dead: str
) -> None:
    flip(cache / "manifest.json", 5)
    (cache / "shards/000002.lease").write_text(dead)
    assert featcache_command("rm", cache, "--yes").status == 0
    assert not cache.exists()


def test_rm_of_an_addition_leaves_its_cache(
    featcache_command: Command, cache: Path, origin: Path
) -> None:
    assert featcache_command("rm", part_of(cache), "--yes").status == 0
    kept = {
        name: data for name, data in files_below(origin).items() if not name.startswith("parts/")
    }
    assert files_below(cache) == kept
    assert json.loads(featcache_command("ls", "--json").out)[0]["levels"] == [1, 3]


def test_a_half_removed_cache_is_none_and_gc_ends_it(
    featcache_command: Command,
    cache: Path,
    dead: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "file")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        assert featcache_command("rm", cache, "--yes").status == 1
    (half,) = (tmp_path / "home").iterdir()
    assert featcache_command("ls", "--json").out == "[]\n"
    assert featcache_command("gc").out.startswith(
        "nothing to remove"
    )  # this process may still be at it
    half.rename(half.with_name(f".one.{dead}.tmp"))
    assert "removed " in featcache_command("gc", "--yes").out
    assert list((tmp_path / "home").iterdir()) == []


# ---------------------------------------------------------------- gc


def litter(cache: Path, owner: str) -> list[Path]:
    """Leave what a process of that name leaves when it dies at every moment at once."""
    shards = [cache / "shards", part_of(cache) / "shards"]
    folders = [folder / f"000001.zarr.{owner}.tmp" for folder in shards]
    for folder in folders:
        folder.mkdir()
        (folder / "features").mkdir()
        (folder / "features/c.0.0.0.0.0").write_bytes(bytes(1000))
    files = [
        cache / f".manifest.json.{owner}.tmp",
        *(folder / f".000000.lease.{owner}.tmp" for folder in shards),
    ]
    for file in files:
        file.write_bytes(bytes(100))
    leases = [folder / "000001.lease" for folder in shards]
    for each in leases:
        each.write_text(owner)
    return sorted([*folders, *files, *leases])


def test_gc_removes_what_dead_processes_left(
    featcache_command: Command, cache: Path, origin: Path, dead: str
) -> None:
    paths = litter(cache, dead)
    expected = {str(path): 1000 if path.is_dir() else path.stat().st_size for path in paths}
    dry = json.loads(featcache_command("gc", "--dry-run", "--json").out)
    assert (dry["leftovers"], dry["removed"], dry["freed"]) == (expected, [], 0)
    assert all(path.exists() for path in paths)
    assert all(
        f"would remove {path}: " in featcache_command("gc", "--dry-run").out for path in paths
    )
    ran = json.loads(featcache_command("gc", "--yes", "--json").out)
    assert (ran["leftovers"], sorted(ran["removed"]), ran["freed"]) == (
        expected,
        sorted(expected),
        sum(expected.values()),
    )
    assert files_below(cache) == files_below(origin)
    assert featcache_command("gc").out == f"nothing to remove below {cache.parent}\n"


def test_gc_leaves_the_work_of_live_processes(featcache_command: Command, cache: Path) -> None:
    litter(cache, storage_owner.writer_id())
    writing = commit.begin_shard(cache, "000002", "zarr")
    before = files_below(cache)
    assert featcache_command("gc").out.startswith("nothing to remove")
    assert files_below(cache) == before
    assert writing.is_dir()


def test_gc_removes_shards_that_a_repair_replaced(
    featcache_command: Command, cache: Path, origin: Path
) -> None:
    shutil.copytree(cache / "shards/000000.zarr", cache / "shards/000000.zarr.bad")
    shutil.copy(cache / "shards/000000.json", cache / "shards/000000.json.bad")
    (cache / "shards/000001.json").rename(cache / "shards/000001.json.bad")  # not replaced yet
    ran = json.loads(featcache_command("gc", "--yes", "--json").out)
    assert {Path(path).name for path in ran["removed"]} == {"000000.zarr.bad", "000000.json.bad"}
    assert (cache / "shards/000001.json.bad").is_file()


@pytest.fixture
def aged(cache: Path) -> Path:
    """The cache, a hundred days old."""
    then = time.time() - 100 * 86400
    for path in cache.rglob("*"):
        os.utime(path, (then, then))
    return cache


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_gc_knows_no_unused_cache_where_the_ledger_cannot_be_read(
    kind: str, featcache_command: Command, aged: Path
) -> None:
    ledger = aged.parent / "runs.jsonl"
    if kind == "folder":
        ledger.mkdir()
    elif kind == "pipe":
        os.mkfifo(ledger)
    else:
        ledger.symlink_to(ledger.name)
    ran = featcache_command("gc", "--unused", 99, "--yes", "--json")
    facts = json.loads(ran.out)
    assert (facts["unused"], facts["removed"]) == ({}, [])
    assert "the run ledger cannot be read" in facts["left"][str(ledger)]
    assert aged.is_dir()


@pytest.mark.slow
def test_gc_unused_lists_and_removes_only_with_yes(
    featcache_command: Command, aged: Path, tmp_path: Path
) -> None:
    fresh = Path(shutil.copytree(aged, tmp_path / "home/two", copy_function=shutil.copy))
    young = json.loads(featcache_command("gc", "--unused", 101, "--json").out)
    assert (young["unused"], young["removed"]) == ({}, [])
    ran = featcache_command("gc", "--unused", 99)
    assert ran.out.splitlines()[0].startswith(f"unused: {aged}: ")
    assert "--yes removes them" in ran.out
    assert (
        "by no `student train` that this home's ledger knows, nor those of FEATCACHE_LEDGERS; "
        "other programs' reading is not noted" in ran.out
    )
    assert "featcache.torch.Dataset" in featcache_command("gc", "--help").out
    for words in (["--dry-run", "--yes"], []):
        assert (
            json.loads(featcache_command("gc", "--unused", 99, "--json", *words).out)["removed"]
            == []
        )
    assert aged.is_dir()
    count = sum(map(len, files_below(aged).values()))
    gone = json.loads(featcache_command("gc", "--unused", 99, "--yes", "--json").out)
    assert (gone["unused"], gone["removed"], gone["freed"]) == (
        {str(aged): count},
        [str(aged)],
        count,
    )
    assert not aged.exists()
    assert fresh.is_dir()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("reason", ["used", "incomplete", "damaged", "held", "new file"])
def test_gc_unused_spares(featcache_command: Command, aged: Path, reason: str) -> None:
    held = None
    if reason == "used":
        ledger.log_run(command="train", cache_id=manifest.read(aged)["id"])
    elif reason == "incomplete":
        record_path(part_of(aged), "000000").unlink()
    elif reason == "damaged":
        flip(aged / "manifest.json", 5)
    elif reason == "held":
        held = lease.acquire(aged, "000000")
        os.utime(aged / "shards/000000.lease", (0, 0))
    else:
        (aged / "shards/note.txt").write_text("")
    ran = json.loads(featcache_command("gc", "--unused", 99, "--yes", "--json").out)
    assert (ran["unused"], ran["removed"]) == ({}, [])
    assert aged.is_dir()
    if held is not None:
        held.release()


def test_gc_of_no_home_is_no_error(featcache_command: Command, tmp_path: Path) -> None:
    ran = featcache_command("gc", "--unused", 0)
    assert (ran.status, ran.out) == (0, f"nothing to remove below {tmp_path / 'home'}\n")
    assert featcache_command("gc", "--unused", -1).status == 2
