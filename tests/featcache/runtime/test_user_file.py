"""A user's own file that cannot be imported is one line, and a stop meanwhile is a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import UserError
from featcache.runtime import signals, user_file


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
