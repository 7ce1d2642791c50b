"""The Python of the guide on calls runs as it stands, on small pictures; and the notebook of the
quick start runs to its end."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm

import featcache
from tests import student_fixtures as fx

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/guides/python.md").read_text(), re.M | re.S
)
# the shapes of nothing real: twelve blocks, so that the page's levels exist
SMALL = {
    '"clip-b16"': '"synthetic:levels=12,tokens=16,width=24,size=32", size=32',
    '"encoder": "small"': f'"encoder": "{fx.ENCODER}", "warmup_epochs": 0',
}


@pytest.mark.slow
def test_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fx.fresh_state()
    fx.save_pictures(tmp_path / "train", 16, classes=2)
    fx.save_pictures(tmp_path / "val", 6, seed=1, classes=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(logging, "basicConfig", lambda **given: None)
    assert len(BLOCKS) == 5
    names: dict[str, Any] = {}
    for number, text in enumerate(BLOCKS):
        for word, small in SMALL.items():
            text = text.replace(word, small)
        (tmp_path / f"block{number}.py").write_text(text)
        names |= runpy.run_path(f"block{number}.py")
    assert (names["done"].cache, names["done"].new_pictures) == (Path("cache"), 16)
    assert featcache.open("cache").identity["levels"] == [10, 11, 12]
    assert (names["run"].run, names["run"].steps) == (Path("runs/mralign"), 4)
    assert names["result"].scores["val"].n_test == 6
    assert timm.create_model("local-dir:mralign-timm", pretrained=True).embed_dim == 48
    told = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"val: [\d.]+ % \([\d.]+-[\d.]+\) of 6 pictures", told[0])
    assert told[1] == "Invalid value for batch_size: 0 is not in the range 1<=x<=65536."


@pytest.mark.slow
def test_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fx.fresh_state()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    notebook = ROOT / "examples/notebook.py"
    monkeypatch.setattr(sys, "argv", [str(notebook), "--reduced"])
    names = runpy.run_path(str(notebook))
    rows = ["teacher", "untrained student", "mralign student"]
    assert list(names["table"]) == rows
    assert all(
        result.scores["test"].n_test == 397
        for found in names["table"].values()
        for result in found.values()
    )
    told = capsys.readouterr().out
    assert [line[:20].strip() for line in told.splitlines() if line[:20].strip() in rows] == rows
    assert timm.create_model("local-dir:notebook/timm", pretrained=True).embed_dim == 128
    assert notebook.read_text().count("# %%") == 7
