"""`student.evaluate` and `student.export` are `student eval` and `student export`: the same scores
and files, refusals as exceptions, nothing on stdout or stderr, progress by a callback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import featcache
import student
from featcache.pictures.open_source import open_source
from student import evals, exporting
from student.commands.eval import command as eval_group
from student.commands.export import command as export_command
from student.setup import eval_parameters
from tests import student_fixtures as fx
from tests.calls import differences, own_program, silence


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A program of its own: no handler of a command's, a home of the test's."""
    fx.fresh_state()
    with own_program(monkeypatch, tmp_path / "home"):
        yield


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures in each of two classes to train on, and five in each to test on."""
    root = tmp_path_factory.mktemp("labelled")
    fx.save_pictures(root / "train", 20, seed=1, classes=2)
    fx.save_pictures(root / "test", 10, seed=2, classes=2)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--steps", "0")
    fx.good(fx.train("mae", out, *words))
    return out


def given(labelled: Path, run: Path) -> dict[str, Any]:
    return {"run": run, "images": labelled / "train", "test": labelled / "test", "device": "cpu"}


def words(labelled: Path, run: Path) -> list[str]:
    return [str(run), "--images", str(labelled / "train"), "--test", str(labelled / "test"),
            "--device", "cpu", "--json"]  # fmt: skip


@pytest.mark.slow
def test_labels_beside_the_pictures_are_those_of_their_text(
    labelled: Path, run: Path, tmp_path: Path
) -> None:
    """A table that exchanges the two classes: right and wrong are exchanged with it."""
    keys = open_source(labelled / "train").keys
    classes = sorted({key.partition("/")[0] for key in keys})
    other = dict(zip(classes, classes[::-1], strict=True))
    table = tmp_path / "table.csv"
    table.write_text("".join(f"{key},{other[key.partition('/')[0]]}\n" for key in keys))
    plain = student.evaluate("knn", **given(labelled, run), k="1")
    beside = student.evaluate("knn", **given(labelled, run), k="1", labels=table)
    assert beside.top1 == pytest.approx(100 - plain.top1)
    assert plain.top1 != 50
    ran = fx.good(fx.stud("eval", "knn", *words(labelled, run), "--k", "1", "--labels", table))
    told = given(labelled, run) | {"images": f"{labelled}/train#labels={table}"}
    by_text = student.evaluate("knn", **told, k="1")
    assert ran.json["settings"] == by_text.facts["settings"] == beside.facts["settings"]
    assert ran.json["top1"] == by_text.top1 == beside.top1


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", evals.names())
def test_the_call_has_what_all_protocols_have(protocol: str) -> None:
    """Nothing that it names is another option, or has another default; the rest is checked as it is
    given."""
    found = eval_group.get_command(click.Context(eval_group), protocol)
    assert found is not None
    told = differences(student.evaluate, found.params, ["protocol"])
    assert [line for line in told if not line.endswith(" is missing")] == []


def test_export_has_every_option_with_its_default() -> None:
    assert differences(student.export, export_command.params) == []
    assert exporting.names() == ["hf", "mae", "onnx", "timm", "vitdet"]


@pytest.mark.parametrize("protocol", evals.names())
def test_an_unknown_option_lists_those_of_the_protocol(protocol: str) -> None:
    with pytest.raises(featcache.UsageError) as caught:
        student.evaluate(protocol, run="r", images="i", imgaes="x")
    told = str(caught.value)
    assert told.startswith(f"{protocol} has no option 'imgaes': did you mean images")
    module = evals.load(protocol)
    assert all(f" {key}" in told for key in getattr(module, "OPTIONS", ["epochs"]))
    assert len(eval_parameters.parameters(module)) > 10


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"k": 0.5}, featcache.UsageError, "cannot vote with --k 0.5"),
        ({"k": None}, featcache.UsageError, "Invalid value for k: None is no text."),
        ({"embed_batch": 0}, featcache.UsageError,
         "Invalid value for embed_batch: 0 is not in the range 1<=x<=65536."),
        ({"crop_pct": float("nan")}, featcache.UsageError,
         "Invalid value for crop_pct: nan is no finite number"),
        ({"shots": True}, featcache.UsageError, "Invalid value for shots: True is no number."),
        ({"keep": "no"}, featcache.UsageError,
         "Invalid value for keep: 'no' is neither True nor False."),
        ({"pool": "max"}, featcache.UserError, "max"),
        ({"teacher": "clip-b16"}, featcache.UsageError, "either RUN, a run folder, or --teacher"),
        ({"blocks": 9}, featcache.UsageError, "--blocks 9"),
        ({"images": None}, featcache.UsageError, "no pictures given"),
        ({"test": "not/there"}, featcache.UserError, "not/there"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_an_exception_and_nothing_is_printed(
    labelled: Path, run: Path, changes: dict[str, Any], kind: type[Exception], told: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    silence()
    capfd.readouterr()
    with pytest.raises(kind) as caught:
        student.evaluate("knn", **{**given(labelled, run), **changes})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_protocol() -> None:
    with pytest.raises(featcache.UsageError, match="knn"):
        student.evaluate("kmn")


# --- scores ---------------------------------------------------------------------------------------


def test_knn_as_the_command_has_it(
    labelled: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = fx.good(fx.stud("eval", "knn", *words(labelled, run), "--k", "3"))
    silence()
    capfd.readouterr()
    seen: list[featcache.Progress] = []
    threads = set()

    def note(now: featcache.Progress) -> None:
        seen.append(now)
        threads.add(threading.current_thread())

    result = student.evaluate("knn", **given(labelled, run), k=3, keep=False, progress=note)
    assert capfd.readouterr() == ("", "")
    facts = json.loads(json.dumps(result.facts))
    assert {**facts, "seconds": 0} == {**ran.json, "seconds": 0}
    (score,) = result.scores.values()
    (printed,) = ran.json["tests"].values()
    assert (score.top1, list(score.interval), score.n_test) == (
        printed["top1"], printed["interval"], 10,
    )  # fmt: skip
    assert (result.top1, score.top5, set(score.per_class)) == (score.top1, None, {"c0", "c1"})
    stages = {now.stage: (now.done, now.total) for now in seen}
    assert {total for _, total in stages.values()} >= {20, 10}
    assert all(done == total for done, total in stages.values())
    assert threads == {threading.current_thread()}


def test_two_test_sets_and_a_sweep(labelled: Path, run: Path) -> None:
    tests = [f"a={labelled / 'test'}", f"b={labelled / 'train'}"]
    result = student.evaluate("knn", **{**given(labelled, run), "test": tests}, k=[1, 3])
    assert list(result.scores) == ["a", "b"]
    assert [score.n_test for score in result.scores.values()] == [10, 20]


def test_what_a_callback_raises_ends_the_evaluation(
    labelled: Path, run: Path, tmp_path: Path
) -> None:
    def fail(now: featcache.Progress) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        student.evaluate("knn", **given(labelled, run), progress=fail, embed_batch=4)
    left = [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert left == [tmp_path / "home/runs.jsonl"]  # what it cost until then
    assert json.loads(left[0].read_text())["outcome"] == "failed"
    assert student.evaluate("knn", **given(labelled, run), embed_batch=4).scores


@pytest.mark.slow
def test_finetune(
    labelled: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    silence()
    capfd.readouterr()
    options: dict[str, Any] = {
        **given(labelled, run), "out": tmp_path / "tuned", "epochs": 2, "batch_size": 10,
        "settings": {"warmup_epochs": 0},
    }  # fmt: skip
    shown = student.evaluate("finetune", **options, show=True)
    assert (shown.scores, shown.facts["warmup_epochs"], shown.facts["epochs"]) == ({}, 0, 2)
    (tmp_path / "own.json").write_text('{"layer_decay": 0.5}')
    shown = student.evaluate("finetune", **options, show=True, config=tmp_path / "own.json")
    assert (shown.facts["warmup_epochs"], shown.facts["layer_decay"]) == (0, 0.5)
    planned = student.evaluate("finetune", **options, dry_run=True)
    assert (planned.scores, planned.facts["steps"]) == ({}, 4)
    assert not (tmp_path / "tuned").exists()
    result = student.evaluate("finetune", **options, progress=lambda now: seen.append(now.done))
    assert seen == [1, 2, 3, 4]
    assert (result.protocol, len(result.scores), result.facts["step"]) == ("finetune", 1, 4)
    assert capfd.readouterr() == ("", "")


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_as_the_command_has_it(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--format", "timm", "--out", tmp_path / "a", "--json")
    ran = fx.good(fx.stud("export", run, *options))
    silence()
    capfd.readouterr()
    result = student.export(run=run, format="timm", out=tmp_path / "b")
    assert capfd.readouterr() == ("", "")
    assert {**result.facts, "out": ""} == {**ran.json, "out": ""}
    assert (result.out, result.step) == (tmp_path / "b", 0)
    assert result.difference < 1e-6
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(featcache.UserError, match="--out"):
        student.export(run=run, format="timm", out=tmp_path / "b")
    with pytest.raises(
        featcache.UsageError, match="Invalid value for format: 'onyx' given; did you mean onnx"
    ):
        student.export(run=run, format="onyx", out=tmp_path / "c")  # type: ignore[arg-type]
    with pytest.raises(featcache.UserError, match="not/there"):
        student.export(run="not/there", format="mae", out=tmp_path / "c")
    assert not (tmp_path / "c").exists()
