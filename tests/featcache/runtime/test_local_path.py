"""Paths of other places are refused in one line, and `~` is a home folder, wherever a path is
given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import featcache
from featcache.catalog import home, ledger
from featcache.cli import cli as featcache_cli
from featcache.errors import UsageError, UserError
from featcache.extraction.options import weights_per_teacher
from featcache.pictures.open_source import open_source
from featcache.runtime.local_path import local_path
from student.cli import cli as student_cli
from tests.conftest import SYNTHETIC, Ran

Command = Callable[..., Ran]
SCHEMES = "s3 gs gcs az abfs hf hdfs http HTTPS file memory zip s3+https"


@pytest.mark.parametrize("scheme", SCHEMES.split())
def test_a_place_elsewhere_is_refused(scheme: str) -> None:
    for text in (f"{scheme}://bucket/name", f"{scheme}:///name", f"{scheme}://"):
        with pytest.raises(UsageError, match="only a local path"):
            local_path(text, "--out")


@pytest.mark.parametrize(
    "text",
    ["a", "./s3://x", "/s3://x", "a b", "s3:x", "s3:/x", "a:b/c", "x{0..3}.tar", "ünï", "://x"],
)
def test_local_paths_stay_as_they_are(text: str) -> None:
    assert local_path(text, "--out") == text


@pytest.mark.parametrize("text", ["", "a\0b", "\0", "~no-such-user-here/x"])
def test_what_can_be_no_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--out"):
        local_path(text, "--out")


def test_tilde_is_a_home_unless_something_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.chdir(tmp_path)
    assert local_path("~/x", "") == "/me/x"
    assert local_path("~root/x", "").endswith("/x")
    assert local_path("a/~/x", "") == "a/~/x"
    (tmp_path / "~backup").touch()
    assert local_path("~backup", "") == "~backup"


def commands() -> list[tuple[list[str], str]]:
    """Each path that a command takes, as words with PATH in its place, and how it is called."""
    extract = ["extract", "--teacher", SYNTHETIC, "--images", "p", "--out", "o"]
    train = ["train", "--recipe", "mae", "--cache", "c", "--out", "o"]
    words = [
        *([name, "PATH"] for name in ("info", "verify", "repair", "rm")),
        ["copy", "PATH", "o"], ["copy", "c", "PATH"], ["convert", "PATH", "o", "--store", "zarr"],
        ["convert", "c", "PATH", "--store", "zarr"], ["pack", "PATH", "o"], ["pack", "p", "PATH"],
        *([*extract, option, "PATH"] for option in (
            "--images", "--out", "--policy", "--weights", "--check-teacher", "--teacher")),
        *(["verify", "c", option, "PATH"] for option in ("--images", "--weights")),
        *(["repair", "c", option, "PATH"] for option in ("--images", "--weights")),
        *([*train, option, "PATH"] for option in (
            "--cache", "--images", "--out", "--config", "--weights", "--policy", "--recipe")),
        ["replay", "PATH"], ["replay", "f", "--recipe", "PATH"], ["eval", "knn", "PATH"],
        *(["eval", "knn", "r", option, "PATH"] for option in ("--images", "--test", "--weights")),
        ["eval", "linear", "--teacher", "PATH"],
    ]  # fmt: skip
    return [(each, " ".join(each[-3:])) for each in words]


@pytest.mark.parametrize(("words", "name"), commands(), ids=[name for _, name in commands()])
def test_every_command_refuses_it_for_every_path(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = student_cli if words[0] in ("train", "replay", "eval") else featcache_cli
    for url in ("hdfs://bucket/x", "s3://B/../x"):  # the second names no bucket
        given = [word.replace("PATH", url) for word in words]
        ran = CliRunner().invoke(cli, given)
        assert isinstance(ran.exception, UsageError), ran.exception
        assert repr(url) in str(ran.exception)
        assert "is no place of this machine" in str(ran.exception) or url.startswith("s3")
        assert "\n" not in str(ran.exception)
    assert list(tmp_path.iterdir()) == []


# which options name what lies on this machine alone
LOCAL_ONLY = (
    "pack p PATH", "extract --images p --policy PATH", "extract --images p --weights PATH",
    "verify c --weights PATH", "train --out PATH", "train --config PATH", "train --policy PATH",
    "train --stage PATH", "replay PATH", "eval knn PATH", "gallery c --out PATH",
)  # fmt: skip


@pytest.mark.parametrize("words", LOCAL_ONLY)
def test_some_paths_are_of_this_machine_alone(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = student_cli if words.split()[0] in ("train", "replay", "eval") else featcache_cli
    ran = CliRunner().invoke(cli, words.replace("PATH", "s3://bucket/x").split())
    assert isinstance(ran.exception, UsageError), ran.exception
    assert "'s3://bucket/x': s3:// is no place of this machine" in str(ran.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_library_refuses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (featcache.open, open_source):
        with pytest.raises(UserError, match="only a local path"):
            act("hdfs://bucket/x")
    with pytest.raises(UserError, match="only a local path"):
        weights_per_teacher(["a=s3://x"], ["a", "b"])


@pytest.mark.parametrize("words", [["ls"], ["gc"]], ids=" ".join)
@pytest.mark.parametrize(
    ("place", "said"),
    [("s3://x", "only a local path"), ("~no-such-user-x", "no such user"), ("file", "is a file")],
)
def test_a_home_that_can_be_none_is_told(
    featcache_command: Command, words: list[str], place: str, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATCACHE_HOME", place)
    ran = featcache_command(*words)
    assert (ran.status, said in ran.error, "FEATCACHE_HOME" in ran.error) == (2, True, True)


def test_a_home_that_can_be_none_does_not_fail_the_work_that_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEATCACHE_HOME", "s3://x")
    ledger.log_run(command="extract")
    (note,) = caplog.messages
    assert "only a local path" in note


def test_an_empty_home_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_HOME", "")
    assert home.home() == Path("caches")
    monkeypatch.setenv("FEATCACHE_HOME", "~/x")
    assert home.home() == Path.home() / "x"


def test_in_a_c_locale_the_line_names_the_cure(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    shutil.copy(photos / "rgb.png", tmp_path / "p/naïve.png")
    code = (
        "import sys; from featcache.pictures.open_source import open_source\n"
        "from featcache.errors import UserError\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_source(path)\n"
        "    except UserError as error: print(error)\n"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p"), str(tmp_path / "ünï")],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    assert all("PYTHONUTF8=1, or LC_ALL=C.UTF-8" in line for line in lines)
