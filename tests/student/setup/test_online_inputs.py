"""The teacher in the loop is run as the command says."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests import student_fixtures as fx


@pytest.mark.parametrize(
    ("online", "compiled"), [(False, ["Model"]), (True, ["Model", "Synthetic"])]
)
def test_compile_is_of_the_teacher_in_the_loop_too(
    online: bool, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the modules themselves, so that names, weights and their hash stay."""
    seen: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    sets = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    given = ("train", "--recipe", "maskalign", "--cache", fx.cache_path(), *sets, "--compile")
    more = ("--teacher", "online", "--images", fx.pictures()) if online else ()
    fx.good(fx.stud(*given, *more, "--steps", "1", "--batch-size", "4", "--out", tmp_path / "run"))
    assert sorted(seen) == compiled
