"""The ledger of a home that several users share: who may write and read, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featcache.catalog import home, ledger

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root can be two users")
USERS = (12345, 12346)
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("FEATCACHE_HOME", str(path))
    ledger._note_unreadable.cache_clear()
    return path


def names(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def as_user(uid: int, code: str, **variables: str) -> str:
    """Run Python as another user, who has no rights but everybody's; returns what it prints."""
    script = (
        "import os, sys, logging\n"
        "from featcache.catalog import home, ledger, account, costs\n"
        "from featcache.maintenance import garbage\n"
        "import featcache.catalog.listing\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n{code}\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def open_to_all(place: Path) -> Iterator[Callable[..., None]]:
    """Lets every user come as far as the home, and write into it, until the test ends."""
    shared = Path(tempfile.gettempdir()).resolve()
    own = [folder for folder in place.resolve().parents if shared in folder.parents]
    if any(not folder.stat().st_mode & 0o001 for folder in (shared, *shared.parents)):
        pytest.skip(f"other users cannot reach {shared}")
    before = {folder: folder.stat().st_mode for folder in own}

    def make(mode: int = 0o1777) -> None:
        for folder in own:
            folder.chmod(before[folder] | 0o055)
        place.chmod(mode)

    yield make
    for folder, mode in before.items():
        folder.chmod(mode)


def test_a_home_of_ones_own_has_one_file(place: Path) -> None:
    ledger.log_run(command="train", cache_id="c1", run="r1")
    assert names(place) == ["runs.jsonl"]


def test_a_line_is_written_at_once_after_the_last_whole_line(place: Path) -> None:
    """A torn line stays alone; the next one begins on a line of its own."""
    (place / "runs.jsonl").write_text('{"command": "tra')
    ledger.log_run(command="train", cache_id="c1", run="r1")
    torn, whole = (place / "runs.jsonl").read_text().splitlines()
    assert torn == '{"command": "tra'
    assert json.loads(whole)["run"] == "r1"


def test_a_line_is_never_longer_than_a_reader_takes(place: Path) -> None:
    bad = [{"key": "k" * 100, "reason": "r" * 100}] * 20_000
    ledger.log_run(command="train", cache_id="c1", run="r" * 5000, wall_s=1.5, quarantined=bad)
    (line,) = (place / "runs.jsonl").read_text().splitlines()
    assert len(line) < 1 << 16
    found = json.loads(line)
    assert (found["cache_id"], found["wall_s"], found["shortened"]) == ("c1", 1.5, True)
    assert "quarantined" not in found
    assert len(ledger.runs_of("c1")) == 1


@pytest.mark.parametrize("linked", ["runs.jsonl", "runs.d"])
def test_links_are_refused_to_write_and_to_read(
    place: Path, tmp_path: Path, linked: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    if linked == "runs.jsonl":
        target.write_text("")
        (place / linked).symlink_to(target)
        ledger.log_run(command="train", cache_id="c1", run="r1")
        assert target.read_text() == ""
        assert "cannot be written" in caplog.text
    else:
        target.mkdir()
        (target / "7.jsonl").write_text("")
        (place / linked).symlink_to(target)
    found = ledger.problem()
    assert found is not None
    assert "no cache is known to be unused" in found[1]


def test_a_user_file_that_is_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("{}\n")
    (place / "runs.d").mkdir()
    (place / "runs.d/7.jsonl").symlink_to(tmp_path / "target")
    found = ledger.problem()
    assert found is not None
    assert found[0] == place / "runs.d/7.jsonl"
    assert "link" in found[1] or "levels of symbolic links" in found[1]


def test_the_files_of_all_users_are_merged_by_time(place: Path) -> None:
    (place / "runs.d").mkdir()
    for name, times in (("runs.jsonl", "15"), ("runs.d/7.jsonl", "24"), ("runs.d/8.jsonl", "3")):
        (place / name).write_text(
            "".join(
                json.dumps({"time": f"2026-0{t}", "command": "train", "cache_id": "c", "run": t})
                + "\n"
                for t in times
            )
        )
    (place / "runs.d/note.txt").write_text("no ledger")
    assert [run["run"] for run in ledger.runs_of("c")] == ["1", "2", "3", "4", "5"]
    assert ledger.last_uses().get("c") == "2026-05"
    assert ledger.problem() is None


def test_a_use_is_seen_from_the_moment_a_run_begins_and_is_no_run(place: Path) -> None:
    (place / "runs.jsonl").touch()
    ledger.log_use(place / "one", cache_id="c", run="r1")
    assert ledger.runs_of("c") == []
    assert ledger.last_uses().get("c") is not None
    assert json.loads((place / "runs.jsonl").read_text())["command"] == "use"


def test_a_use_goes_to_the_home_that_the_cache_lies_in(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "runs.jsonl").touch()
    (other / "one").mkdir()
    (tmp_path / "link").symlink_to(other)
    ledger.log_use(tmp_path / "link/one", cache_id="c", run="r1")
    assert json.loads((other / "runs.jsonl").read_text())["cache_id"] == "c"
    assert names(place) == []


def test_a_use_of_a_cache_in_no_home_is_noted_at_home(place: Path, tmp_path: Path) -> None:
    """No ledger is made in a stranger's folder."""
    (tmp_path / "shared/one").mkdir(parents=True)
    ledger.log_use(tmp_path / "shared/one", cache_id="c", run="r1")
    assert names(tmp_path / "shared") == []
    assert ledger.last_uses().get("c") is not None


def test_further_homes_are_read_and_each_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    line = {"time": "2026-01", "command": "train", "cache_id": "c", "run": "r1"}
    (other / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert ledger.last_uses().get("c") is None
    monkeypatch.setenv("FEATCACHE_LEDGERS", f"{other}:{place}:{other}/")
    assert [run["run"] for run in ledger.runs_of("c")] == ["r1"]
    assert ledger.problem() is None


@pytest.mark.parametrize("named", ["missing", "empty"])
def test_a_further_home_without_a_ledger_makes_no_cache_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("FEATCACHE_LEDGERS", str(tmp_path / named))
    found = ledger.problem()
    assert found is not None
    assert found[0] == tmp_path / named
    assert "no cache is known to be unused" in found[1]


# ------------------------------------------------------------ two users


@pytest.mark.slow
@as_root
def test_two_users_of_one_home_write_their_own_files_and_see_each_other(
    place: Path, open_to_all: Callable[..., None]
) -> None:
    open_to_all()
    ledger.log_run(command="train", cache_id="c", run="root")
    for uid in USERS:
        # a umask that shuts others out is no reason to lose a use
        told = as_user(
            uid, f"os.umask(0o077); ledger.log_run(command='train', cache_id='c', run='{uid}')"
        )
        assert told == ""
    assert names(place) == ["runs.d/12345.jsonl", "runs.d/12346.jsonl", "runs.jsonl"]
    assert {run["run"] for run in ledger.runs_of("c")} == {"root", "12345", "12346"}
    seen = as_user(USERS[0], "print(len(ledger.runs_of('c')), ledger.problem())")
    assert seen == "3 None\n"
    status = (place / "runs.d").stat()
    assert stat.S_IMODE(status.st_mode) == 0o1777
    # sticky: neither can remove what the other wrote
    refused = as_user(
        USERS[0],
        f"try:\n    os.unlink({str(place / 'runs.d/12346.jsonl')!r})\n"
        "except PermissionError:\n    print('refused')",
    )
    assert refused == "refused\n"


@as_root
def test_an_unreadable_ledger_of_another_makes_no_cache_unused(
    place: Path, open_to_all: Callable[..., None]
) -> None:
    open_to_all()
    (place / "runs.d").mkdir()
    (place / "runs.d/7.jsonl").write_text("")
    (place / "runs.d/7.jsonl").chmod(0o600)
    told = as_user(
        USERS[0],
        "found = garbage.find(0)\nprint(found.unused)\nprint(*found.left.items())",
    )
    assert told.splitlines()[0] == "[]"
    assert "runs.d/7.jsonl" in told
    assert "Permission denied; no cache is known to be unused" in told


@as_root
def test_a_home_that_a_user_may_not_write_is_told_and_stops_nothing(
    place: Path, open_to_all: Callable[..., None]
) -> None:
    open_to_all(0o755)
    told = as_user(USERS[0], "ledger.log_run(command='train', cache_id='c', run='r')")
    assert "cannot be written: Permission denied" in told
    assert names(place) == []


@as_root
def test_a_folder_for_users_is_enough_where_the_home_is_its_owners(
    place: Path, open_to_all: Callable[..., None]
) -> None:
    open_to_all(0o755)
    (place / "runs.d").mkdir()
    (place / "runs.d").chmod(0o1777)
    assert as_user(USERS[0], "ledger.log_run(command='train', cache_id='c', run='r')") == ""
    assert [run["run"] for run in ledger.runs_of("c")] == ["r"]


@pytest.mark.slow
@as_root
def test_a_use_of_another_users_cache_is_seen_in_that_home(
    place: Path, tmp_path: Path, open_to_all: Callable[..., None]
) -> None:
    """A run whose home is another leaves its mark where the cache lies, or says that it cannot."""
    open_to_all(0o755)
    ledger.log_run(command="extract")
    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, USERS[0], USERS[0])
    use = f"from pathlib import Path; ledger.log_use(Path({str(place / 'one')!r}), cache_id='c')"
    told = as_user(USERS[0], use, FEATCACHE_HOME=str(own))
    assert "cannot be noted" in told
    assert "`featcache gc --unused` there does not know of it" in told
    (place / "runs.d").mkdir()
    (place / "runs.d").chmod(0o1777)
    assert as_user(USERS[0], use, FEATCACHE_HOME=str(own)) == ""
    assert ledger.last_uses().get("c") is not None


@as_root
def test_a_file_that_another_put_in_a_users_place_is_not_written(
    place: Path, open_to_all: Callable[..., None]
) -> None:
    open_to_all()
    (place / "runs.d").mkdir()
    (place / "runs.d").chmod(0o1777)
    planted = place / "runs.d/12345.jsonl"
    planted.write_text("")
    planted.chmod(0o666)
    os.chown(planted, USERS[1], USERS[1])
    told = as_user(USERS[0], "ledger.log_run(command='train', cache_id='c', run='r')")
    assert "cannot be written" in told
    assert planted.read_text() == ""


def test_home_append_is_one_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[int]()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(len(data)) or real(fd, data))
    home.append(place / "lines", "x" * 100_000 + "\n")
    assert written == [100_001]


def test_a_link_in_place_of_the_new_folder_is_not_followed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write the home may put one there at any moment."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    place.chmod(0o777)
    make = Path.mkdir

    def swapped(self: Path, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if self.name == ledger.USERS:
            self.rmdir()
            self.symlink_to(private)

    monkeypatch.setattr(Path, "mkdir", swapped)
    ledger.log_run(command="train")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not any(private.iterdir())


def test_a_file_of_that_name_of_another_program_is_left_alone(tmp_path: Path, place: Path) -> None:
    """Beside a cache may lie somebody's own runs.jsonl."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "runs.jsonl").write_text('{"my": "experiment"}\n')
    ledger.log_use(other / "cache", cache_id="c")
    assert (other / "runs.jsonl").read_text() == '{"my": "experiment"}\n'
    assert [
        json.loads(line)["command"] for line in (place / "runs.jsonl").read_text().splitlines()
    ] == ["use"]
    (other / "runs.jsonl").write_text("")  # an owner's, who has shared it and not begun
    ledger.log_use(other / "cache", cache_id="c")
    assert json.loads((other / "runs.jsonl").read_text())["command"] == "use"
