"""Steps are fetched in order, once, and never behind the reader."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from featcache.errors import UserError
from student.data.read_ahead import I64, ReadAhead


def samples(step: int) -> tuple[I64, I64]:
    return np.array([step]), np.array([0])


def until(ready: object, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_all_steps_in_order() -> None:
    fetched: list[int] = []

    def fetch(at: I64, view: I64) -> bool:
        fetched.append(int(at[0]))
        return True

    with ReadAhead(samples, fetch).running(3, 9):
        until(lambda: len(fetched) == 6)
    assert fetched == [3, 4, 5, 6, 7, 8]


def test_a_step_without_room_waits_and_is_passed_over_when_it_is_read() -> None:
    room, asked = threading.Event(), list[int]()

    def fetch(at: I64, view: I64) -> bool:
        asked.append(int(at[0]))
        return int(at[0]) < 2 or room.is_set()

    with ReadAhead(samples, fetch).running(0, 6) as ahead:
        until(lambda: asked.count(2) > 2)  # it is tried again
        ahead.arrive(0)
        ahead.arrive(1)
        ahead.arrive(2)
        until(lambda: 3 in asked)
        room.set()
        until(lambda: 5 in asked)
    assert asked.count(0) == asked.count(1) == asked.count(5) == 1


def test_the_reader_waits_for_a_fetch_that_has_begun() -> None:
    begun, go, done = threading.Event(), threading.Event(), list[int]()

    def fetch(at: I64, view: I64) -> bool:
        begun.set()
        go.wait()
        done.append(int(at[0]))
        return True

    with ReadAhead(samples, fetch).running(0, 1) as ahead:
        begun.wait()
        threading.Timer(0.1, go.set).start()
        ahead.arrive(0)
        assert done == [0]


def test_an_error_is_the_readers() -> None:
    def fetch(at: I64, view: I64) -> bool:
        raise UserError("it stays down")

    with ReadAhead(samples, fetch).running(0, 3) as ahead:
        until(lambda: ahead._error is not None)
        with pytest.raises(UserError, match="it stays down"):
            ahead.arrive(0)


def test_left_early_the_thread_ends() -> None:
    ahead = ReadAhead(samples, lambda at, view: False)
    with ahead.running(0, 100):
        pass
    assert "student-read-ahead" not in {thread.name for thread in threading.enumerate()}
