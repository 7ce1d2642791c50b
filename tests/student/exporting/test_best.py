"""`student export --best` takes the weights of a fine-tuning's best epoch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import student_fixtures as fx
from tests.student.exporting.readers import export, run_of


def test_the_best_weights_of_a_fine_tuning(tmp_path: Path) -> None:
    """The best are made other than the last, so that one is not taken for the other."""
    run = Path(shutil.copytree(run_of("mae tuned"), tmp_path / "run"))
    with safe_open(run / "best.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    weights["encoder.head.bias"] += 0.25
    about = json.dumps({"step": 1, "top1": 12.5})
    save_file(weights, str(run / "best.safetensors"), metadata={"about": about})
    fx.good(export(run, "timm", tmp_path / "out", "--best"))
    found = load_file(tmp_path / "out/model.safetensors")
    assert {f"encoder.{name}" for name in found} == weights.keys()
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in found.items())
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "| epoch | `the best of all, chosen on the test pictures` |" in card.text
    assert "| step | `1` |" in card.text
    assert not card.data.eval_results


@pytest.mark.parametrize("other", [("--checkpoint", "1"), ("--ema",)])
def test_the_best_are_of_one_step(tmp_path: Path, other: tuple[str, ...]) -> None:
    ran = export(run_of("mae tuned"), "timm", tmp_path / "out", "--best", *other)
    assert ran.status == 2
    assert "leave --checkpoint and --ema out" in ran.line
    plain = export(run_of("mae"), "timm", tmp_path / "out", "--best")
    assert plain.status == 1
    assert "was not fine-tuned" in plain.line
