"""Every pipeline that is run by its name says what it does when it is asked for --help."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import pipelines

FOLDER = Path(pipelines.__file__).parent


def _has_main(path: Path) -> bool:
    """Tell whether a file does something where it is run by its name."""
    nodes = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in nodes)


def test_each_main_answers_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mains = [path for path in sorted(FOLDER.rglob("*.py")) if _has_main(path)]
    names = {
        ".".join(["pipelines", *path.relative_to(FOLDER).with_suffix("").parts]) for path in mains
    }
    assert {"pipelines.overview", "pipelines.quickstart", "pipelines.ablate.__main__"} <= names
    for name in sorted(names):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        importlib.import_module(name).main()
        assert "Usage:" in capsys.readouterr().out, name
