"""`--size` sets the pixels of a view without a cache, in training and in what evaluates the run."""

from __future__ import annotations

import json
from pathlib import Path

from student.checkpoint import read_config
from tests import student_fixtures as fx


def test_a_run_of_another_size_is_that_of_a_policy_and_is_evaluated_at_it(tmp_path: Path) -> None:
    (policy := tmp_path / "policy.json").write_text(json.dumps({"size": 40}))
    words = ("--images", fx.pictures(), "--steps", "2", "--batch-size", "4")
    sets = ("patch_size=8",)
    sized, named = tmp_path / "sized", tmp_path / "named"
    fx.good(fx.train("mae", sized, *words, "--size", "40", sets=sets))
    fx.good(fx.train("mae", named, *words, "--policy", policy, "--size", "40", sets=sets))
    about = read_config(sized)
    assert about["config"]["img_size"] == about["targets"]["policy"]["size"] == 40
    assert about["targets"]["policy"] == read_config(named)["targets"]["policy"]
    assert fx.losses(sized) == fx.losses(named)
    labelled = fx.save_pictures(tmp_path / "labelled", 12, classes=2)
    ran = fx.good(
        fx.stud(
            "eval", "knn", sized, "--images", labelled, "--test", labelled, "--k", "1", "--json"
        )
    )
    assert json.loads(ran.out)["eval"] == "knn"
    refused = fx.train("mae", tmp_path / "no", *words, "--size", "5000", sets=sets)
    assert "size 5000: 1 to 4096 pixels" in refused.line
    odd = fx.train("mae", tmp_path / "no", *words, "--size", "42", sets=sets)
    assert odd.status in (1, 2)
    assert "42" in odd.line
    assert not (tmp_path / "no").exists()
