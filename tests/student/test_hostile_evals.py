"""What evaluations read and keep comes from an attacker: each command ends well or with one line,
soon, and touches nothing but its own folders.

Kept features are forged with sound checksums; files of names are pipes, or have no end; the disk
becomes full; pictures and numbers are absurd.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastcrc.crc32 import iscsi as crc32c
from PIL import Image

from featcache.catalog import home as homes
from featcache.catalog import kept_features
from featcache.errors import UserError
from featcache.storage import json_file
from student.features import results
from student.training import run_folder
from tests import student_fixtures as fx

SETS = ("--device", "cpu", "--k", "5", "--json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "run"
    words = ("--steps", "1", "--batch-size", "8")
    fx.good(fx.train("mae", path, "--cache", fx.cache_path(), *words))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fx.save_pictures(tmp_path_factory.mktemp("hostile-pictures") / "p", 24, 4, classes=3)


@pytest.fixture(scope="module")
def filled(run: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the features of one evaluation."""
    path = tmp_path_factory.mktemp("hostile-home") / "home"
    fx.good(evaluate(run, labelled, path))
    return path


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "home"))


def evaluate(run: Path, labelled: Path, home: Path, *words: Any) -> fx.Ran:
    given = ("--images", labelled, "--test", f"a={labelled}", *SETS, *words)
    return fx.stud("eval", "knn", run, *given, home=home)


def kept_folder(home: Path, what: str = "pooled") -> Path:
    for path in (home / "features").iterdir():
        if json.loads((path / "about.json").read_text())["of"]["what"] == what:
            return path
    raise AssertionError(what)


def forge(path: Path, data: bytes | None = None, **facts: Any) -> None:
    """Write rows of kept features, and an about.json with a sound checksum."""
    about = json.loads((path / "about.json").read_text())
    about.pop(json_file.CHECKSUM)
    if data is not None:
        (path / "features.npy").write_bytes(data)
        about |= {"bytes": len(data), "crc32c": crc32c(data)}
    json_file.write_json(path / "about.json", about | facts)


def npy(rows: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, rows, allow_pickle=True)
    return out.getvalue()


def header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + body


def a_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.npy", npy(np.zeros(3)))
    return out.getvalue()


SHAPED = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"",
        a_zip(),
        b"PK\x03\x04" + b"x" * 100,
        b"\x80\x04K\x01.",
        npy(np.array([{}], object)),
        npy(np.zeros(24, [("a", "<f4")])),
        npy(np.asfortranarray(np.ones((24, 1, 2, 48), "<f4"))),
        header("(" * 5000),
        header("{'descr': '<f4', 'x\n  y\n z"),
        header(SHAPED.format("(-24, 1, 2, 48)")),
        header(SHAPED.format(f"({2**63 - 1}, 9, 2, 48)")),
        header(SHAPED.format(f"({10**40},)")),
        header("{'descr': '()', 'fortran_order': False, 'shape': (24,), }\n"),
    ],
    ids=range(13),
)
def test_rows_in_another_form_are_made_again(
    run: Path, labelled: Path, home: Path, data: bytes
) -> None:
    forge(kept_folder(home), data)
    ran = fx.good(evaluate(run, labelled, home))
    assert "features are made again" in ran.err
    assert ran.json["n_test"] == 24


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (np.ones((24, 1, 2, 49), "<f4"), "pooled"),
        (np.ones((24, 1, 2, 0), "<f4"), "pooled"),
        (np.ones((24, 1, 2, 48), "<f2"), "pooled"),
        (np.full((24, 1, 2, 48), np.nan, "<f4"), "pooled"),
        (np.ones((24, 1, 48), "<f2"), "tokens"),
        (np.ones((24, 17, 48), "<f4"), "tokens"),
    ],
)
def test_rows_of_another_encoder_are_made_again(
    run: Path, labelled: Path, home: Path, rows: np.ndarray[Any, Any], what: str
) -> None:
    """All is as about.json says, and none of it is what this encoder gives."""
    forge(kept_folder(home, what), npy(rows), shape=list(rows.shape), dtype=rows.dtype.str)
    words = ("--images", labelled, "--test", labelled, "--device", "cpu", "--epochs", "2")
    words += ("--warmup-epochs", "0", "--train-views", "0")
    protocol = ("efficient", "--queries", "4") if what == "tokens" else ("linear", "--pool", "cls")
    ran = fx.good(fx.stud("eval", protocol[0], run, *words, *protocol[1:], home=home))
    assert "features are made again" in ran.err


def test_the_time_of_a_linked_file_is_left_as_it_is(
    run: Path, labelled: Path, home: Path, tmp_path: Path
) -> None:
    about = kept_folder(home) / "about.json"
    about.rename(tmp_path / "strange.json")
    about.symlink_to(tmp_path / "strange.json")
    os.utime(tmp_path / "strange.json", (1e9, 1e9))
    ran = evaluate(run, labelled, home)
    assert ran.status == 1
    assert "holds what is none of its files" in ran.line
    assert (tmp_path / "strange.json").stat().st_mtime == 1e9


