"""`rm` and `gc` delete nothing that is not provably a cache's own, and never through a link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.extraction import extend, extract
from featcache.storage import belongings, json_file, manifest
from featcache.storage.owner import writer_id
from tests.conftest import Ran, files_below, flip, make_photos, make_plan

Command = Callable[..., Ran]


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def origin(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A cache of three shards with a level added to it, whose teacher has a file beside it."""
    photos = make_photos(tmp_path_factory.mktemp("home") / "pictures")
    out = photos.parent / "origin"
    extract.run(make_plan(photos, store=request.param), out, batch_size=4)
    part = extend.plan_part(make_plan(photos, store=request.param, levels=(1, 2, 3)), out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return out


@pytest.fixture
def cache(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "home/one"))


@pytest.fixture
def dead() -> str:
    """A writer of this host that has ended."""
    return writer_id().replace(f"-{os.getpid()}-", "-99999999-")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    return path


def test_all_that_an_extraction_writes_is_a_caches_own(origin: Path) -> None:
    assert list(belongings.foreign(origin)) == []


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex", ".hidden", "README.md", "notes/thesis.tex", "shards/notes.txt", "empty/",
        "shards/000000.zarr.txt", "shards/000009.lease", "shards/thesis.bad", "parts/thesis.tex",
        "parts/mine/thesis.tex", "shards/000000.STORE/thesis.tex", "shards/000000.STORE/a/b/c",
        "shards/000000.STORE.bad/thesis.tex", ".mybackup.tmp", ".thesis.OWNER.tmp",
        "shards/000000.STORE.OWNER.tmp/thesis.tex", "shards/thesis.OWNER.tmp/thesis.tex",
        ".old.OWNER.tmp/thesis.tex", "manifest.json~", "quarantine.json/thesis.tex",
    ],
)  # fmt: skip
def test_rm_refuses_a_cache_with_a_strangers_file(
    featcache_command: Command, cache: Path, dead: str, name: str
) -> None:
    store = manifest.read(cache)["identity"]["store"]
    name = name.replace("STORE", store).replace("OWNER", dead)
    if name.endswith("/"):
        (cache / name).mkdir()
    else:
        put(cache / name)
    before = files_below(cache)
    ran = featcache_command("rm", cache, "--yes")
    assert (ran.status, "did not write: " in ran.error) == (1, True)
    assert str(Path(name)).split("/")[-1] in ran.error or name.split("/")[-2] in ran.error
    assert files_below(cache) == before
    assert not list(cache.parent.glob(".one.*"))


def test_rm_of_an_addition_refuses_what_is_in_it(featcache_command: Command, cache: Path) -> None:
    (part,) = (cache / "parts").iterdir()
    put(part / "thesis.tex")
    assert "'thesis.tex'" in featcache_command("rm", part, "--yes").error
    error = featcache_command("rm", cache, "--yes").error
    assert f"'parts/{part.name}/thesis.tex'" in error
    (part / "thesis.tex").unlink()
    assert featcache_command("rm", part, "--yes").status == 0
    assert featcache_command("rm", cache, "--yes").status == 0


FOREIGN = [
    '{"name": "My web app", "icons": []}', "", "[]", "{}", "null", "\x00", "[" * 10**5,
    '{"format": 3}', '{"format": 3, "id": "x", "identity": {}, "provenance": {}, "arrays": {}, '
    '"shards": [], "files": {}, "checksum": "0"}',
]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN, ids=range(len(FOREIGN)))
def test_rm_refuses_a_manifest_of_another_program(
    featcache_command: Command, tmp_path: Path, text: str
) -> None:
    app = tmp_path / "webapp"
    put(app / "src/thesis.tex")
    (app / "manifest.json").write_text(text)
    ran = featcache_command("rm", app, "--yes")
    assert (ran.status, "left as it is" in ran.error) == (1, True)
    assert (app / "src/thesis.tex").is_file()


def test_rm_refuses_where_manifest_and_copy_are_damaged(
    featcache_command: Command, cache: Path
) -> None:
    for name in ("manifest.json", "shards/manifest.copy.json"):
        flip(cache / name, 5)
    before = files_below(cache)
    assert "left as it is" in featcache_command("rm", cache, "--yes").error
    assert files_below(cache) == before


