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


def test_each_main_refuses_a_wrong_place_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, nowhere = tmp_path / "file", tmp_path / "nowhere"
    file.write_text("")
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "ablate.__main__": ["models", "--out", file],
        "clipart": [tmp_path / "out", "--clipart", nowhere],
        "digits": [file],
        "overview": [nowhere, "a.png"],
        "pack_images": [nowhere, tmp_path / "out", "--shard-size", "3"],
        "quickstart": ["--out", file],
        "tokenizer": [nowhere],
    }.items():
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"pipelines.{name}").main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (1, ""), name
        assert err.startswith("error: "), (name, err)
        assert err.count("\n") == 1, (name, err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
