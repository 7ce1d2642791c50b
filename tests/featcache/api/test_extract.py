"""`featcache.extract` is `featcache extract`: the same bytes, refusals as exceptions, nothing on
stdout or stderr, and progress by a callback."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import featcache
from featcache.cli import cli
from featcache.commands.extract import command
from featcache.extraction import launcher
from tests.calls import differences, own_program, silence
from tests.conftest import SYNTHETIC, Ran, files_below, python

Command = Callable[..., Ran]
LOGGER = logging.getLogger("featcache")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A program of its own: no handler of a command's, a home of the test's."""
    with own_program(monkeypatch, tmp_path / "home"):
        yield


def small(photos: Path, out: Path | None, **changes: Any) -> featcache.ExtractResult:
    return featcache.extract(
        **{"teacher": SYNTHETIC, "images": photos, "out": out, "size": 28, "levels": "all",
           "views": 2, "rows_per_shard": 4, "batch_size": 4, "workers": 2, **changes}
    )  # fmt: skip


WORDS = (
    "--size", 28, "--levels", "all", "--views", 2, "--rows-per-shard", 4, "--batch-size", 4,
    "--workers", 2,
)  # fmt: skip


def test_the_call_has_every_option_with_its_default() -> None:
    assert differences(featcache.extract, command.params) == []


def test_a_difference_is_told() -> None:
    def other(*, teacher: str = (), views: str = 2, store: str = "zarr", more: int = 0) -> None: ...  # type: ignore[assignment]

    told = differences(other, command.params)
    assert "more is no option" in told
    assert "images is missing" in told
    assert "views=2, 1 by the option" in told
    assert "views is <class 'str'>, <class 'int'> by the option" in told
    assert any(line.startswith("store: set() and {") for line in told)


def test_it_writes_the_bytes_of_the_command(
    photos: Path, tmp_path: Path, featcache_command: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def wanted(folder: Path) -> dict[str, bytes]:
        return {name: data for name, data in files_below(folder).items() if "lock" not in name}

    ran: Ran = featcache_command(
        "extract", "--teacher", SYNTHETIC, "--images", photos, "--out", tmp_path / "by command",
        *WORDS, "--json",
    )  # fmt: skip
    assert ran.status == 0
    silence()
    result = small(photos, tmp_path / "by call")
    assert wanted(tmp_path / "by call") == wanted(tmp_path / "by command")
    assert (result.cache, result.complete, result.new_pictures) == (tmp_path / "by call", True, 11)
    varying = {"cache", "pictures_per_s", "slowest"}
    printed = json.loads(ran.out)
    facts = json.loads(json.dumps(result.facts))
    assert {k: v for k, v in facts.items() if k not in varying} == {
        k: v for k, v in printed.items() if k not in varying
    }
    assert capfd.readouterr() == ("", "")
    assert featcache.open(tmp_path / "by call").read([0], view=1)["features"].shape[0] == 1


def test_again_there_is_nothing_to_do(photos: Path, tmp_path: Path) -> None:
    assert small(photos, tmp_path / "c").new_pictures == 11
    again = small(photos, tmp_path / "c")
    assert (again.new_pictures, again.complete) == (0, True)
    assert small(photos, tmp_path / "c", dry_run=True).facts["new_bytes"] == 0


def test_two_views_more(photos: Path, tmp_path: Path) -> None:
    small(photos, tmp_path / "c")
    more = small(photos, tmp_path / "c", views=3, add=True)
    assert (more.new_pictures, more.facts["added"]) == (11, True)
    nothing = small(photos, tmp_path / "c", views=3, add=True)
    assert (nothing.cache, nothing.complete, nothing.new_pictures) == (tmp_path / "c", True, 0)


def test_recipes_that_read_no_cache(capfd: pytest.CaptureFixture[str]) -> None:
    result = featcache.extract(for_="mae", images="nowhere")
    assert (result.cache, result.complete, result.new_pictures) == (None, True, 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"views": 0}, featcache.UsageError,
         "Invalid value for views: 0 is not in the range 1<=x<=1000000000."),
        ({"teacher": "clip-b61"}, featcache.UsageError, "did you mean clip-b16"),
        ({"teacher": ()}, featcache.UsageError, "no teacher given: --teacher is one of"),
        ({"images": None}, featcache.UsageError, "no pictures given: --images SRC is"),
        ({"levels": [9]}, featcache.UsageError, "--levels '9'"),
        ({"scale": (2, 3)}, featcache.UsageError, "scale"),
        ({"device": "cpu", "devices": "cpu"}, featcache.UsageError, "one of them is allowed"),
        ({"add": True, "home": True}, featcache.UsageError, "--add adds to a cache"),
        ({"shard": "3/2"}, featcache.UsageError, "--shard '3/2'"),
        ({"images": "not/there"}, featcache.UserError, "not/there"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_an_exception_and_nothing_is_printed(
    photos: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], told: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = {"out": None} if changes.pop("home", False) else {"out": tmp_path / "c"}
    with pytest.raises(kind, match=re.escape(told)) as caught:
        small(photos, **out, **changes)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "c").exists()


def test_progress_counts_every_picture(photos: Path, tmp_path: Path) -> None:
    seen: list[featcache.Progress] = []
    threads = set()

    def note(now: featcache.Progress) -> None:
        seen.append(now)
        threads.add(threading.current_thread())

    # 11 pictures in shards of 4, 4 and 3; 2 views each, batches of 4 views: 2, 2, 2 batches, the
    # last of a shard's calls once more when the shard is whole
    small(photos, tmp_path / "c", progress=note)
    assert [now.done for now in seen] == [2, 4, 4, 6, 8, 8, 10, 11, 11]
    assert {(now.stage, now.total, now.loss) for now in seen} == {("extract", 11, None)}
    assert all(now.rate is not None and now.rate > 0 for now in seen)
    assert threads == {threading.current_thread()}
    seen.clear()
    small(photos, tmp_path / "c", progress=note)
    assert seen == []