def test_rm_takes_a_cache_whose_copy_alone_is_there(
    featcache_command: Command, cache: Path
) -> None:
    (cache / "manifest.json").unlink()
    assert featcache_command("rm", cache, "--yes").status == 0
    assert not cache.exists()


def test_rm_removes_links_and_not_what_they_point_to(
    featcache_command: Command, cache: Path, tmp_path: Path
) -> None:
    store = manifest.read(cache)["identity"]["store"]
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in (f"shards/000001.{store}", "shards/000002.json", "quarantine.json"):
        kept = disk / Path(name).name
        if (cache / name).exists():
            (cache / name).rename(kept)
        else:
            put(kept)
        (cache / name).symlink_to(kept)
    put(disk / f"000001.{store}/thesis.tex")
    before = files_below(disk)
    assert featcache_command("rm", cache, "--yes").status == 0
    assert not cache.exists()
    assert files_below(disk) == before
    assert len(before) > 3


def test_rm_leaves_what_was_put_in_while_it_asked(
    featcache_command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.commands import rm

    monkeypatch.setattr(rm, "_agreed", lambda sizes: bool(put(cache / "thesis.tex")))
    assert "'thesis.tex'" in featcache_command("rm", cache).error
    assert (cache / "thesis.tex").is_file()
    assert (cache / "manifest.json").is_file()


# ---------------------------------------------------------------- gc


@pytest.mark.parametrize("yes", [True, False])
def test_gc_leaves_what_has_not_our_whole_name(
    featcache_command: Command, cache: Path, yes: bool
) -> None:
    home = cache.parent
    for name in (
        ".mybackup.tmp/data", ".notes.tmp", "one/.notes.tmp", "one/notes.tmp", "one/shards/a.tmp",
        "one/shards/000000.zarr.tmp/data", "one/shards/thesis.bad", "one/shards/000000.thesis.bad",
        "one/shards/000000.lease.old", "one/shards/thesis.lease", "app/manifest.json", "app/.x.tmp",
        "one/shards/000001.lease",
    ):  # fmt: skip
        put(home / name)
    for path in home.rglob("*"):
        os.utime(path, (0, 0))
    before = files_below(home)
    ran = featcache_command("gc", *(["--yes"] if yes else []))
    assert ran.status == 0, ran.err
    assert files_below(home) == before
    assert f"left {home}/app: " in ran.out  # its manifest is of another program


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "name",
    [
        ".thesis.OWNER.tmp", ".thesis.OWNER.tmp/thesis.tex", ".one.OWNER.tmp/thesis.tex",
        "one/.thesis.OWNER.tmp/thesis.tex", "one/.thesis.tex.OWNER.tmp",
        "one/shards/000000.STORE.OWNER.tmp/thesis.tex", "one/shards/thesis.STORE.OWNER.tmp/v0.tar",
        "one/shards/000000.STORE.bad/thesis.tex", "one/shards/000000.thesis.OWNER.tmp",
    ],
)  # fmt: skip
def test_gc_leaves_and_tells_what_has_our_name_and_other_content(
    featcache_command: Command, cache: Path, dead: str, name: str
) -> None:
    store = manifest.read(cache)["identity"]["store"]
    path = put(cache.parent / name.replace("STORE", store).replace("OWNER", dead))
    ran = featcache_command("gc", "--yes", "--json")
    facts = json.loads(ran.out)
    assert (ran.status, facts["leftovers"], facts["removed"]) == (0, {}, [])
    assert path.read_text() == "precious"
    if "/" in name:
        assert any(str(path).startswith(left) for left in facts["left"])


def test_gc_ends_what_rm_left_and_nothing_a_link_points_to(
    featcache_command: Command, cache: Path, dead: str, tmp_path: Path
) -> None:
    elsewhere = put(tmp_path / "elsewhere/thesis.tex").parent
    gone = cache.rename(cache.with_name(f".one.{dead}.tmp"))
    shutil.rmtree(gone / "shards")
    (gone / "shards").symlink_to(elsewhere)
    (cache.parent / f".two.{dead}.tmp").symlink_to(elsewhere)
    (cache.parent / f".three.{dead}.tmp").mkdir()  # the very last of a removal
    ran = featcache_command("gc", "--yes", "--json")
    removed = {Path(path).name for path in json.loads(ran.out)["removed"]}
    assert removed == {f".one.{dead}.tmp", f".three.{dead}.tmp"}
    assert (elsewhere / "thesis.tex").is_file()
    assert (cache.parent / f".two.{dead}.tmp").is_symlink()


