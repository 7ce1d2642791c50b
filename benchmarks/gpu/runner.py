"""The runner gives each measurement its time box, in a process that may fail or hang.

One process takes measurement after measurement, since importing torch and waking a GPU costs
seconds; whatever fails or is ended costs that process, and the next measurement gets a fresh one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.gpu import worker
from benchmarks.gpu.plan import Measurement
from benchmarks.gpu.results import DONE, ENDED, FAILED, NOT_RUN, Entry, Row
from featcache.errors import UsageError

PATIENCE_S = 10.0  # for an idle process to end
START_S = 120  # for a process to import its libraries and find its device

Say = Callable[[str], None]


@dataclass
class Worker:
    """A process serves one measurement at a time."""

    options: worker.WorkerOptions
    machine: dict[str, Any] = field(default_factory=dict)
    _process: BaseProcess | None = None
    _pipe: Connection | None = None

    def start(self) -> None:
        """Start the process, unless there is one; it says what machine it is on."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(other, self.options))
        self._process.start()
        other.close()
        kind, facts = self.receive(START_S)
        if kind != "ready":
            self.stop()
            raise worker.StartError(facts)
        self.machine = facts

    def send(self, order: Measurement) -> None:
        assert self._pipe is not None
        self._pipe.send(order)

    def receive(self, seconds: float) -> tuple[str, Any]:
        """Return the next message, ("late", None) after so many seconds, or ("gone", how) where
        the process ended."""
        assert self._pipe is not None
        try:
            if not self._pipe.poll(max(seconds, 0)):
                return "late", None
            message: tuple[str, Any] = self._pipe.recv()
            return message
        except (EOFError, OSError):
            return "gone", self._how_it_ended()

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit status {code}"

    def stop(self, patience_s: float = 0.0) -> None:
        """End the process and all that it started; it may take so many seconds to end itself."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if process is None or process.pid is None:
            return
        if pipe is not None:
            pipe.close()  # which an idle one takes for the end
            process.join(patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


@contextlib.contextmanager
def closing_worker(options: worker.WorkerOptions) -> Iterator[Worker]:
    """Yield a worker that has started, and end it in any case."""
    made = Worker(options)
    try:
        try:
            made.start()
        except worker.StartError as error:
            raise UsageError(f"{error}; --trial tries the program without a GPU") from error
        yield made
        made.stop(PATIENCE_S)
    finally:
        made.stop()


def run(
    plan: Sequence[Measurement],
    own: Worker,
    until: float,
    keep: Callable[[str, Entry], None],
    say: Say,
) -> None:
    """Run the measurements that fit until a time of `time.monotonic`; `keep` is given each entry
    whenever it has changed."""
    for number, measurement in enumerate(plan, 1):
        left = until - time.monotonic()
        entry = Entry(title=measurement.title)
        if left < measurement.least_s:
            entry.reason = f"{max(left, 0):.0f} s were left, it wants {measurement.least_s}"
            keep(measurement.name, entry)
            say(f"{measurement.name}: {NOT_RUN}: {entry.reason}")
            continue
        box = min(measurement.box_s, left)
        say(f"{number} of {len(plan)}  {measurement.name}, at most {box:.0f} s of {left:.0f}")
        _run_one(measurement, own, box, entry, lambda: keep(measurement.name, entry), say)  # noqa: B023 - called at once
        say(f"  {entry.status}{f': {entry.reason}' * bool(entry.reason)}  {entry.seconds:.0f} s")


def _run_one(
    measurement: Measurement,
    own: Worker,
    box_s: float,
    entry: Entry,
    changed: Callable[[], None],
    say: Say,
) -> None:
    """Run one measurement, row by row, until it is done, fails or is late."""
    begun = time.monotonic()
    try:
        own.start()
        own.send(measurement)
        entry.status, entry.reason = ENDED, "it was interrupted"
        while True:
            kind, content = own.receive(begun + box_s - time.monotonic())
            if kind != "row":
                break
            entry.rows.append(Row.model_validate(content))
            entry.seconds = time.monotonic() - begun
            changed()
            say(f"  {_line(entry.rows[-1])}")
    except worker.StartError as error:
        kind, content = "failed", str(error)
    entry.seconds = time.monotonic() - begun
    entry.status = {"done": DONE, "late": ENDED}.get(kind, FAILED)  # type: ignore[assignment]
    entry.reason = {"done": "", "late": f"after {box_s:.0f} s"}.get(kind, str(content))
    if entry.status != DONE:
        own.stop()
    changed()


def _line(row: Row) -> str:
    value = row.note if row.value is None else f"{row.value:.4g} {row.unit}".strip()
    goal = f"  (goal {row.goal}: {row.verdict})" if row.verdict else ""
    return f"{row.label}: {value}{goal}"
