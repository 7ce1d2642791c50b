"""Names of classes beside packed pictures are read, checked, and give labels their meaning."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from featcache.commands.pack import command as pack
from featcache.errors import UnreadableError, UserError
from featcache.pictures.classes import NAME, parse_label, read_classes
from featcache.pictures.open_source import open_source


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 9, np.uint8)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, labels: dict[str, str]) -> Path:
    """A tar of one picture for each key, with its .cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label in labels.items():
            for name, data in ((f"{key}.png", png()), (f"{key}.cls", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def labels(spec: Path | str) -> list[int]:
    found = open_source(spec).labels
    assert found is not None
    return found.tolist()


def test_packed_folders_keep_the_names_of_their_classes(tmp_path: Path) -> None:
    for name in ("zebra", "ärmel", "猫"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / f"{len(name)}.png").write_bytes(png())
    args = [str(tmp_path / "src"), str(tmp_path / "out"), "--shard-size", "2"]
    assert CliRunner().invoke(pack, args).exit_code == 0
    packed, folder = open_source(tmp_path / "out"), open_source(tmp_path / "src")
    assert packed.classes == folder.classes == ["zebra", "ärmel", "猫"]
    named = [dict(zip(s.keys, s.labels, strict=True)) for s in (packed, folder)]  # type: ignore[arg-type]
    assert named[0] == named[1]


def test_names_are_unknown_without_the_file_and_where_it_is_null(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x": "3"})
    assert open_source(tar).classes is None
    (tmp_path / NAME).write_text("null")
    assert open_source(tar).classes is None
    assert labels(tar) == [3]


def test_tars_without_labels_have_no_classes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = len(png())
        tar.addfile(member, io.BytesIO(png()))
    (tmp_path / NAME).write_text("no JSON, and nobody asks")
    source = open_source(tmp_path / "a.tar")
    assert (source.classes, source.labels) == (None, None)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ('{"0": "ant"}', "dict"),
        ('"ant"', "str"),
        ("[]", "an empty list"),
        ('["ant", 3]', "3 as entry 1"),
        ('["ant", ["bee"]]', "as entry 1"),
        ('["ant", ""]', "'' as entry 1"),
        ('["ant", "bee", "ant"]', "the name 'ant' twice"),
        ('["\\ud800"]', "no Unicode text"),
        ("[" * 100_000, "no JSON"),
        ("ant", "no JSON"),
        ("\x00\xff", "no JSON"),
        ("", "no JSON"),
        ("1" * 5000, "no JSON"),
        (json.dumps([str(i) for i in range((1 << 17) + 1)]), "131073 names, more than 131072"),
    ],
)
def test_another_content_is_one_line_that_names_the_file(
    tmp_path: Path, text: str, given: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x": "0"})
    (tmp_path / NAME).write_bytes(text.encode("latin-1"))
    for ask in (lambda: open_source(tar).labels, lambda: open_source(tar).classes):
        with pytest.raises(UserError) as error:
            ask()
        assert str(tmp_path / NAME) in str(error.value)
        assert given in str(error.value)


def test_extraction_does_not_ask_for_names(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x": "0"})
    (tmp_path / NAME).write_text("no JSON")
    assert list(open_source(tar).keys) == ["x"]


def test_a_pipe_in_the_place_of_the_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(UserError, match="no regular file"):
        read_classes(tmp_path / NAME)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("null")
    (tmp_path / NAME).chmod(0)
    with pytest.raises(UnreadableError):
        read_classes(tmp_path / NAME)


def test_a_label_beyond_the_names_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x": "0", "y": "2"})
    (tmp_path / NAME).write_text('["ant", "bee"]')
    with pytest.raises(UserError, match=r"2 is given, .* has 2 names, so that 0 to 1 are allowed"):
        labels(tar)


def test_folders_of_tars_with_other_numbers_are_matched_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "p/1.tar", {"a": "0", "b": "1"})
    write_tar(tmp_path / "q/1.tar", {"c": "0", "d": "1"})
    write_tar(tmp_path / "q/2.tar", {"e": "1"})
    (tmp_path / "p" / NAME).write_text('["ant", "bee"]')
    (tmp_path / "q" / NAME).write_text('["bee", "cat"]')
    both = open_source(f"{tmp_path}/{{p,q}}/*.tar")
    assert both.classes == ["ant", "bee", "cat"]
    assert both.labels is not None
    assert dict(zip(both.keys, both.labels.tolist(), strict=True)) == {
        "a": 0, "b": 1, "c": 1, "d": 2, "e": 2,
    }  # fmt: skip
    (tmp_path / "q" / NAME).unlink()
    with pytest.raises(UserError, match=r"q' has no names, so a label would mean two things"):
        labels(f"{tmp_path}/{{p,q}}/*.tar")


@pytest.mark.parametrize(
    "text", ["-1", "1.5", "cat", "", "0x10", "1e3", "9" * 19, "9" * 5000, "1" * 300, "²", "1 2"]
)
def test_a_label_is_a_number_that_64_bits_hold(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="label of 'x'"):
        labels(write_tar(tmp_path / "a.tar", {"x": text}))


def test_labels_of_18_digits_are_numbers() -> None:
    assert parse_label(b" 999999999999999999\r\n") == 10**18 - 1


def test_packing_again_keeps_the_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", {"x": "1", "y": "0"})
    (tmp_path / "in" / NAME).write_text('["ant", "bee"]')
    args = [str(tmp_path / "in"), str(tmp_path / "out"), "--shard-size", "9"]
    assert CliRunner().invoke(pack, args).exit_code == 0
    assert json.loads((tmp_path / "out" / NAME).read_text()) == ["ant", "bee"]