def test_gc_without_a_terminal_lists_removes_nothing_and_says_what_to_do(
    featcache_command: Command, cache: Path, dead: str
) -> None:
    left = put(cache / f".manifest.json.{dead}.tmp")
    ran = featcache_command("gc")
    assert (ran.status, left.exists()) == (2, True)
    assert f"would remove {left}: 8 B" in ran.out
    assert "--yes" in ran.error
    assert json.loads(featcache_command("gc", "--json").out)["leftovers"] == {str(left): 8}
    assert featcache_command("gc", "--dry-run").status == 0
    assert featcache_command("gc", "--dry-run", "--yes").status == 0
    assert left.exists()
    assert featcache_command("gc", "--yes").status == 0
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_gc_asks_at_a_terminal(cache: Path, dead: str, answer: str, stays: bool) -> None:
    import pty

    left = put(cache / f".manifest.json.{dead}.tmp")
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    ran = subprocess.run(
        [sys.executable, "-m", "featcache", "gc"], stdin=theirs, capture_output=True, text=True,
        env={**os.environ, "FEATCACHE_HOME": str(cache.parent)}, check=False, timeout=60,
    )  # fmt: skip
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == 0, ran.stderr
    assert f"leftover {left}: 8 B\nremove 1 leftover(s), 8 B?" in ran.stderr
    assert left.exists() == stays


def test_gc_takes_no_lease_that_was_taken_over_while_it_asked(
    featcache_command: Command, cache: Path, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.commands import gc

    lease = cache / "shards/000001.lease"
    lease.write_text(dead)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(gc, "_agreed", lambda what, sizes: bool(lease.write_text(writer_id())))
    assert f"cannot remove {lease}" in featcache_command("gc").out
    assert lease.is_file()


def test_gc_unused_leaves_a_cache_with_a_strangers_file(
    featcache_command: Command, cache: Path
) -> None:
    put(cache / "thesis.tex")
    for path in cache.rglob("*"):
        os.utime(path, (0, 0))
    facts = json.loads(featcache_command("gc", "--unused", 1, "--yes", "--json").out)
    assert (facts["unused"], facts["removed"]) == ({}, [])
    assert "'thesis.tex'" in facts["left"][str(cache)]


def test_repair_leaves_strangers_files(featcache_command: Command, cache: Path, dead: str) -> None:
    store = manifest.read(cache)["identity"]["store"]
    kept = [
        put(cache / name)
        for name in (
            ".notes.tmp", "shards/000000.thesis.bad", f"shards/000000.{store}.{dead}.tmp/thesis.tex"
        )
    ]  # fmt: skip
    ours = put(cache / f".manifest.json.{dead}.tmp")
    about = json_file.read_json(cache / "manifest.json")
    flip(cache / "manifest.json", 5)
    assert featcache_command("repair", cache).status == 0
    assert json_file.read_json(cache / "manifest.json") == about
    assert all(path.is_file() for path in kept)
    assert not ours.exists()


def test_repair_removes_no_folder_in_the_place_of_a_file(
    featcache_command: Command, cache: Path
) -> None:
    thesis = put(cache / "quarantine.json/thesis.tex")
    flip(cache / "manifest.json", 5)
    featcache_command("repair", cache)
    assert thesis.is_file()


def test_gc_and_rm_follow_no_link_in_the_place_of_a_folder(
    featcache_command: Command, cache: Path, dead: str, tmp_path: Path
) -> None:
    disk = (cache / "shards").rename(tmp_path / "disk")
    (cache / "shards").symlink_to(disk)
    put(disk / f".000000.json.{dead}.tmp")
    (disk / "000001.lease").write_text(dead)
    before = files_below(disk)
    featcache_command("gc", "--yes")
    assert files_below(disk) == before
    assert featcache_command("rm", cache, "--yes").status == 0
    assert files_below(disk) == before
