"""`A::B` names the pictures of both, one after the other."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import UsageError, UserError
from featcache.pictures.joined import join
from featcache.pictures.open_source import is_beton, open_source
from featcache.pictures.patterns import absolute
from featcache.pictures.spec import split_sources, with_parts
from featcache.pictures.stamps import stamp
from tests.conftest import waves


def folder(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(waves(20, 24, i + len(str(root)))).save(root / name)
    return root


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    a = folder(tmp_path / "a", ["cat/1.png", "dog/2.png", "dog/0.png"])
    b = folder(tmp_path / "b", ["ape/9.png", "dog/7.png"])
    return a, b


def test_pictures_come_one_source_after_the_other(pair: tuple[Path, Path]) -> None:
    a, b = pair
    joined = open_source(f"{a}::{b}")
    assert list(joined.keys) == ["cat/1", "dog/0", "dog/2", "ape/9", "dog/7"]
    assert len(joined) == 5
    files = [a / "cat/1.png", a / "dog/0.png", a / "dog/2.png", b / "ape/9.png", b / "dog/7.png"]
    assert [joined.read(i) for i in range(5)] == [file.read_bytes() for file in files]
    assert joined.spec == f"{a}::{b}"
    assert list(pickle.loads(pickle.dumps(joined)).keys) == list(joined.keys)


def test_classes_are_those_of_both_by_name(pair: tuple[Path, Path]) -> None:
    joined = open_source("::".join(map(str, pair)))
    assert joined.classes == ["ape", "cat", "dog"]
    assert joined.labels is not None
    assert joined.labels.tolist() == [1, 2, 2, 0, 2]


def test_without_labels_in_one_there_are_none(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    flat = folder(tmp_path / "flat", ["x.png"])
    joined = open_source(f"{pair[0]}::{flat}")
    assert joined.labels is None
    assert joined.classes is None


@dataclass(frozen=True)
class Labelled:
    spec: str
    keys: list[str]
    labels: np.ndarray
    classes: list[str] | None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        return b""


def test_bare_numbers_stay_and_do_not_mix_with_names() -> None:
    numbers = Labelled("n", ["a", "b"], np.array([3, 0]), None)
    others = Labelled("o", ["c"], np.array([7]), None)
    named = Labelled("m", ["d"], np.array([0]), ["cat"])
    both = join("n::o", [numbers, others])
    assert both.classes is None
    assert both.labels is not None
    assert both.labels.tolist() == [3, 0, 7]
    with pytest.raises(UserError, match="'m' has names of classes, 'n' numbers alone"):
        _ = join("n::m", [numbers, named]).labels


def test_a_key_in_both_names_both(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    c = folder(tmp_path / "c", ["dog/0.png"])
    with pytest.raises(UserError, match=r"'dog/0' is used by two pictures.*/a .*/c "):
        open_source(f"{pair[0]}::{c}")


def test_what_exists_under_the_whole_text_is_one_source(tmp_path: Path) -> None:
    odd = folder(tmp_path / "x::y", ["1.png"])
    assert split_sources(str(odd)) == [str(odd)]
    assert list(open_source(odd).keys) == ["1"]


@pytest.mark.parametrize("text", ["::", "a::", "::a", "a::::b", "a:: "])
def test_an_empty_source_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="one is empty"):
        open_source(text)


def test_options_of_one_source_are_not_guessed_for_several(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="may mean each of them; give #labels= to those"):
        with_parts(f"{pair[0]}::{pair[1]}", {"labels": "prefix"})


def test_each_source_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a::b/../c") == f"{tmp_path}/a::{tmp_path}/c"
    assert absolute("a::s3://lab/x.tar") == f"{tmp_path}/a::s3://lab/x.tar"


def test_a_beton_beside_another_source_is_no_beton() -> None:
    assert is_beton("a.beton")
    assert not is_beton("x::a.beton")


def test_the_stamp_changes_with_a_file_of_any_member(pair: tuple[Path, Path]) -> None:
    text = "::".join(map(str, pair))
    before = stamp(open_source(text))
    assert before
    assert stamp(open_source(text)) == before
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(pair[1] / "ape/9.png")
    assert stamp(open_source(text)) != before