def test_an_about_of_megabytes_is_not_parsed(home: Path) -> None:
    path = kept_folder(home)
    (path / "about.json").write_bytes(b"[" + b"[]," * (kept_features.MOST_BYTES // 3) + b"[]]")
    with pytest.raises(UserError, match="damaged"):
        kept_features.read(path)


@pytest.mark.parametrize(("mtime", "told"), [(1e17, "9999-12-31"), (-1e17, "1970-01-01")])
def test_features_of_any_time_are_listed(home: Path, mtime: float, told: str) -> None:
    """A file system in memory holds times that no calendar has."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copied = Path(shutil.copytree(home, Path(folder) / "home"))
        os.utime(kept_folder(copied) / "about.json", (mtime, mtime))
        assert told in fx.good(fx.feat("ls", home=copied)).out


# --- files of names -------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "endless", "huge"])
def strange_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "names"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    return path


@pytest.mark.slow_after(1)
def test_a_file_of_names_that_is_none(
    run: Path, labelled: Path, tmp_path: Path, strange_file: Path
) -> None:
    for words in (("--subset", f"a={strange_file}"), ("--class-map", f"a={strange_file}")):
        ran = evaluate(run, labelled, tmp_path / "home", *words)
        assert ran.status == 1
        assert "it is no regular file" in ran.line or "it has more than" in ran.line
    given = ("--images", labelled, "--device", "cpu", "--templates", strange_file)
    ran = fx.stud("eval", "zeroshot", run, *given, home=tmp_path / "home")
    assert ran.status == 1
    assert "nor a text file (it" in ran.line


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 8 kB: writing on fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_nothing_of_features(run: Path, labelled: Path, tmp_path: Path) -> None:
    ran = evaluate(run, labelled, tmp_path / "home")
    assert ran.status == 1
    assert "cannot keep features in" in ran.line
    assert "--no-keep" in ran.line
    assert list((tmp_path / "home/features").iterdir()) == []


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_a_full_disk_leaves_nothing_of_an_export(
    run: Path, tmp_path: Path, labelled: Path, name: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    many = tmp_path / "many"
    for i in range(5):
        shutil.copytree(labelled, many / str(i))
    (tmp_path / "out").mkdir()
    given = ("--images", many, "--device", "cpu", "--no-keep", "-o", tmp_path / "out" / name)
    ran = fx.stud("embed", run, *given, home=tmp_path / "home")
    assert ran.status == 1
    assert "cannot be written" in ran.line
    assert list((tmp_path / "out").iterdir()) == []


def test_a_line_after_half_a_line_is_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"half')
    homes.append(path, '{"a": 1}\n')
    homes.append(path, '{"b": 2}\n')
    assert path.read_text() == '{"half\n{"a": 1}\n{"b": 2}\n'


def test_results_without_end_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").touch()
    os.truncate(tmp_path / "results.jsonl", 1 << 40)
    with pytest.raises(UserError, match="more than 256 MiB"):
        results.read(tmp_path)


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_folder.commit() is None


# --- absurd numbers and pictures ------------------------------------------------------------------


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("linear", "--epochs", "1000000000"), "10000 epochs and 1000 views at most"),
        (("linear", "--train-views", "1000000000"), "10000 epochs and 1000 views at most"),
        (("knn", "--crop-pct", "1e-300"), "--crop-pct"),
        (("logreg", "--C", "1e-323"), "--C is a number from 1e-30"),
        (("knn", "--k", "1" + "0" * 5000), "numbers parted by commas"),
    ],
)
def test_numbers_that_cannot_be_meant(
    run: Path, labelled: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    given = (words[0], run, "--images", labelled, "--device", "cpu", *words[1:])
    ran = fx.stud("eval", *given, home=tmp_path / "home")
    assert ran.status == 2
    assert told in ran.line


@pytest.mark.slow
def test_a_line_of_pixels_is_not_enlarged_to_gigabytes(
    run: Path, labelled: Path, tmp_path: Path
) -> None:
    """Its shorter side becomes 37 pixels: the longer one has 2.5 million then."""
    given = Path(shutil.copytree(labelled, tmp_path / "pictures"))
    Image.new("RGB", (1, 65000)).save(given / "c0/line.png")
    ran = evaluate(run, given, tmp_path / "home", "--no-keep")
    assert ran.status == 1
    assert "1 x 65000 pixels: its centre crop would be cut from" in ran.line
    assert fx.good(evaluate(run, given, tmp_path / "home", "--skip-bad", "2")).json["n_test"] == 24
    words = ("--cache", fx.cache_path(), "--steps", "1", "--batch-size", "8", "--probe", given)
    ran = fx.train("mae", tmp_path / "run", *words)
    assert ran.status == 1
    assert "cannot decode the picture 'c0/line'" in ran.line


def test_more_neighbours_than_pictures_that_can_be_decoded(
    run: Path, labelled: Path, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(labelled, tmp_path / "pictures"))
    (given / "c0/p00.png").write_bytes(b"no picture")
    words = ("--skip-bad", "2", "--k", "24")
    ran = evaluate(run, given, tmp_path / "home", *words)
    assert ran.status == 2
    assert "there are 23 training pictures" in ran.line


def test_a_name_with_a_line_break_makes_no_line(run: Path, labelled: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(labelled, tmp_path / "a\nerror: b\x1b[31m"))
    given = ("--images", odd, "--test", odd, "--test", f"b={odd}", "--device", "cpu", "--k", "5")
    ran = fx.good(fx.stud("eval", "knn", run, *given, home=tmp_path / "home"))
    assert len(ran.out.splitlines()) == 2
    out = tmp_path / "x\ny.npy"
    ran = fx.good(fx.stud("embed", run, *given[:2], "-o", out, "--device", "cpu"))
    assert len(ran.out.splitlines()) == 1
    assert "\x1b" not in ran.out + ran.err
