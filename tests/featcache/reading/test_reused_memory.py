"""Memory is used again when nobody can see it any more, and never before."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.reading.reused_memory import LEAST_BYTES, ReusedMemory

MIB = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_an_array_that_is_gone_gives_its_memory_to_the_next() -> None:
    memory = ReusedMemory(8 * MIB)
    first = memory.empty((2, MIB // 4), np.float16)
    assert (first.shape, first.dtype, first.nbytes) == ((2, MIB // 4), np.float16, MIB)
    assert first.flags.carray
    place = address(first)
    second = memory.empty((MIB,), np.uint8)
    assert address(second) != place
    del first
    assert memory.free_bytes == MIB
    third = memory.empty((MIB // 4,), np.float32)
    assert address(third) == place
    assert memory.free_bytes == 0


VIEWS: dict[str, Any] = {
    "slice": lambda x: x[3:5],
    "item": lambda x: x[7:8, 0].T,
    "other type": lambda x: x.view(np.uint16),
    "reshaped": lambda x: x.reshape(-1)[::3],
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "as an array": lambda x: np.asarray(x)[1:],
    "buffer": lambda x: memoryview(x),
    "from buffer": lambda x: np.frombuffer(x, np.uint8),
    "tensor": lambda x: torch.from_numpy(x)[2:],
    "dlpack": lambda x: np.from_dlpack(x),
    "its base": lambda x: x.base,
    "an iterator": lambda x: x.flat,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIEWS)
def test_memory_that_can_be_seen_is_not_used_again(kind: str) -> None:
    memory = ReusedMemory(8 * MIB)
    array = memory.empty((16, MIB // 16), np.uint8)
    array[:] = 7
    place, view = address(array), VIEWS[kind](array)
    del array
    gc.collect()
    others = [memory.empty((MIB,), np.uint8) for _ in range(3)]
    assert place not in [address(other) for other in others]
    for other in others:
        other[:] = 9
    seen = np.asarray(view) if not isinstance(view, np.flatiter) else np.array(view)
    assert (np.frombuffer(np.ascontiguousarray(seen), np.uint8) == 7).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3)), min_size=1, max_size=60))
def test_what_is_held_never_changes(steps: list[tuple[int, int]]) -> None:
    """Eight places hold views of arrays; each step lets one go and puts another there."""
    memory = ReusedMemory(6 * MIB)
    held: dict[int, tuple[int, np.ndarray]] = {}
    for number, (place, size) in enumerate(steps, 1):
        held.pop(place, None)
        array = memory.empty((size, MIB // 2), np.uint16)
        array[:] = number
        held[place] = (number, array[-1, ::1000])
        assert memory.free_bytes <= 6 * MIB
        for value, view in held.values():
            assert (view == value).all()


def test_little_or_too_much_is_not_kept() -> None:
    memory = ReusedMemory(4 * MIB)
    for size in (LEAST_BYTES - 1, 4 * MIB + 1, 0):
        array = memory.empty((size,), np.uint8)
        assert array.base is None
        del array
    assert memory.free_bytes == 0
    arrays = [memory.empty((MIB,), np.uint8) for _ in range(6)]
    arrays.clear()
    assert memory.free_bytes == 4 * MIB
    memory.clear()
    assert memory.free_bytes == 0


def test_much_larger_memory_is_left_for_others() -> None:
    """1.25 times as large at most."""
    memory = ReusedMemory(64 * MIB)
    large = memory.empty((8 * MIB,), np.uint8)
    place = address(large)
    del large
    assert address(memory.empty((6 * MIB,), np.uint8)) != place
    assert address(memory.empty((7 * MIB,), np.uint8)) == place


def test_arrays_are_plain_ones() -> None:
    array = ReusedMemory(8 * MIB).empty((MIB,), np.uint8)
    array[:] = 3
    assert type(array) is np.ndarray
    assert array.flags.writeable
    assert address(array) % 16 == 0
    assert np.array_equal(pickle.loads(pickle.dumps(array)), array)


def test_threads_do_not_get_the_same_memory() -> None:
    memory, wrong = ReusedMemory(64 * MIB), list[int]()

    def work(number: int) -> None:
        for _ in range(200):
            array = memory.empty((MIB,), np.uint8)
            array[::4096] = number
            if not (array[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_end_while_the_lock_is_held_does_not_wait() -> None:
    """A collector may end an array in the middle of `empty`: its memory is then not kept."""
    memory = ReusedMemory(8 * MIB)
    array = memory.empty((MIB,), np.uint8)
    with memory._lock:
        del array
    assert memory.free_bytes == 0


MEMORY = ReusedMemory(8 * MIB)


def _in_child(pipe: Any) -> None:
    array = MEMORY.empty((MIB,), np.uint8)
    array[:] = 5
    pipe.send(int(array[::4096].sum()))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_child_works_and_leaves_the_parent_s_arrays_alone(method: str) -> None:
    """Also where a thread held the lock in the moment of the fork."""
    held = MEMORY.empty((MIB,), np.uint8)
    held[:] = 1
    gone = MEMORY.empty((MIB,), np.uint8)
    del gone
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there,))
    with MEMORY._lock:
        child.start()
    assert here.poll(60)
    assert here.recv() == 5 * (MIB // 4096)
    child.join()
    assert (held == 1).all()


def test_memory_stays_flat() -> None:
    """A loop that lets each array go at the next one holds two of them."""
    memory, process = ReusedMemory(64 * MIB), psutil.Process(os.getpid())
    array = memory.empty((8 * MIB,), np.uint8)
    array[:] = 0
    places = set()
    before = process.memory_info().rss
    for number in range(1000):
        array = memory.empty((8 * MIB,), np.uint8)
        array[::4096] = number % 250
        places.add(address(array))
    assert len(places) == 2
    assert process.memory_info().rss - before < 24 * MIB
