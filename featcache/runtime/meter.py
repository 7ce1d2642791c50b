"""Bytes, views and seconds are counted in this process where they come about, for the run ledger.

    device_s        seconds that a teacher, a student or an encoder was computing
    bytes_read      of rows of caches, with their checksums; of an archive as its rows are unpacked
    picture_bytes   of encoded pictures that were read to be decoded
    bytes_written   of files of finished shards, checkpoints, weights and kept features
    views_shown     to a student in training
    teachers        of each teacher by name: seconds and views of its forward passes

Who wants to know what something cost takes the difference of two readings. Two pieces of work at
the same time in one process share what is counted.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["bytes_read", "picture_bytes", "bytes_written", "views_shown"]
_PENDING = 64  # times that a GPU may still be measuring; older ones are known without waiting


class LateSeconds(Protocol):
    """A time that is known once a device is there."""

    def item(self) -> float: ...


@dataclass(frozen=True)
class Counts:
    """What was counted so far, or between two readings."""

    device_s: float = 0.0
    bytes_read: int = 0
    picture_bytes: int = 0
    bytes_written: int = 0
    views_shown: int = 0
    teachers: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # seconds, views

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        return self._with(other, -1)

    def _with(self, other: Counts, sign: int) -> Counts:
        teachers = {
            name: (seconds + sign * more[0], views + sign * more[1])
            for name in {**self.teachers, **other.teachers}
            for seconds, views in [self.teachers.get(name, (0.0, 0))]
            for more in [other.teachers.get(name, (0.0, 0))]
        }
        return Counts(
            self.device_s + sign * other.device_s,
            self.bytes_read + sign * other.bytes_read,
            self.picture_bytes + sign * other.picture_bytes,
            self.bytes_written + sign * other.bytes_written,
            self.views_shown + sign * other.views_shown,
            {name: each for name, each in teachers.items() if each != (0.0, 0)},
        )

    @property
    def teacher_s(self) -> float:
        """Return the seconds of all teachers."""
        return sum(seconds for seconds, _ in self.teachers.values())


class Meter:
    """Adds up, in any thread; a GPU's times are asked for when it has long been there."""

    def __init__(self) -> None:
        self._total = Counts()
        self._pending: deque[tuple[LateSeconds, str, int]] = deque()
        self.start()

    def start(self) -> None:
        """Make a new lock: in a forked child another thread's would never be free."""
        self._lock = threading.Lock()

    def count(self, kind: Kind, amount: int) -> None:
        """Add bytes or views."""
        counted: dict[str, Any] = {kind: amount}
        self.add(Counts(**counted))

    def add(self, counts: Counts) -> None:
        """Add what was counted elsewhere, such as in another process of the same run."""
        with self._lock:
            self._total += counts

    def device(self, seconds: float | LateSeconds) -> None:
        """Add seconds of a device."""
        self._later(seconds, "", 0)

    def teacher(self, name: str, seconds: float | LateSeconds, views: int) -> None:
        """Add a forward pass of a teacher over so many views; it is no second of a device, unless
        that is said too."""
        self._later(seconds, name, views)

    def _later(self, seconds: float | LateSeconds, teacher: str, views: int) -> None:
        if isinstance(seconds, float):
            self.add(_timed(seconds, teacher, views))
            return
        with self._lock:
            self._pending.append((seconds, teacher, views))
            long_ago = [self._pending.popleft()] if len(self._pending) > _PENDING else []
        self._settle(long_ago)

    def _settle(self, measured: list[tuple[LateSeconds, str, int]]) -> None:
        for seconds, teacher, views in measured:
            self.add(_timed(seconds.item(), teacher, views))

    def read(self) -> Counts:
        """Return all that was counted; waits for devices that are still at work on it."""
        with self._lock:
            measured = list(self._pending)
            self._pending.clear()
        self._settle(measured)
        return self._total


def _timed(seconds: float, teacher: str, views: int) -> Counts:
    return Counts(teachers={teacher: (seconds, views)}) if teacher else Counts(device_s=seconds)


def from_plain(plain: Mapping[str, Any]) -> Counts:
    """Return the counts of which `dataclasses.asdict` made plain JSON."""
    teachers = {name: (float(each[0]), int(each[1])) for name, each in plain["teachers"].items()}
    return Counts(**{**plain, "teachers": teachers})


meter = Meter()
os.register_at_fork(after_in_child=meter.start)
