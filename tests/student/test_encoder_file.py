"""RUN/encoder.safetensors: the newest checkpoint's encoder, enough by itself, and read as a
stranger's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featcache.errors import UserError
from student import checkpoint
from tests import finetuning as ft
from tests import student_fixtures as fx

NAME = "encoder.safetensors"


def facts(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as content:
        return json.loads(content.metadata()["about"])


def newest(run: Path) -> dict[str, Any]:
    (*_, path) = sorted((run / "checkpoints").glob("*.pt"))
    return torch.load(path, weights_only=True)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("recipe", ["mae", "cae", "fd", "conv"])
def test_it_is_the_encoder_of_the_newest_checkpoint(recipe: str, tmp_path: Path) -> None:
    run = ft.pretrained(recipe)
    saved, found = newest(run), load_file(run / NAME)
    own = {k: v for k, v in saved["model"].items() if k.startswith("encoder.")}
    assert own.keys() == {f"encoder.{name}" for name in found}
    assert all(torch.equal(own[f"encoder.{name}"], value) for name, value in found.items())
    about = facts(run / NAME)
    record = json.loads((run / "config.json").read_text())
    assert about == {
        "format": "featcache encoder 1",
        "step": saved["step"],
        "recipe": record["recipe"],
        "config": record["config"],
    }
    # by itself, in another folder
    shutil.copy(run / NAME, tmp_path / "mine.safetensors")
    net, told = checkpoint.load_encoder_file(tmp_path / "mine.safetensors")
    expected, _ = checkpoint.load_encoder(run)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net.forward_features(x), expected.forward_features(x))  # type: ignore[operator]
    assert (told, net.training) == (about, False)


@pytest.mark.slow
def test_a_fine_tuned_one_has_its_head(tmp_path: Path) -> None:
    fx.good(ft.finetune("mae", tmp_path / "run"))
    net, told = checkpoint.load_encoder_file(tmp_path / "run" / NAME)
    assert net.head.out_features == told["config"]["classes"] == 5  # type: ignore[union-attr]
    assert torch.equal(net.head.weight, newest(tmp_path / "run")["model"]["encoder.head.weight"])  # type: ignore[union-attr,arg-type]


def test_it_is_replaced_with_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int | None, int]] = []
    real = checkpoint.save_encoder

    def noted(run: Path, *rest: Any) -> None:
        real(run, *rest)
        steps.append((checkpoint.latest_step(run), facts(run / NAME)["step"]))

    monkeypatch.setattr(checkpoint, "save_encoder", noted)
    words = ("--cache", fx.cache_of("mae"), "--steps", 5, "--batch-size", 8, "--save-every", 2)
    fx.good(fx.train("mae", tmp_path / "run", *words))
    assert steps == [(None, 2), (2, 4), (4, 5)]  # the encoder is there before its checkpoint is


def test_a_run_of_an_older_version_has_none(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ft.pretrained("mae"), tmp_path / "run"))
    (run / NAME).unlink()
    checkpoint.load_encoder(run)
    fx.good(fx.stud("export", run, "--format", "timm", "--out", tmp_path / "out"))
    assert not (run / NAME).exists()


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ft.pretrained("mae"), tmp_path / "run"))
    (tmp_path / "other").write_text("mine")
    (run / NAME).unlink()
    (run / NAME).symlink_to(tmp_path / "other")
    words = ("--cache", fx.cache_of("mae"), "--steps", "2", "--batch-size", "8", "--ema", "0.5")
    ran = fx.train("mae", run, *words, "--resume", sets=("lr=0.01",))
    assert (ran.status, "is a link" in ran.line) == (1, True)
    assert (tmp_path / "other").read_text() == "mine"


def _change(
    weights: dict[str, Any], about: dict[str, Any], change: Callable[[Any, Any], None]
) -> dict[str, str]:
    change(weights, about)
    return {"about": json.dumps(about)}


BAD: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "format": (lambda w, a: a.update(format="other"), "not of the format"),
    "step": (lambda w, a: a.update(step="2"), "no step and recipe"),
    "settings": (lambda w, a: a.update(config=[]), "not of the format"),
    "family": (lambda w, a: a["config"].update(family="\x1b[31m"), "family"),
    "size": (lambda w, a: a["config"].update(encoder="vit_large_patch16_224"), "is missing"),
    "missing": (lambda w, a: w.pop("cls_token"), "cls_token is missing"),
    "unknown": (lambda w, a: w.update(x=torch.zeros(1)), "x is unknown"),
    "shape": (lambda w, a: w.update(cls_token=torch.zeros(1, 1, 7)), r"cls_token is \(1, 1, 7\)"),
    "value": (lambda w, a: w["cls_token"].fill_(float("nan")), "not finite"),
}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", BAD)
def test_a_strangers_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, why = BAD[name]
    source = ft.pretrained("mae") / NAME
    weights = {key: value.clone() for key, value in load_file(source).items()}
    metadata = _change(weights, facts(source), change)
    save_file(weights, tmp_path / NAME, metadata=metadata)
    with pytest.raises(UserError, match=why) as caught:
        checkpoint.load_encoder_file(tmp_path / NAME)
    assert "\n" not in str(caught.value)
    assert "give the encoder.safetensors of a run" in str(caught.value)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    source = ft.pretrained("mae") / NAME
    (tmp_path / "link").symlink_to(source.absolute())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cut").write_bytes(source.read_bytes()[:1000])
    (tmp_path / "text").write_text("no weights")
    for name in ("link", "pipe", "cut", "text", "absent"):
        with pytest.raises(UserError, match="is no encoder of a run"):
            checkpoint.load_encoder_file(tmp_path / name)
