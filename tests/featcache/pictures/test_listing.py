"""Folders are listed whole: through links, without hidden files, and what is passed over is
counted."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.pictures import listing
from featcache.pictures.folder import FolderSource
from featcache.pictures.open_source import open_source
from featcache.pictures.passed_over import passed_over
from featcache.pictures.regular_file import LARGEST_BYTES
from featcache.pictures.source import PictureError
from tests.conftest import SYNTHETIC, Ran
from tests.featcache.pictures.test_open_source import PNG, write_folder, write_tar


def reasons(spec: object) -> dict[str, tuple[int, str]]:
    """What opening a source passes over: reason -> (count, first)."""
    return {row.reason: (row.count, row.first) for row in passed_over(open_source(str(spec)))}


def test_a_class_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As permissions, a failing disk (EIO) and a stale NFS handle do it; root may list anything."""
    write_folder(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("/b"):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match=r"b' cannot be listed: Stale file handle") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_links_to_folders_and_files_elsewhere_are_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "far", "cats/1.png", "one.jpg")
    write_folder(tmp_path / "src", "dog/2.png")
    (tmp_path / "src/cat").symlink_to(tmp_path / "far/cats")
    (tmp_path / "src/dog/3.jpg").symlink_to("../../far/one.jpg")
    (tmp_path / "src/same").symlink_to("dog")  # a second name of a class
    source = open_source(tmp_path / "src")
    assert list(source.keys) == ["cat/1", "dog/2", "dog/3", "same/2", "same/3"]
    assert passed_over(source) == ()


