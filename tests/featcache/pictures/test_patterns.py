"""What exists is taken as it is written, before a glob or braces mean anything; patterns have an
end."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.patterns import _most_names, expand_patterns
from tests.featcache.pictures.test_open_source import PNG, write_folder, write_tar


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for folder in ("run[1]", "run1", "x{a,b}", "what?"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "t.tar", {f"{folder[:4]}{len(folder)}.png": PNG})
    for folder in ("run[1]", "x{a,b}", "what?"):
        for spec in (f"{folder}/t.tar", folder):
            source = open_source(tmp_path / spec)
            assert list(source.keys) == [f"{folder[:4]}{len(folder)}"]
    assert expand_patterns(f"{tmp_path}/run[1]/*.tar") == [f"{tmp_path}/run[1]/t.tar"]


@pytest.mark.parametrize("pattern", ["*.tar", "t{0..1}.tar", "[t]{0,1}.tar", "t?.tar"])
def test_braces_in_a_folder_that_exists_are_part_of_its_name(tmp_path: Path, pattern: str) -> None:
    tars = [tmp_path / "x[1]{a,b}" / f"t{number}.tar" for number in range(2)]
    for folder in ("x[1]{a,b}", "x[1]a", "x1{a,b}"):
        (tmp_path / folder).mkdir()
        for tar in tars:
            write_tar(tmp_path / folder / tar.name, {f"{tar.stem}.png": PNG})
    assert expand_patterns(f"{tars[0].parent}/{pattern}") == [str(tar) for tar in tars]


def test_a_literal_part_of_a_brace_pattern_is_no_glob(tmp_path: Path) -> None:
    for name in ("a[1]-0.tar", "a[1]-1.tar", "a1-0.tar"):
        write_tar(tmp_path / name, {"k.png": PNG})
    wanted = [f"{tmp_path}/a[1]-0.tar", f"{tmp_path}/a[1]-1.tar"]
    assert expand_patterns(f"{tmp_path}/a[1]-{{0,1}}.tar") == wanted


@pytest.mark.timeout(60)  # written out they would take hours
@pytest.mark.parametrize(
    "braces",
    ["{0..999999999999}", "{000000..999999999999}", "{0..999}{0..999}{0..999}", "{a,b}" * 40,
     "{" + "{a,b}" * 40 + ",x}", "{9999999999..0..2}"],
)  # fmt: skip
def test_endless_braces_are_refused_at_once(tmp_path: Path, braces: str) -> None:
    with pytest.raises(UserError, match="name more than 1000000 tars"):
        open_source(f"{tmp_path}/{braces}.tar")


@pytest.mark.parametrize("braces", ["{0.." + "9" * 5000 + "}", "{" * 5000 + "}" * 5000, "{a", "a}"])
def test_odd_braces_are_one_line(tmp_path: Path, braces: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(f"{tmp_path}/{braces}.tar")
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


@given(spec=st.text(st.sampled_from("{},.0123a\\"), max_size=14))
def test_names_are_never_more_than_counted(spec: str) -> None:
    try:
        found = list(braceexpand(spec)) if _most_names(spec) < 5000 else []
    except ValueError:
        return
    assert len(found) <= _most_names(spec)


@pytest.mark.parametrize("spec", ["", " ", "a\0b", "~nobody-here/x.tar"])
def test_specs_that_are_no_path_are_one_line(spec: str) -> None:
    with pytest.raises(UserError, match="no pictures found"):
        open_source(spec)


def test_tilde_is_the_home_folder_but_for_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "photos", "a.png")
    assert open_source("~/photos").spec == f"{tmp_path}/photos"
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "~" / "photos", "b.png")
    assert list(open_source("~/photos").keys) == ["b"]


def test_a_tar_that_a_pattern_names_twice_is_read_once(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"x-{i}.tar", {f"k{i}.png": PNG})
    source = open_source(f"{tmp_path}/{{x-*,x-0,x-1}}.tar")
    assert list(source.keys) == ["k0", "k1"]


def test_what_is_no_file_is_told_apart_from_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for spec in ("pipe.tar", "p*.tar"):
        with pytest.raises(UserError, match=r"pipe\.tar' is no regular file"):
            open_source(tmp_path / spec)


def test_a_folder_that_a_glob_may_not_list_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`glob.glob` takes it for an empty one."""
    for i in range(2):
        (tmp_path / f"d{i}").mkdir()
        write_tar(tmp_path / f"d{i}/x.tar", {f"k{i}.png": PNG})
    listdir = os.listdir

    def failing(path: str) -> list[str]:
        if str(path).endswith("d1"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    assert len(open_source(f"{tmp_path}/*/x*.tar")) == 2
    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(UserError, match=r"d1' cannot be listed: Permission denied"):
        open_source(f"{tmp_path}/*/x*.tar")


@given(pattern=st.text(st.sampled_from("ab*?[]!.-/"), min_size=1, max_size=8))
def test_globs_match_what_pythons_do(
    pattern: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "globbed"
    if not root.exists():
        write_folder(root, "a", "b", "ab", ".a", "a-b", "sub/a", "sub/b.a", "sub/.b", "s2/a")
    wanted = sorted(filter(os.path.isfile, glob.glob(f"{root}/{pattern}")))  # noqa: PTH207
    try:
        found = expand_patterns(f"{root}/{pattern}")
    except UserError:
        return
    assert found == wanted or found == [f"{root}/{pattern}"]
