"""`student export`: what each library makes of each family's encoder, compared on photographs in
float32 by code that is not the command's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from student import checkpoint, exporting
from student.features import export_folder, exported
from tests import student_fixtures as fx
from tests.student.exporting.readers import BAD, GOOD, READERS, export, images, reference, run_of
from tests.teacher_reference import photographs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), GOOD)
def test_the_library_gives_the_runs_features(name: str, form: str, tmp_path: Path) -> None:
    ran = fx.good(export(run_of(name), form, tmp_path / "out", "--json"))
    most = 1e-4 if form == "onnx" else 1e-5
    assert ran.json["difference"] <= most
    net, settings = checkpoint.load_encoder(run_of(name))
    x, reader = images(32), READERS[form](tmp_path / "out")
    with torch.no_grad():
        tokens, logits = reader(x)
        torch.testing.assert_close(tokens, reference(net, x, form), rtol=0, atol=most)
        if "classes" in settings and form != "vitdet":
            torch.testing.assert_close(logits, net(x), rtol=0, atol=most)


@pytest.mark.slow
def test_classes_of_ones_own_recipe_are_no_head(tmp_path: Path) -> None:
    run = copied(run_of("mae"), tmp_path / "run")
    about = json.loads((run / "config.json").read_text())
    about["config"]["classes"] = 5
    (run / "config.json").write_text(json.dumps(about))
    fx.good(export(run, "hf", tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["ViTModel"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "why"), BAD)
def test_what_a_format_cannot_express_is_named(
    name: str, form: str, why: str, tmp_path: Path
) -> None:
    ran = export(run_of(name), form, tmp_path / "out")
    assert ran.status == 1
    assert why in ran.line
    assert "`student.checkpoint.load_encoder(RUN)`" in ran.line
    assert list(tmp_path.iterdir()) == []


def test_the_function_of_a_refusal_builds_the_module() -> None:
    net, settings = checkpoint.load_encoder(run_of("conv"))
    assert type(net).__name__ == "ConvViT"
    with torch.no_grad():
        assert net.forward_features(images(settings["img_size"])).shape == (3, 16, 48)


@pytest.mark.slow
def test_the_checkpoint_and_the_average_are_those_that_were_asked_for(tmp_path: Path) -> None:
    run = run_of("mae")
    fx.good(export(run, "timm", tmp_path / "one", "--checkpoint", 1))
    fx.good(export(run, "timm", tmp_path / "average", "--ema"))
    saved = {
        step: torch.load(run / f"checkpoints/step-{step:08d}.pt", weights_only=True)
        for step in (1, 2)
    }
    name = "blocks.0.attn.qkv.weight"
    one = load_file(tmp_path / "one/model.safetensors")[name]
    average = load_file(tmp_path / "average/model.safetensors")[name]
    assert torch.equal(one, saved[1]["model"][f"encoder.{name}"])
    assert torch.equal(average, saved[2]["ema"][f"encoder.{name}"])
    assert not torch.equal(one, average)


# --- the comparison -------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_says_on_which_pictures_it_compared(tmp_path: Path) -> None:
    run = run_of("mae")
    made = fx.good(export(run, "timm", tmp_path / "a"))
    assert "compared on a made picture (no --images given): differs by at most" in made.out
    own = fx.good(export(run, "timm", tmp_path / "b", "--images", fx.pictures()))
    assert "compared on 4 pictures of --images (the run's own list)" in own.out
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, pixels in enumerate(photographs(64)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(photos / f"{i}.png")
    other = fx.good(export(run, "timm", tmp_path / "c", "--images", photos))
    assert "compared on 3 pictures of --images (another list)" in other.out


def _changed(form: str, name: str) -> SimpleNamespace:
    """A format that writes one weight wrong, by a thousandth."""
    real = exporting.load(form)

    def write(given: exported.Exported, folder: Path) -> None:
        real.write(given, folder)
        state = load_file(folder / "model.safetensors")
        save_file({**state, name: state[name] * 1.001}, folder / "model.safetensors")

    return SimpleNamespace(**{**vars(real), "write": write})


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("mae", "blocks.3.mlp.fc2.weight"),
        ("vitdet", "backbone.net.blocks.3.mlp.fc2.weight"),
        ("timm", "blocks.3.gamma_1"),
        ("hf", "encoder.layer.0.attention.attention.value.bias"),
    ],
)
def test_a_weight_that_is_off_by_a_thousandth_is_noticed(
    form: str, name: str, tmp_path: Path
) -> None:
    given = exported.read(run_of("cae"), None, False)
    state = given.net.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key in state:  # values that two steps have hardly moved
        if key.endswith(("q_bias", "v_bias", "gamma_1")):
            state[key].copy_(torch.rand(state[key].shape, generator=generator) + 0.5)
    broken: Any = _changed(form, name)
    with pytest.raises(exported.UserError, match="other tokens than the run"):
        export_folder.export(given, broken, tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_many_is_not_read(tmp_path: Path) -> None:
    given = exported.read(run_of("mae"), None, False)
    for form in ("hf", "mae", "timm", "vitdet"):
        real = exporting.load(form)

        def write(given: exported.Exported, folder: Path, real: Any = real) -> None:
            real.write(given, folder)
            state = load_file(folder / "model.safetensors")
            save_file({**state, "strange": torch.zeros(1)}, folder / "model.safetensors")

        broken: Any = SimpleNamespace(**{**vars(real), "write": write})
        with pytest.raises(exported.UserError, match="does not read back"):
            export_folder.export(given, broken, tmp_path / form, None)
    assert list(tmp_path.iterdir()) == []


# --- the card -------------------------------------------------------------------------------------


def _row(**changes: Any) -> str:
    row = {
        "time": "2026-01-01T00:00:00Z", "run": "r", "protocol": "knn", "settings": {},
        "test": "val", "score": 61.5, "interval": [60.0, 63.0], "n_test": 100, "checkpoint": 2,
        **changes,
    }  # fmt: skip
    return json.dumps(row) + "\n"


def copied(run: Path, to: Path) -> Path:
    """A run's config, environment and checkpoints in a folder of its own."""
    (to / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "environment.json"):
        (to / name).write_text((run / name).read_text())
    for path in (run / "checkpoints").iterdir():
        (to / "checkpoints" / path.name).symlink_to(path)
    return to


