"""`--format onnx`: any number of pictures, nothing of this machine in the file, and networks of
every kind."""

from __future__ import annotations

import getpass
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from featcache.errors import UserError
from student import exporting
from student.exporting import onnx as onnx_format
from student.features import export_folder
from tests import student_fixtures as fx
from tests.student.exporting.readers import READERS, export, images, run_of
from tests.student.exporting.test_networks import TEACHERS, network


@pytest.mark.slow
def test_the_file_takes_any_number_of_pictures(tmp_path: Path) -> None:
    fx.good(export(run_of("mae tuned"), "onnx", tmp_path / "out"))
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["N", 3, 32, 32])
    found = [(each.name, each.shape) for each in session.get_outputs()]
    assert found == [("tokens", ["N", 17, 48]), ("logits", ["N", 5])]
    for number in (1, 2, 7):
        tokens, logits = session.run(None, {"images": np.zeros((number, 3, 32, 32), np.float32)})
        assert (len(tokens), len(logits)) == (number, number)


@pytest.mark.slow
def test_the_file_holds_no_trace_of_where_it_was_made(tmp_path: Path) -> None:
    fx.good(export(run_of("fd"), "onnx", tmp_path / "out"))
    content = (tmp_path / "out/model.onnx").read_bytes()
    places = (str(tmp_path), getpass.getuser(), "site-packages", "student.", ".py")
    assert [place for place in places if place.encode() in content] == []
    model = onnx.load(tmp_path / "out/model.onnx")
    assert re.findall(r"(?m)^\s*(?:doc_string: \".+\"|metadata_props)", str(model)) == []
    assert not {each.data_location for each in model.graph.initializer} - {0}
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.onnx",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_networks_of_every_kind(name: str, tmp_path: Path) -> None:
    head = {"classes": 4, "pool": "mean", "rel_pos": False, "drop_path": 0.1}
    head |= {"pixel_mean": [0.4, 0.5, 0.6], "pixel_std": [0.2, 0.3, 0.25]}
    given = network(TEACHERS[name], "timm", 64, **head)
    export_folder.export(given, exporting.load("onnx"), tmp_path / "out", None)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    (logits,) = session.run(["logits"], {"images": pixels.numpy()})
    net: Any = given.net
    with torch.no_grad():
        expected = net((pixels - mean) / std)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_too_many_weights_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_format, "ONE_FILE_BYTES", 1000)
    given = network("tiny,depth=1,embed_dim=24", "beit", 32)
    export_folder.export(given, exporting.load("onnx"), tmp_path / "out", None)
    (tmp_path / "out").rename(tmp_path / "moved")
    model = onnx.load(tmp_path / "moved/model.onnx", load_external_data=False)
    places = {
        entry.value
        for each in model.graph.initializer
        for entry in each.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx.data"}
    x = images(32)
    with torch.no_grad():
        tokens, _ = READERS["onnx"](tmp_path / "moved")(x)
        expected = given.net.forward_features(x)  # type: ignore[operator]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)


def _changed(change: Any) -> Any:
    """The format, with a change of what it wrote."""

    def write(given: Any, folder: Path) -> None:
        onnx_format.write(given, folder)
        model = onnx.load(folder / "model.onnx")
        change(model)
        onnx.save(model, folder / "model.onnx")

    return SimpleNamespace(**{**vars(onnx_format), "write": write})


@pytest.mark.slow
def test_a_weight_that_is_off_by_a_hundredth_is_noticed(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        (weight,) = (x for x in model.graph.initializer if x.name.endswith("patch_embed.proj.bias"))
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()

    given = network("tiny,depth=1,embed_dim=24", "mae", 32)
    with pytest.raises(UserError, match="other tokens than the run"):
        export_folder.export(given, _changed(change), tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_for_one_number_of_pictures_is_refused(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    given = network("tiny,depth=1,embed_dim=24", "mae", 32)
    with pytest.raises(UserError, match="onnxruntime does not read back"):
        export_folder.export(given, _changed(change), tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_without_a_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("mae")
    monkeypatch.setitem(sys.modules, name, None)
    ran = export(run, "onnx", tmp_path / "out")
    assert (ran.status, f"needs {name}; run `pip install" in ran.line) == (1, True)
    assert "pip install 'featcache[onnx]'" in ran.line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cards_python_runs_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fx.good(export(run_of("mae tuned"), "onnx", tmp_path / "DIR"))
    card = (tmp_path / "DIR/README.md").read_text()
    assert "Read back by onnxruntime and compared" in card
    assert "(float32 against float64)" in card
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert (found["tokens"].shape, found["logits"].shape) == ((1, 17, 48), (1, 5))
    about = json.loads((tmp_path / "DIR/config.json").read_text())
    assert about["built_in_mean"] == [0.485, 0.456, 0.406]
