"""`student train --resume RUN` goes on by the options that a run records, and a run may be made
longer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import student
from student.checkpoint import read_config
from student.training import metrics
from tests import student_fixtures as fx

WORDS = ("--batch-size", "8", "--save-every", "1", "--seed", "3")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, of three an epoch."""
    out = tmp_path_factory.mktemp("begun") / "run"
    sets = ("warmup_epochs=1", "lr=0.1")
    fx.good(fx.train("mralign", out, "--cache", fx.cache_path(), "--steps", "2", *WORDS, sets=sets))
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def options(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "environment.json").read_text())["options"]
    return found


def record(run: Path, **changes: Any) -> None:
    """Change the options that a run records; None takes one away."""
    path = run / "environment.json"
    about = json.loads(path.read_text())
    given = {**about["options"], **{key.replace("_", "-"): v for key, v in changes.items()}}
    about["options"] = {key: value for key, value in given.items() if value is not None}
    path.write_text(json.dumps(about))


def rows(run: Path) -> list[tuple[float, float]]:
    return [(row["lr"], row["loss"]) for row in metrics.read(run)]


def rate(step: int, total: int) -> float:
    """The published schedule by hand: three steps of warm-up to 0.1, then half a cosine to 1e-5."""
    if step < 3:
        return 0.1 * step / 3
    return 1e-5 + (0.1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (step - 3) / (total - 3)))


@pytest.mark.slow
def test_the_run_goes_on_by_its_own_options_and_may_be_longer(run: Path, begun: Path) -> None:
    before = rows(begun)
    ran = fx.good(fx.stud("train", "--resume", run, "--steps", "6"))
    assert "recipe mralign" in ran.err
    assert "planned for 2 steps and goes on from step 2 to 6" in ran.err
    about = read_config(run)
    assert (about["steps"], about["planned"]) == (6, [{"steps": 2, "done": 2}])
    assert rows(run)[:2] == before
    assert [lr for lr, _ in rows(run)[2:]] == pytest.approx([rate(step, 6) for step in range(2, 6)])
    recorded, old = options(run), options(begun)
    assert {**old, "steps": 6, "resume": True, "out": str(run), "batch-size": None} == {
        **recorded, "batch-size": None,
    }  # fmt: skip
    # what is recorded now serves as well; the lengths before stay on record
    again = fx.good(fx.stud("train", "--resume", run))
    assert "planned" not in again.err
    assert read_config(run) == about
    # in epochs: two of three steps are no more than six
    fx.good(fx.stud("train", "--resume", run, "--epochs", "3"))
    assert read_config(run)["steps"] == 9
    assert read_config(run)["planned"][1:] == [{"steps": 6, "done": 6}]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "1"), "is planned for 2 steps and has made 2, 1 are given; 2 or more are"),
        (("--seed", "4"), "is another run: seed 3 before, 4 now"),
        (("--set", "lr=0.2", "--steps", "4"), "is another run: config.lr 0.1 before, 0.2 now"),
        (("--out", "elsewhere"), "a run goes on in its own folder"),
        (("--config", "x.json"), "one of them is allowed"),
    ],
)
def test_what_may_not_change_is_a_line(
    words: tuple[str, ...], told: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text('{"seed": 4}')
    before = (run / "config.json").read_bytes()
    ran = fx.stud("train", "--resume", run, *words)
    assert ran.status in (1, 2)
    assert told in ran.line
    assert (run / "config.json").read_bytes() == before
    assert not Path("elsewhere").exists()


def test_a_folder_without_its_options_says_what_to_give(run: Path, tmp_path: Path) -> None:
    path = run / "environment.json"
    whole = json.loads(path.read_text())
    for text, told in [
        (json.dumps({**whole, "options": None}), "last made by a Python call"),
        ("{", "environment.json does not say the run's options"),
        (json.dumps({**whole, "options": {"colour": 1}}), "unknown key 'colour'"),
        (json.dumps({**whole, "options": {"steps": "many"}}), "steps: 'many' is not a valid"),
        (json.dumps({**whole, "options": {"workers": [1]}}), "workers"),
    ]:
        path.write_text(text)
        ran = fx.stud("train", "--resume", run)
        assert ran.status in (1, 2)
        assert told in ran.line, ran
        assert str(run) in ran.line
    assert "no run at" in fx.stud("train", "--resume", tmp_path / "nothing").line
    path.write_text(json.dumps(whole))
    assert "give --resume" in fx.stud("train", run).line
    about = json.loads((run / "config.json").read_text())
    about["targets"] = {"kind": "labelled"}
    (run / "config.json").write_text(json.dumps(about))
    assert "student eval finetune" in fx.stud("train", "--resume", run).line


def test_code_that_a_run_folder_names_is_run_only_where_the_command_line_names_it(
    run: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    record(run, recipe=str(mine))
    ran = fx.stud("train", "--resume", run)
    assert "give --recipe there as well" in ran.line
    record(run, recipe="mralign", teacher_name=str(mine))
    assert "give --teacher-name there as well" in fx.stud("train", "--resume", run).line
    record(run, teacher_name=None, teacher="online", cache=None, set={"teacher": str(mine)})
    refused = fx.stud("train", "--resume", run, "--images", fx.pictures())
    assert "only from your own command line" in refused.line
    assert not mine.with_suffix(".ran").exists()
    fx.stud("train", "--resume", run, "--recipe", mine)
    assert mine.with_suffix(".ran").exists()


def test_a_python_call_makes_a_run_longer(run: Path) -> None:
    result = student.train(
        recipe="mralign", cache=fx.cache_path(), out=run, steps=3, batch_size=8, save_every=1,
        seed=3, device="cpu", resume=True,
        settings=[*fx.RECIPES["mralign"], "warmup_epochs=1", "lr=0.1"],
    )  # fmt: skip
    assert result.steps == 3
    assert "last made by a Python call" in fx.stud("train", "--resume", run).line
