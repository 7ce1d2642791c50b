"""The literal of a recipe is checked, and a user's own file is parsed and never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from featcache.catalog import recipe_needs
from featcache.errors import UsageError, UserError

FULL = {
    "teacher": "clip-l14",
    "fields": ("features", "dvae/token_ids"),
    "levels": "last:3",
    "mask_ratio": 0.5,
    "scale": (0.3, 1),
    "jitter": 0.1,
    "size": 196,
}


def test_a_literal_becomes_needs() -> None:
    found = recipe_needs.parse_needs("mine", FULL)
    assert (found.name, found.teacher, found.levels) == ("mine", "clip-l14", 3)
    assert found.fields == ("features", "dvae/token_ids")
    assert (found.scale, found.jitter, found.size) == ((0.3, 1.0), 0.1, 196)


def test_what_is_not_said_is_the_usual() -> None:
    found = recipe_needs.parse_needs("mine", {"fields": ()})
    assert (found.teacher, found.levels) == ("", 0)
    assert (found.scale, found.jitter, found.size) == ((0.2, 1.0), 0.0, 224)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fields": "features"}, "has fields='features'; a tuple of the names"),
        ({"fields": (1,)}, "has fields=(1,)"),
        ({"levels": "8,12"}, "has levels='8,12'; 'last:N'"),
        ({"levels": 5}, "has levels=5"),
        ({"levels": "last:0"}, "has levels='last:0'"),
        ({"levels": "last:257"}, "has levels='last:257'; 'last:N' of at most 256"),
        ({"levels": "last:" + "9" * 5000}, "has levels="),
        ({"mask_ratio": 1}, "has mask_ratio=1; a number from 0 to below 1"),
        ({"mask_ratio": True}, "has mask_ratio=True"),
        ({"teacher": None}, "has teacher=None"),
        ({"scale": (1, 0.2)}, "has scale=(1, 0.2); a pair"),
        ({"scale": (0.2,)}, "has scale=(0.2,)"),
        ({"scale": (0, 1)}, "has scale=(0, 1)"),
        ({"jitter": -0.1}, "has jitter=-0.1"),
        ({"size": 224.0}, "has size=224.0; 1 to 4096 pixels"),
        ({"size": 0}, "has size=0"),
        ({"all_tokens": 1}, "has all_tokens=1"),
        ({"derive": "y"}, "has derive='y'"),
        ({"level": "last:1"}, "unknown key 'level'; did you mean levels?"),
        ({3: 4}, "unknown key 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_literal_is_one_line(changed: dict[Any, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_needs.parse_needs("mine", {**FULL, **changed})
    assert str(caught.value).startswith("--for mine: its SERVED_BY has ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["fields", "levels", "mask_ratio"])
def test_what_a_literal_must_say(key: str) -> None:
    literal = {name: value for name, value in FULL.items() if name != key}
    with pytest.raises(UsageError, match=f"its SERVED_BY has no '{key}'; .* is needed; add it"):
        recipe_needs.parse_needs("mine", literal)


def test_an_own_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = "import no_such_module\nSERVED_BY = {'fields': ()}\n'\\d'\n"
    path.write_text(text + "raise SystemExit('it was run')\n")
    assert recipe_needs.find_needs(str(path)).fields == ()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, UsageError, "no such file; give a name or the path of your own .py file"),
        ("", UsageError, "states no SERVED_BY"),
        ("SERVED_BY = [1]", UsageError, "states no SERVED_BY"),
        ("SERVED_BY = dict(fields=())", UserError, "cannot be read: ValueError"),
        ("SERVED_BY = {[]: 1}", UserError, "cannot be read: TypeError"),
        ("SERVED_BY = {", UserError, "cannot be read: SyntaxError"),
        ("SERVED_BY = " + "-" * 100_000 + "1", UserError, "cannot be read: "),
        (b"\xff\x00", UserError, "cannot be read: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_says_nothing(
    text: str | bytes | None, kind: type[UserError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        recipe_needs.find_needs(str(path))
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_recipe_gets_near_names() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'maskalgin': did you mean maskalign"):
        recipe_needs.find_needs("maskalgin")


# ------------------------------------------------------------ files and packages of strangers


def test_a_file_is_read_as_the_interpreter_reads_it(tmp_path: Path) -> None:
    """It may begin with a mark of its encoding, name another, or annotate the literal."""
    for text in (
        b"\xef\xbb\xbfSERVED_BY = {'fields': ()}",
        b"# -*- coding: latin-1 -*-\nNAME = '\xe9'\nSERVED_BY = {'fields': ()}",
        b"SERVED_BY: dict[str, object] = {'fields': ()}",
    ):
        (tmp_path / "mine.py").write_bytes(text)
        assert recipe_needs.find_needs(str(tmp_path / "mine.py")).fields == ()


def test_a_file_of_any_size_is_told_at_once(tmp_path: Path) -> None:
    with (tmp_path / "mine.py").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(UserError, match="has more than 1048576 bytes"):
        recipe_needs.find_needs(str(tmp_path / "mine.py"))


def announce(root: Path, package: str, **files: str) -> None:
    """Put a package of recipes, and what announces it, where Python looks."""
    info = root / f"{package}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[featcache.recipes]\n{package} = {package}\n")
    if files:
        (root / package).mkdir()
    for name, text in files.items():
        (root / package / f"{name}.py").write_text(text)


WHOLE = "{'fields': ('features',), 'levels': 'last:1', 'mask_ratio': 0.5}"


def test_a_package_of_strangers_breaks_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    announce(tmp_path, "absent_recipes")
    announce(
        tmp_path,
        "odd_recipes",
        broken="SERVED_BY = {",
        called="SERVED_BY = open('ran', 'w')",
        unnamed="SERVED_BY = {'fields': ('features',)}",
        levels=f"SERVED_BY = {WHOLE.replace('last:1', 'last:x')}",
        fine=f"raise SystemExit\nSERVED_BY = {WHOLE}",
        mae=f"SERVED_BY = {WHOLE}",
        helper="",
    )
    os.mkfifo(tmp_path / "odd_recipes/pipe.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = recipe_needs.installed()
    assert {name for name, needs in found.items() if isinstance(needs, UserError)} == {
        "broken", "called", "unnamed", "levels", "pipe",
    }  # fmt: skip
    assert "helper" not in found
    assert recipe_needs.find_needs("fine").levels == 1
    assert recipe_needs.find_needs("maskalign").fields
    with pytest.raises(UserError, match=r"broken\.py' cannot be read: SyntaxError"):
        recipe_needs.find_needs("broken")
    assert "'absent_recipes', which is no package here" in caplog.text
    assert "recipe 'mae' of" in caplog.text
    assert not (tmp_path / "ran").exists()