def test_the_card_is_read_by_the_hub_with_its_scores(tmp_path: Path) -> None:
    run = copied(run_of("mae"), tmp_path / "run")
    rows = [
        _row(score=10.0), _row(), _row(checkpoint=1, score=99.0), _row(ema=True, score=98.0),
        _row(protocol="linear", test="real", score=70.25),
    ]  # fmt: skip
    (run / "results.jsonl").write_text("".join(rows))
    fx.good(export(run, "timm", tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "timm"
    found = [
        (each.metric_name, each.dataset_name, each.metric_value) for each in card.data.eval_results
    ]
    assert found == [
        ("top-1 accuracy, knn", "val", 61.5), ("top-1 accuracy, linear", "real", 70.25),
    ]  # fmt: skip
    identity = json.loads((run / "config.json").read_text())["targets"]["id"]
    for line in (
        "| recipe | `mae` |",
        f"| cache | `{identity}` |",
        f"| teacher | `{fx.TEACHER}` |",
        "| licence of the teacher | `apache-2.0` |",
        "| step | `2` |",
        "| pictures | `24` |",
        "| `linear` | `real` | 70.25 | 60.00 to 63.00 | 100 |",
    ):
        assert line in card.text, line
    assert "`student train --recipe mae --out " in card.text


@pytest.mark.slow
def test_a_fine_tuned_run_has_the_score_of_its_last_weights_alone(tmp_path: Path) -> None:
    run = run_of("mae tuned")
    (line,) = (json.loads(each) for each in (run / "results.jsonl").read_text().splitlines())
    fx.good(export(run, "timm", tmp_path / "out"))
    (result,) = ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert (result.metric_name, result.metric_value) == ("top-1 accuracy, finetune", line["score"])
    # the line's own checkpoint is that of the run before
    early = copied(run, tmp_path / "early")
    (early / "checkpoints" / f"step-{line['checkpoint']:08d}.pt").write_bytes(b"")
    (early / "results.jsonl").write_text((run / "results.jsonl").read_text())
    given = SimpleNamespace(
        run=early, classes=5, record={"recipe": "finetune", "steps": 6}, ema=False,
        step=line["checkpoint"],
    )  # fmt: skip
    assert exported.scores(given) == []  # type: ignore[arg-type]


def test_a_strangers_texts_stay_in_their_place(tmp_path: Path) -> None:
    run = copied(run_of("mae"), tmp_path / "run")
    evil = "x`| \n---\n# heading\x1b[31m <script>"
    about = json.loads((run / "config.json").read_text())
    about["recipe"], about["targets"]["id"] = evil, evil
    (run / "config.json").write_text(json.dumps(about))
    (run / "environment.json").write_text(json.dumps({"command": ["a", evil, 7]}))
    (run / "results.jsonl").write_text(_row(test=evil, protocol=evil))
    ran = fx.good(export(run, "timm", tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    assert "\x1b" not in text + ran.out + ran.err
    assert "\n# heading" not in text
    body = text.split("\n---\n")[1]
    assert body.count("<script>") == 5
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", body)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "timm"
    assert len(card.data.eval_results) == 1


def test_the_cards_python_makes_a_checkpoint_that_maes_code_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fx.good(export(run_of("mae"), "mae", tmp_path / "DIR"))
    text = (tmp_path / "DIR/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    state = torch.load("mae_vit.pth", weights_only=True)["model"]
    assert "blocks.3.attn.qkv.bias" in state


# --- the folder -----------------------------------------------------------------------------------


def test_nothing_of_anybodys_is_overwritten(tmp_path: Path) -> None:
    run = run_of("mae")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for name, why in (("used", "is not empty"), ("link", "is no folder"), ("file", "is no folder")):
        ran = export(run, "timm", tmp_path / name)
        assert (ran.status, why in ran.line) == (1, True)
    assert (tmp_path / "used/mine").read_text() == (tmp_path / "file").read_text() == "mine"
    fx.good(export(run, "timm", tmp_path / "empty"))
    assert sorted(each.name for each in (tmp_path / "empty").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert "is not empty" in export(run, "timm", tmp_path / "empty").line
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file", "link", "used"]


def test_a_card_is_named_after_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("mae").absolute()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fx.good(export(run, "timm", Path()))
    assert "# `here`" in (tmp_path / "here/README.md").read_text()


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("mae")
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = export(run, "hf", tmp_path / "out")
    assert (ran.status, "pip install 'featcache[hf]'" in ran.line) == (1, True)
    fx.good(export(run, "timm", tmp_path / "other"))


def test_an_unknown_format_is_a_mistake(tmp_path: Path) -> None:
    ran = export(run_of("mae"), "tim", tmp_path / "out")
    assert ran.status == 2
    assert "did you mean timm? known: hf, mae, onnx, timm, vitdet" in ran.line
