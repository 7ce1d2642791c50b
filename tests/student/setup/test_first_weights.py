"""`--init` begins a run with another encoder's weights, and names what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featcache.errors import UserError
from student.checkpoint import load_encoder, read_config
from student.models.build import build_encoder
from student.setup.first_weights import first_weights
from tests import student_fixtures as fx
from tests import written_runs

WORDS = ("--batch-size", "4")
SETS = ("patch_size=8",)


@pytest.mark.slow
def test_the_first_weights_are_those_of_the_run_or_its_file(tmp_path: Path) -> None:
    words = ("--images", fx.pictures(), *WORDS, "--size", "32")
    first = tmp_path / "first"
    fx.good(fx.train("mae", first, *words, "--steps", "2", sets=SETS))
    for number, given in enumerate((first, first / "encoder.safetensors")):
        out = tmp_path / f"of{number}"
        options = (*words, "--seed", "5", "--init", given)
        fx.good(fx.train("mae", out, *options, "--steps", "0", sets=SETS))
        made, wanted = (load_encoder(run)[0].state_dict() for run in (out, first))
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[name], wanted[name]) for name in wanted)
        # it goes on though what it began with is gone
        options = (*words, "--seed", "5", "--init", tmp_path / "gone", "--resume")
        fx.good(fx.train("mae", out, *options, "--steps", "1", sets=SETS))
        assert read_config(out)["targets"]["init"]
    larger = tmp_path / "larger"
    options = ("--images", fx.pictures(), *WORDS, "--size", "48", "--init", first)
    fx.good(fx.train("mae", larger, *options, "--steps", "0", sets=SETS))
    assert load_encoder(larger)[0].state_dict()["pos_embed"].shape[1] == 1 + 36
    kernel = "patch_embed.proj.weight"
    assert torch.equal(*(load_encoder(run)[0].state_dict()[kernel] for run in (larger, first)))
    ran = fx.train("mae", tmp_path / "no", *options, "--steps", "1", sets=("patch_size=16",))
    assert ran.status == 1
    assert "does not fit this run's encoder" in ran.line
    assert not (tmp_path / "no").exists()
    ran = fx.train("mae", tmp_path / "no", *words, "--steps", "1", "--init", tmp_path, sets=SETS)
    assert "gives no encoder" in ran.line


# --- exported folders -----------------------------------------------------------------------------


def _begun(given: Path, out: Path, size: int = 32) -> fx.Ran:
    """A run of no steps that begins with `given`."""
    words = ("--images", fx.pictures(), "--size", size, *WORDS, "--steps", "0", "--seed", "7")
    return fx.train("mae", out, *words, "--init", given, sets=SETS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, beit = tmp_path_factory.mktemp("runs"), "tiny,embed_dim=48,depth=2,num_heads=3"
    return {
        "mae": written_runs.write(root / "mae", "mae", "mae", fx.ENCODER),
        "cae": written_runs.write(root / "cae", "cae", "cae", beit),
        "beit": written_runs.write(root / "beit", "fd", "beit", beit),
    }


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that `student export` wrote of a plain encoder, and of those with LayerScale."""
    root = tmp_path_factory.mktemp("exports")
    forms = {"mae": ("timm", "hf", "mae", "vitdet"), "cae": ("timm", "hf"), "beit": ("timm",)}
    for name, family in forms.items():
        for form in family:
            out = root / f"{name}-{form}"
            fx.good(fx.stud("export", runs[name], "--format", form, "--out", out))
    return {path.name: path for path in root.iterdir()}


