"""`student.train` is `student train`: the same numbers, refusals as exceptions, nothing on stdout
or stderr, progress by a callback, and a process that is afterwards as it was."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import featcache
import student
from student import checkpoint
from student.commands.train import command
from tests import processes
from tests import student_fixtures as fx
from tests.calls import differences, own_program, silence


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A program of its own: no handler of a command's, a home of the test's."""
    fx.cache_path()  # which a command makes
    fx.fresh_state()
    with own_program(monkeypatch, tmp_path / "home"):
        yield


SETTINGS = {
    "encoder": fx.ENCODER, "warmup_epochs": 0, "lr": 0.003, "level_weights": "top:3",
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4,
}  # fmt: skip


def small(out: Path, **changes: Any) -> student.TrainResult:
    return student.train(
        **{"recipe": "mralign", "cache": fx.cache_path(), "images": fx.pictures(), "out": out,
           "settings": SETTINGS, "batch_size": 8, "steps": 4, "device": "cpu", **changes}
    )  # fmt: skip


def test_the_call_has_every_option_with_its_default() -> None:
    assert differences(student.train, command.params) == []


def test_it_trains_as_the_command_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--batch-size", "8")
    ran = fx.good(fx.train("mralign", tmp_path / "a", *words, "--steps", "4", "--json"))
    silence()
    capfd.readouterr()
    result = small(tmp_path / "b")
    assert capfd.readouterr() == ("", "")
    assert (result.run, result.steps) == (tmp_path / "b", 4)
    assert fx.losses(tmp_path / "b") == fx.losses(tmp_path / "a")
    assert result.loss == fx.losses(tmp_path / "b")[-1]
    facts = json.loads(json.dumps(result.facts))
    assert {**ran.json, "run": None} == {**facts, "run": None}
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert a == b
    first, second = (checkpoint.load_latest(tmp_path / name)["model"] for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_progress_counts_every_step(tmp_path: Path) -> None:
    seen: list[featcache.Progress] = []
    threads = set()

    def note(now: featcache.Progress) -> None:
        seen.append(now)
        threads.add(threading.current_thread())

    small(tmp_path / "run", progress=note)
    assert [(now.stage, now.done, now.total) for now in seen] == [
        ("train", done, 4) for done in (1, 2, 3, 4)
    ]
    assert [now.loss for now in seen] == fx.losses(tmp_path / "run")
    assert all(now.rate is not None and now.rate > 0 for now in seen)
    assert threads == {threading.current_thread()}


@pytest.mark.slow
def test_what_a_callback_raises_ends_the_run_and_its_checkpoint_stays(tmp_path: Path) -> None:
    small(tmp_path / "whole", steps=6)

    def fail(now: featcache.Progress) -> None:
        if now.done == 5:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        small(tmp_path / "run", steps=6, save_every=3, progress=fail)
    assert checkpoint.latest_step(tmp_path / "run") == 3
    again = small(tmp_path / "run", steps=6, save_every=3, resume=True)
    assert (again.steps, again.facts["first_step"]) == (6, 3)
    assert fx.losses(tmp_path / "run") == fx.losses(tmp_path / "whole")


def test_a_callback_that_raises_at_once_leaves_no_folder(tmp_path: Path) -> None:
    def fail(now: featcache.Progress) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        small(tmp_path / "run", progress=fail)
    found = (
        sorted(p.name for p in (tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else []
    )
    assert [name for name in found if name.endswith(".tmp")] == []
    assert small(tmp_path / "run", resume=True).facts["first_step"] == 0


def test_ctrl_c_is_a_stopped_error_with_a_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop(now: featcache.Progress) -> None:
        if now.done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(featcache.StoppedError, match=r"stopped after step [23] of 4 by SIGINT"):
        small(tmp_path / "run", progress=stop)
    assert checkpoint.latest_step(tmp_path / "run") in (2, 3)
    assert capfd.readouterr() == ("", "")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    small(tmp_path / "run", resume=True)


def test_a_thread_installs_no_handler_and_a_second_training_is_refused(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    refused: list[str] = []
    done: list[student.TrainResult] = []

    def look(now: featcache.Progress) -> None:
        assert [signal.getsignal(number) for number in numbers] == before
        if not refused:
            with pytest.raises(featcache.UserError) as caught:
                small(tmp_path / "second")
            refused.append(str(caught.value))

    thread = threading.Thread(target=lambda: done.append(small(tmp_path / "run", progress=look)))
    thread.start()
    thread.join()
    assert [result.steps for result in done] == [4]
    assert refused[0].startswith("another training runs in this process, and one at a time")
    assert not (tmp_path / "second").exists()


def test_in_a_running_loop(tmp_path: Path) -> None:
    async def cell() -> student.TrainResult:
        await asyncio.sleep(0)
        return small(tmp_path / "run")

    assert asyncio.run(cell()).steps == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_another_precision_and_a_program_with_an_accelerate_of_its_own(tmp_path: Path) -> None:
    mine = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    one = small(tmp_path / "fp32", precision="fp32")
    two = small(tmp_path / "bf16", precision="bf16")
    configs = [json.loads((Path(str(r.run)) / "config.json").read_text()) for r in (one, two)]
    assert [config["precision"] for config in configs] == ["no", "bf16"]
    assert one.loss != two.loss
    assert mine.mixed_precision == "bf16"
    assert mine.state._shared_state is AcceleratorState._shared_state
    assert (AcceleratorState().mixed_precision, PartialState().initialized) == ("bf16", True)
    assert mine.gradient_state.num_steps == GradientState().num_steps == 3


def test_generators_and_flags_are_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    small(tmp_path / "run", deterministic=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = small(tmp_path / "run", dry_run=True)
    assert (found.run, found.steps, found.loss) == (None, 4, None)
    assert found.facts["memory"]
    assert not (tmp_path / "run").exists()


def test_notes_go_to_the_logger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="student"):
        small(tmp_path / "run", settings={**SETTINGS, "warmup_epochs": 3})
    told = {(r.name, r.levelname, r.getMessage().split(":")[0]) for r in caplog.records}
    assert ("student", "INFO", "recipe mralign") in told
    assert ("student", "WARNING", "warm-up (9 steps) is not shorter than the run (4)") in told
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"recipe": None}, featcache.UsageError, "Invalid value for recipe: None is no text."),
        ({"recipe": "mralinn"}, featcache.UsageError, "did you mean mralign"),
        ({"batch_size": 0}, featcache.UsageError,
         "Invalid value for batch_size: 0 is not in the range 1<=x<=65536."),
        ({"seed": -1}, featcache.UsageError, "Invalid value for seed: -1 is not in the range"),
        ({"seed": 1.5}, featcache.UsageError,
         "Invalid value for seed: '1.5' is not a valid integer range."),
        ({"ema": float("nan")}, featcache.UsageError,
         "Invalid value for ema: nan is no finite number"),
        ({"ema": 1}, featcache.UsageError, "Invalid value for ema: 1.0 is not in the range 0<x<1."),
        ({"sampling": "blocks"}, featcache.UsageError,
         "Invalid value for sampling: 'blocks' given; did you mean block?"),
        ({"resume": 1}, featcache.UsageError, "Invalid value for resume: 1 is neither True nor"),
        ({"cache": 3}, featcache.UsageError, "Invalid value for cache: 3 is no path."),
        ({"tracker": ["json", "x"]}, featcache.UsageError, "tracker: 'x' given; known: json"),
        ({"precision": "fp8"}, featcache.UsageError, "precision: 'fp8' given"),
        ({"settings": {"learning_rate": 1}}, featcache.UsageError, "learning_rate"),
        ({"settings": {"lr": object}}, featcache.UsageError,
         "Invalid value for settings: 'lr': <class 'object'> is no plain value; give a number"),
        ({"settings": "lr"}, featcache.UsageError, "cannot read setting 'lr': given no '='"),
        ({"epochs": 2}, featcache.UsageError, "--epochs 2 and --steps 4: one of them is allowed"),
        ({"cache": "not/there"}, featcache.UserError, "not/there"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_an_exception_and_nothing_is_printed(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], told: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fx.cache_path()
    capfd.readouterr()
    with pytest.raises(kind) as caught:
        small(tmp_path / "run", **changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("decoder_width: 48\nlr: 0.001\n")
    settings = {key: value for key, value in SETTINGS.items() if key != "decoder_width"}
    small(tmp_path / "run", config=tmp_path / "own.yaml", settings=settings, steps=0)
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (config["decoder_width"], config["lr"]) == (48, 0.003)  # `settings` win
    with pytest.raises(featcache.UserError, match="not/there"):
        small(tmp_path / "other", config="not/there.json")


def test_settings_as_texts_and_as_a_mapping_are_the_same(tmp_path: Path) -> None:
    texts = [f"{key}={value}" for key, value in SETTINGS.items()]
    small(tmp_path / "a", settings=texts, steps=0)
    small(tmp_path / "b", settings={**SETTINGS, "decoder_depth": np.int64(1)}, steps=0)
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert a["config"] == b["config"]
    assert a["config"]["decoder_width"] == 32


PROCESS = """
import json, sys
import featcache, student

steps = []

def train(precision):
    return student.train(
        recipe="mralign", cache={cache!r}, images={images!r}, settings={settings!r}, steps=4,
        out={out!r} + "/" + precision, batch_size=4, device="cpu", precision=precision,
        progress=lambda now: steps.append(now.done),
    )

train("fp32")
done = train("bf16")
try:
    train("fp8")
except featcache.UserError as error:
    print(json.dumps([steps, done.steps, str(error)]))
sys.exit(0)
"""


@pytest.mark.slow
def test_two_trainings_in_two_processes(tmp_path: Path) -> None:
    given = {"cache": str(fx.cache_path()), "images": str(fx.pictures())}
    code = PROCESS.format(**given, settings=SETTINGS, out=str(tmp_path / "two"))
    ran = processes.student(2, ["recipes"], code)
    assert ran.status == [0, 0], ran.said
    told = [json.loads(said.splitlines()[-1]) for said in ran.said]
    # the first process calls back; a mistake is an exception in both
    assert [steps for steps, *_ in told] == [[1, 2, 3, 4] * 2, []]
    assert {tuple(rest) for _, *rest in told} == {
        (4, "Invalid value for precision: 'fp8' given; known: auto, bf16, fp16, fp32")
    }
    small(tmp_path / "one")
    np.testing.assert_allclose(
        fx.losses(tmp_path / "two/fp32"), fx.losses(tmp_path / "one"), rtol=1e-5
    )
    config = json.loads((tmp_path / "two/bf16/config.json").read_text())
    assert (config["precision"], config["running"]["processes"]) == ("bf16", 2)
