"""A user's own file that cannot be imported is one line, and a stop meanwhile is a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import UsageError, UserError
from featcache.runtime import signals, user_file
from tests import student_fixtures as fx


def test_a_file_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise ImportError('no such library')")
    with pytest.raises(UserError, match=r"mine\.py' fails as it is imported: ImportError: no such"):
        user_file.load_module(path, "teacher", {}, "synthetic.py")


def test_an_error_that_a_library_made_of_a_signal_is_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise ImportError('initialization of a C extension failed')")
    monkeypatch.setattr(signals, "_received", [15])
    with pytest.raises(ImportError):
        user_file.load_module(path, "teacher", {}, "synthetic.py")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit('gone')", "SystemExit: gone"),
        ("raise ValueError('a\\x1b[31m\\nb')", r"ValueError: a\x1b[31m"),
        ("class E(Exception):\n    def __str__(self): raise KeyError\nraise E", "E: no message"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("\0", "null bytes"),
    ],
)
def test_whatever_an_import_raises_is_one_line(tmp_path: Path, code: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(UserError) as caught:
        user_file.load_module(path, "teacher", {}, "synthetic.py")
    line = str(caught.value)
    assert told in line
    assert "mine.py' fails as it is imported" in line
    assert line.isprintable()
    assert len(line) < 1000


TEACHER = """
from featcache.teachers import synthetic
class Mine(synthetic.Synthetic):
    def forward(self, images, levels):
        FORWARD
        return super().forward(images, levels)
    def tail(self):
        TAIL
        return super().tail()
def load(name, options, weights):
    return Mine(2, 4, 8, 28)
"""


@pytest.mark.parametrize("where", ["FORWARD", "TAIL"])
@pytest.mark.parametrize("code", ["raise SystemExit(3)", "{}['\\x1b[31mno']", "1 / 0"])
def test_what_a_teacher_raises_later_is_one_line_that_names_it(
    tmp_path: Path, where: str, code: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(TEACHER.replace(where, code).replace("FORWARD", "").replace("TAIL", ""))
    ran = fx.feat(
        "extract", "--teacher", str(path), "--images", str(fx.pictures()), "--size", "28",
        "--levels", "all", "--out", str(tmp_path / "cache"),
    )  # fmt: skip
    assert ran.status == 1, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("error:")
    assert "mine.py" in last
    assert "Traceback" not in ran.err
    assert "\x1b" not in ran.err


RECIPE = """
from student.recipes.mae import *
from student.recipes import mae
def needs(config):
    NEEDS
    return mae.needs(config)
class Model(mae.Model):
    def __init__(self, config):
        INIT
        super().__init__(config)
    def forward(self, batch):
        FORWARD
        return super().forward(batch)
"""


@pytest.mark.parametrize("where", ["NEEDS", "INIT", "FORWARD"])
def test_what_a_recipe_raises_is_one_line_that_names_it(tmp_path: Path, where: str) -> None:
    text = RECIPE.replace(where, "[][1]")
    for other in ("NEEDS", "INIT", "FORWARD"):
        text = text.replace(other, "")
    (tmp_path / "mine.py").write_text(text)
    sets = [part for setting in fx.RECIPES["mae"] for part in ("--set", setting)]
    ran = fx.stud(
        "train", "--recipe", tmp_path / "mine.py", "--out", tmp_path / "run", "--device", "cpu",
        *sets, "--cache", fx.cache_path(), "--steps", "1", "--batch-size", "4",
    )  # fmt: skip
    assert ran.status == 1, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: your own file")
    assert "mine.py' fails at line" in last
    assert "IndexError" in last


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(UsageError) as caught:
        user_file.load_module(Path("nowhere.py"), "teacher", {}, "synthetic.py")
    assert user_file.failure(caught.value) == ""
