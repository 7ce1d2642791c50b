"""The quick start without its work: what it would run, what it tells, and when it fails. CI runs it
for real."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from featcache import cli as featcache_cli
from featcache.errors import UsageError, UserError
from pipelines import digits, quickstart, quickstart_table
from pipelines.quickstart import REDUCED, Plan
from pipelines.seeds import parse_seeds
from student import cli as student_cli

ENVIRONMENT = {"device": "cpu", "torch": "2", "commit": None}


def rows(mralign: float, untrained: float = 50.0) -> dict[str, quickstart.Row]:
    """The rows of one seed: linear 10 above k-NN, the mean of the patches 1 below [CLS]."""
    knn = {"teacher": 90.0, "untrained": untrained, "mralign": mralign, "control": 55.0}
    found: dict[str, quickstart.Row] = {
        name: {
            "knn": value, "knn_mean": value - 1, "linear": value + 10, "linear_mean": value + 9,
            "train_s": 7.4,
        }
        for name, value in knn.items()
    }  # fmt: skip
    found["mralign"] |= {"extract_s": 12.0, "cache_bytes": 1234567}
    return found


def test_margins_are_points_above_each_other_student() -> None:
    points = quickstart_table.margins({0: rows(80.0), 1: rows(70.5)})
    both = {"knn": [30.0, 20.5], "knn_mean": [30.0, 20.5]}
    assert points["untrained"] == {**both, "linear": [30.0, 20.5], "linear_mean": [30.0, 20.5]}
    assert points["control"]["knn"] == [25.0, 15.5]


def test_the_report_of_one_seed() -> None:
    text = quickstart_table.report({0: rows(80.0)}, ENVIRONMENT, Plan().length, 333.3)
    lines = [re.sub(r" +", " ", line) for line in text.splitlines()]
    assert "| mralign student | 80.0 | 79.0 | 90.0 | 89.0 | 12 | 7 | 1,234,567 |" in lines
    assert "| untrained student | 50.0 | 49.0 | 60.0 | 59.0 | - | 7 | - |" in lines
    assert (
        "- mralign student less untrained student, in points: +30.0 k-NN [CLS], +30.0 k-NN mean, "
        "+30.0 linear [CLS], +30.0 linear mean" in lines
    )
    assert "Seeds 0 (14 epochs); 333 s in all" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1


def test_the_report_of_several_seeds_has_means_and_spreads() -> None:
    text = quickstart_table.report({0: rows(80.0), 1: rows(82.0)}, ENVIRONMENT, REDUCED.length, 1.0)
    assert "81.0 ± 1.4" in text
    assert "+31.0 ± 1.4 k-NN [CLS]" in text
    assert "reduced: too short" in text


def test_two_deviations_are_enough_and_less_is_an_error() -> None:
    """Of 397 pictures: the root of (50 x 50 + 57 x 43) / 397 is 3.53 points, that of
    (60 x 40 + 66.5 x 33.5) / 397 is 3.41."""
    quickstart_table.judge({0: rows(57.1)})
    with pytest.raises(
        UserError, match=r"mralign is \+7.0 points of k-NN \[CLS\] above .* at least \+7.1"
    ) as error:
        quickstart_table.judge({0: rows(57.0)})
    assert error.value.exit_status == 1
    weak = rows(60.0)
    weak["mralign"]["linear"] = 66.5
    with pytest.raises(UserError, match=r"\+6.5 points of linear \[CLS\] .* at least \+6.8"):
        quickstart_table.judge({0: weak})
    quickstart_table.judge({0: weak, 1: rows(60.0)})  # the mean of the seeds counts
    assert Plan().enforced
    assert not REDUCED.enforced


def test_a_control_that_was_not_asked_for_is_not_told() -> None:
    found = rows(80.0)
    del found["control"]
    assert list(quickstart_table.margins({0: found})) == ["untrained"]
    assert "untrained teacher" not in quickstart_table.report(
        {0: found}, ENVIRONMENT, Plan().length, 1.0
    )


def test_options_exist_in_the_commands(tmp_path: Path) -> None:
    train = quickstart.train_arguments("mralign", tmp_path, "SRC", tmp_path, 0, Plan())
    extract = quickstart.extract_arguments("SRC", "random:0", tmp_path, 0, Plan())
    scores = quickstart.eval_arguments("linear", "mean", [tmp_path], "SRC", "OTHER", 0)
    teacher = quickstart.digits_arguments(tmp_path, 0, Plan())
    evals = student_cli.cli.get_command(click.Context(student_cli.cli), "eval")
    assert isinstance(evals, click.Group)
    for arguments, command in (
        (teacher, digits.cli),
        (train, student_cli.cli.get_command(click.Context(student_cli.cli), "train")),
        (extract, featcache_cli.cli.get_command(click.Context(featcache_cli.cli), "extract")),
        (scores, evals.get_command(click.Context(evals), "linear")),
    ):
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in map(str, arguments) if word.startswith("--")} <= known


def test_a_command_is_shown_run_and_timed(capfd: pytest.CaptureFixture[str]) -> None:
    said, seconds = quickstart.run("this")
    assert "Zen of Python" in said
    assert seconds >= 0
    out = capfd.readouterr().out
    assert out.startswith("\n$ python -m this\n")
    assert said in out


def test_a_failing_command_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"`python -m student eval none \.\.\.` failed with exit status 2"
    ):
        quickstart.run("student", "eval", "none", "somewhere")
    assert "unknown command 'none': known: attentive" in capfd.readouterr().err


def test_only_its_own_folder_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quickstart._clear(out)
    (out / "seed-0").mkdir()
    (out / "results.md").write_text("old")
    mine = {"notes.txt", "seed-notes", "seed-1", "results.xlsx", "seed-2"}
    for name in mine - {"seed-2"}:
        (out / name).write_text("mine")
    (out / "seed-2").symlink_to(tmp_path)
    quickstart._clear(out)
    assert {path.name for path in out.iterdir()} == {quickstart.MARKER, *mine}
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years")
    with pytest.raises(UserError, match="did not write"):
        quickstart._clear(tmp_path / "home")
    with pytest.raises(UserError, match="did not write"):
        quickstart._clear(tmp_path / "home/thesis.tex")


@pytest.mark.parametrize("text", ["0,0", "a", "1,", "-1"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(UsageError, match="different whole numbers"):
        parse_seeds(text)
    assert parse_seeds("0,2,1") == [0, 2, 1]