@pytest.mark.slow
def test_exported_folders_begin_a_run(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    wanted = load_encoder(runs["mae"])[0].state_dict()
    fx.good(_begun(exports["mae-hf"], tmp_path / "same"))
    made = load_encoder(tmp_path / "same")[0].state_dict()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    assert read_config(tmp_path / "same")["targets"]["init"]
    fx.good(_begun(exports["mae-hf"], tmp_path / "larger", 48))
    made = load_encoder(tmp_path / "larger")[0].state_dict()
    assert made["pos_embed"].shape[1] == 1 + 36
    kernel = "patch_embed.proj.weight"
    assert torch.equal(made[kernel], wanted[kernel])


class Model(nn.Module):
    def __init__(self, run: Path, size: int) -> None:
        super().__init__()
        settings = {**read_config(run)["config"], "img_size": size}
        self.encoder = build_encoder(settings, settings["family"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_exports_of_every_layout_and_family_fill_the_same_encoder(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    cases = (("mae-timm", 32), ("mae-mae", 32), ("cae-timm", 32), ("beit-timm", 32))
    for name, size in (*cases, ("beit-timm", 48)):
        run = runs[name.partition("-")[0]]
        model, wanted = Model(run, size), load_encoder(run)[0]
        options: Any = SimpleNamespace(init=exports[name], resume=False)
        start, _ = first_weights(options, tmp_path / "no", size)
        assert start is not None
        start(model)
        if size != 32:  # the table of relative positions, by timm itself
            wanted.set_input_size(img_size=(size, size))  # type: ignore[operator]
        made = model.encoder.state_dict()
        assert made.keys() == wanted.state_dict().keys()
        assert all(torch.equal(made[key], value) for key, value in wanted.state_dict().items())
    options = SimpleNamespace(init=exports["cae-hf"], resume=False)
    start, _ = first_weights(options, tmp_path / "no", 32)
    assert start is not None
    with pytest.raises(UserError, match="timm's alone keeps LayerScale"):
        start(Model(runs["cae"], 32))


@pytest.mark.slow
def test_folders_that_hold_no_such_encoder_are_told(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    def changed(name: str, **facts: Any) -> Path:
        number = sum(1 for _ in tmp_path.iterdir())
        folder = Path(shutil.copytree(exports[name], tmp_path / f"{name}-{number}"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **facts}))
        return folder

    onnx, lone = tmp_path / "onnx", tmp_path / "lone.safetensors"
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"x")
    shutil.copy(exports["mae-mae"] / "model.safetensors", lone)
    cut, infinite = changed("mae-mae"), changed("mae-mae")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:5000])
    state = load_file(infinite / "model.safetensors")
    state["norm.bias"][3] = float("nan")
    save_file(state, infinite / "model.safetensors")
    timm = json.loads((exports["mae-timm"] / "config.json").read_text())["model_args"]
    cases = {
        exports["mae-vitdet"]: "no [CLS] and no final norm",
        onnx: "an ONNX file is a graph",
        changed("mae-mae", embed_dim=None, pool=None, recipe=3): "is not of a run",
        lone: "or a folder of `student export --format timm`, `hf` or `mae`",
        tmp_path / "gone": "no plain file",
        cut: "cannot be read",
        infinite: "norm.bias has values that are not finite",
        changed("mae-mae", num_heads=4): "heads 4, 3 is needed",
        changed("mae-mae", num_heads="3"): "its num_heads is '3'",
        changed("mae-mae", img_size=10**9): "its img_size is",
        changed("mae-mae", layer_norm_eps=1e-3): "eps 0.001, 1e-06 is needed",
        changed("mae-hf", hidden_act="quick_gelu"): "activations quick_gelu, gelu is needed",
        changed("mae-hf", model_type="swin"): "model_type is 'swin'",
        changed("mae-timm", architecture="os.system"): "is none of timm's",
        changed("mae-timm", model_args={**timm, "checkpoint_path": "/x"}): "no keyword",
        changed("mae-timm", model_args={**timm, "num_heads": 6}): "heads 6, 3 is needed",
    }
    for number, (given, told) in enumerate(cases.items()):
        ran = _begun(given, tmp_path / f"no{number}")
        assert ran.status == 1, (given, ran)
        assert told in ran.line, ran.line
        assert not (tmp_path / f"no{number}").exists()
