"""`--init` begins a run with another encoder's weights, and names what does not fit."""

from __future__ import annotations

from pathlib import Path

import torch

from student.checkpoint import load_encoder, read_config
from tests import student_fixtures as fx

WORDS = ("--batch-size", "4")
SETS = ("patch_size=8",)


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
    assert "no run at" in ran.line