def test_what_a_callback_raises_ends_the_work_in_order(photos: Path, tmp_path: Path) -> None:
    small(photos, tmp_path / "whole")

    def fail(now: featcache.Progress) -> None:
        if now.done > 4:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        small(photos, tmp_path / "c", progress=fail)
    records = sorted(path.name for path in (tmp_path / "c/shards").glob("0*.json"))
    assert records == ["000000.json"]
    assert [n for n in files_below(tmp_path / "c") if n.startswith("shards/000001")] == []
    assert small(photos, tmp_path / "c").new_pictures == 7
    assert files_below(tmp_path / "c") == files_below(tmp_path / "whole")


def test_ctrl_c_is_a_stopped_error(photos: Path, tmp_path: Path) -> None:
    def stop(now: featcache.Progress) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(featcache.StoppedError, match=r"0 of 3 shards .* are complete"):
        small(photos, tmp_path / "c", progress=stop)


def test_no_signal_handler_is_changed(photos: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    found: list[Any] = []

    def look(now: featcache.Progress) -> None:
        found.append([signal.getsignal(number) for number in numbers])

    small(photos, tmp_path / "c", progress=look)
    assert all(each == before for each in found)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.slow
def test_in_threads_and_in_a_running_loop(photos: Path, tmp_path: Path) -> None:
    done: dict[str, featcache.ExtractResult] = {}
    threads = [
        threading.Thread(target=lambda n=n: done.update({n: small(photos, tmp_path / n)}))
        for n in ("a", "b")
    ]
    for thread in threads:
        thread.start()

    async def cell() -> featcache.ExtractResult:
        await asyncio.sleep(0)
        return small(photos, tmp_path / "c")

    done["c"] = asyncio.run(cell())
    for thread in threads:
        thread.join()
    assert {name: result.new_pictures for name, result in done.items()} == dict.fromkeys("abc", 11)
    assert files_below(tmp_path / "a") == files_below(tmp_path / "c") == files_below(tmp_path / "b")


def test_notes_go_to_the_logger(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small(photos, tmp_path / "c", batch_size=4)
    assert caplog.messages == []
    small(photos, tmp_path / "c", batch_size=5)
    (told,) = caplog.records
    assert (told.name, told.levelname) == ("featcache", "WARNING")
    assert told.getMessage().startswith("--batch-size 5: ")
    assert "was begun with 4" in told.getMessage()
    caplog.clear()
    small(photos, tmp_path / "c", batch_size=32)  # as where none is given
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_other_devices_get_words_of_their_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process's own command line is a notebook's, or pytest's: it is not run again."""
    small(photos, tmp_path / "whole")
    started: list[list[str]] = []
    start = launcher._start

    def seen(words: list[str], *files: Any) -> Any:
        started.append(words)
        return start(words, *files)

    monkeypatch.setattr(launcher, "_start", seen)
    small(photos, tmp_path / "c", devices="cpu,cpu", check_teacher=None, scale=(0.2, 1))
    (words,) = started
    program = click.Context(cli, **cli.context_settings)
    options = command.make_context("extract", words[1:], parent=program).params
    assert words[0] == "extract"
    assert (options["device"], options["devices"], options["labelled"]) == ("cpu", None, None)
    assert (options["names"], options["out"]) == ((SYNTHETIC,), tmp_path / "c")
    assert (options["scale"], options["levels"]) == ((0.2, 1.0), ("all",))
    assert featcache.open(tmp_path / "c").unfinished == []
    assert files_below(tmp_path / "c") == files_below(tmp_path / "whole")


@pytest.mark.slow
def test_other_devices_of_a_command_with_a_file_check_nothing_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featcache_command: Command
) -> None:
    """What --config says is said to them as options: devices and the check are left out."""
    started: list[list[str]] = []
    start = launcher._start

    def seen(words: list[str], *files: Any) -> Any:
        started.append(words)
        return start(words, *files)

    monkeypatch.setattr(launcher, "_start", seen)
    path = tmp_path / "extract.yaml"
    path.write_text(
        f"teacher: {SYNTHETIC}\nsize: 28\nlevels: all\ndevices: 'cpu,cpu'\nbatch-size: 32\n"
    )
    ran = featcache_command(
        "extract", "--config", path, "--images", photos, "--out", tmp_path / "c"
    )
    assert ran.status == 0, ran.err
    (words,) = started
    assert words[-3:] == ["--batch-size=32", "--device", "cpu"]
    assert [word for word in words if word.startswith(("--devices", "--config"))] == []


@pytest.mark.slow
def test_importing_needs_neither_torch_nor_click() -> None:
    code = (
        "import sys, featcache; slow = {'torch', 'click', 'numpy'} & set(sys.modules); "
        "print(sorted(slow), 'extract' in dir(featcache), featcache.extract.__name__, "
        "'torch' in sys.modules)"
    )
    assert python(code).stdout == "[] True extract False\n"


def test_help_shows_the_keywords() -> None:
    assert "batch_size: 'int' = 32" in str(inspect.signature(featcache.extract))
    assert "Raises UsageError" in (featcache.extract.__doc__ or "")
    assert not hasattr(featcache, "no_such_name")


def test_a_program_without_logging_hears_nothing() -> None:
    code = (
        "import logging, featcache, student\n"
        "for name in ('featcache', 'student'):\n"
        "    logging.getLogger(name).warning('x')\n"
    )
    ran = python(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