def test_links_upward_are_not_followed(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/here").symlink_to(".")
    assert list(open_source(tmp_path).keys) == ["a/1", "b/2"]
    assert reasons(tmp_path) == {"links to a folder they lie in": (3, "a/up")}


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    """Two are shown under each other; of many that all link to all there would be no end."""
    write_folder(tmp_path / "two", "a/1.png", "b/2.png")
    (tmp_path / "two/a/b").symlink_to("../b")
    (tmp_path / "two/b/a").symlink_to("../a")
    assert list(open_source(tmp_path / "two").keys) == ["a/1", "a/b/2", "b/2", "b/a/1"]
    names = [f"n{i}" for i in range(9)]
    write_folder(tmp_path / "many", *(f"{name}/x.png" for name in names))
    for name in names:
        for other in names:
            (tmp_path / "many" / name / other).symlink_to(f"../{other}")
    with pytest.raises(UserError, match="more than 64 links lead to it"):
        open_source(tmp_path / "many")


def test_what_is_no_file_and_links_that_lead_nowhere_are_said(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path / "a")  # names of sockets are short
        listening.bind("socket.png")
        os.chdir(here)
        os.mkfifo(tmp_path / "a/control")  # no suffix of a picture: not a word
        (tmp_path / "a/gone.jpg").symlink_to("nothing.jpg")
        (tmp_path / "a/self.jpg").symlink_to("self.jpg")
        (tmp_path / "b").symlink_to("/nowhere/b")  # a class
        assert list(open_source(tmp_path).keys) == ["a/1"]
        assert reasons(tmp_path) == {
            "links that lead nowhere": (3, "a/gone.jpg"),
            "named pipes, sockets or devices": (2, "a/pipe.jpg"),
        }


def test_a_file_that_becomes_a_pipe_is_an_error_and_no_wait(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="no regular file"):
        source.read(0)


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.tif").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    with pytest.raises(PictureError, match="2000000001 bytes"):
        open_source(tmp_path).read(0)


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    names = ["._1.png", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/._1.png", "@eaDir/1.png"]
    write_folder(tmp_path, "a/1.png", ".DS_Store", "a/Thumbs.db", *(f"a/{name}" for name in names))
    assert list(open_source(tmp_path).keys) == ["a/1"]
    assert reasons(tmp_path) == {"hidden pictures": (4, "a/._1.png")}
    assert list(open_source(write_folder(tmp_path / ".root", "b.png")).keys) == ["b"]


def test_a_hidden_folder_that_cannot_be_listed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk's own lost+found is no reason to stop."""
    write_folder(tmp_path, "a/1.png", "lost+found/x.png", ".git/y.png")
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert reasons(tmp_path) == {
        "hidden folders that cannot be listed": (1, "lost+found"),
        "hidden pictures": (1, ".git/y.png"),
    }


def test_a_first_name_that_is_no_text_can_be_written_as_json(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png")
    with open(bytes(tmp_path) + b"/a/\xff.gif", "wb"):  # noqa: PTH123 (a name in bytes)
        pass
    assert reasons(tmp_path) == {"files with other suffixes": (1, "a/\\udcff.gif")}


def test_a_class_folder_without_a_file_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    assert reasons(tmp_path) == {"empty folders": (1, "b")}


def test_other_suffixes_are_counted_but_not_companions(tmp_path: Path) -> None:
    others = ["a/x.gif", "a/y.heic", "a/z.JFIF", "notes.txt", "a/features.npy"]
    companions = ["README.md", "LICENSE", "classes.json", "a/1.txt", "a/1.png.json"]
    write_folder(tmp_path, "a/1.png", "a/2.PNG", *others, *companions)
    assert list(open_source(tmp_path).keys) == ["a/1", "a/2"]
    assert reasons(tmp_path) == {"files with other suffixes": (5, "a/features.npy")}


def test_tars_beside_pictures_and_files_beside_tars(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.png")
    write_tar(tmp_path / "x.tar", {"k.png": PNG})
    assert reasons(tmp_path) == {
        "tars beside or below a folder's pictures or tars": (1, "x.tar"),
    }
    (tmp_path / "a/1.png").rename(tmp_path / "y.tar.gz")
    (tmp_path / "a").rmdir()
    write_folder(tmp_path, "x.idx", "classes.json")
    assert list(open_source(tmp_path).keys) == ["k"]
    assert reasons(tmp_path) == {"files with other suffixes": (1, "y.tar.gz")}


def test_a_folder_without_pictures_says_what_it_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/x.gif", "a/y.gif")
    with pytest.raises(UserError, match=r"passed over files with other suffixes \(2, .*'a/x\.gif'"):
        open_source(tmp_path)


def test_opening_notes_it_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, "a/1.png", "a/x.gif", "a/.y.png")
    open_source(tmp_path)
    assert caplog.messages == [
        f"pictures {str(tmp_path)!r}: passed over files with other suffixes (1, the first is "
        "'a/x.gif'), hidden pictures (1, the first is 'a/.y.png')"
    ]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_extraction_says_it_once_and_in_its_json(
    featcache_command: Callable[..., Ran], tmp_path: Path, more: tuple[str, ...]
) -> None:
    folder = write_folder(tmp_path / "src", "a/1.png", "a/x.gif")
    options = ("--teacher", SYNTHETIC, "--levels", "last:1", "--images", folder, "--json", *more)
    ran = featcache_command("extract", *options, "--out", tmp_path / "c")
    assert ran.status == 0
    assert ran.err.count("passed over files with other suffixes (1") == 1
    assert json.loads(ran.out)["passed_over"] == [
        {"reason": "files with other suffixes", "count": 1, "first": "a/x.gif"}
    ]


def test_files_are_not_looked_at_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network disk a stat a file would take minutes; the folder's own listing says what they
    are."""
    write_folder(tmp_path, *(f"c{i}/{j}.png" for i in range(3) for j in range(20)))
    looked: list[object] = []
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda self, **way: (looked.append(self), stat(self, **way))[1]
    )
    listing.list_folder(str(tmp_path))
    assert len(looked) == 4  # the folders


NAMES = st.lists(
    st.text(st.sampled_from("aB.é -%"), min_size=1, max_size=6)
    .map(lambda stem: stem + ".png")
    .filter(lambda name: not name.startswith(".")),
    min_size=1, max_size=8, unique=True,
)  # fmt: skip


@given(names=NAMES)
def test_order_and_keys_are_those_of_sorted_paths(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = write_folder(tmp_path_factory.mktemp("names"), *(f"c/{name}" for name in names))
    source = open_source(root)
    assert isinstance(source, FolderSource)
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert source.files == found
    assert source.keys == [file[: -len(".png")] for file in found]
