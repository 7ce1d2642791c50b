"""What a library raises while it is imported is one line that names it; any other error is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.runtime import imports
from tests.conftest import python


def raised(module: str) -> BaseException:
    with pytest.raises(ValueError, match="level") as caught:
        __import__(module)
    return caught.value


def test_the_library_that_was_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that it imports in its turn."""
    (tmp_path / "fragile_inner.py").write_text("int_of = int\nraise ValueError('level\\nmore')\n")
    (tmp_path / "fragile_outer.py").write_text("import fragile_inner\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TIMM_FUSED_ATTN", "x")
    line = imports.failure(raised("fragile_outer"))
    assert line is not None
    assert line.startswith("fragile_outer cannot be imported: ValueError: level; ")
    assert "TIMM_FUSED_ATTN='x'" in line


def test_an_error_of_a_call_is_none_of_an_import() -> None:
    with pytest.raises(ValueError, match="x") as caught:
        int("x")
    assert imports.failure(caught.value) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TIMM_FUSED_ATTN", "ACCELERATE_LOG_LEVEL", "TORCH_LOGS"])
def test_a_wrong_variable_of_a_library_is_one_line(name: str, tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['student', *sys.argv[1:]]; from student.cli import main; main()"
    given = ("train", "--recipe", "mralign", "--device", "cpu", "--out", tmp_path / "run")
    ran = python(code, *given, **{name: "nonsense"})
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")
    assert f"{name}='nonsense'" in ran.stderr
