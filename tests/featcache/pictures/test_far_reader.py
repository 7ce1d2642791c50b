"""Members that are read in order come from blocks that were fetched ahead, others by themselves;
either way they are the bytes of the tar."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.pictures import far_reader
from featcache.pictures.far_reader import ReadAhead

BLOCK = 1000
TARS = {name: np.random.default_rng(i).bytes(25_300) for i, name in enumerate(("a", "b"))}


class Counted:
    """Reads of the two tars, counted."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def __call__(self, tar: str, offset: int, size: int) -> bytes:
        with self._lock:
            self.ranges.append((tar, offset, size))
        return TARS[tar][offset : offset + size]

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.ranges)


MEMBERS = st.tuples(st.sampled_from("ab"), st.integers(0, 25_000), st.integers(1, 300))


@settings(max_examples=40, deadline=None)
@given(st.lists(MEMBERS, max_size=60), st.booleans())
def test_any_members_are_the_bytes_of_their_tar(
    members: list[tuple[str, int, int]], in_order: bool
) -> None:
    counted = Counted()
    reader = ReadAhead(counted, BLOCK)
    for tar, offset, size in sorted(members) if in_order else members:
        assert reader.read(tar, offset, size, 25_300) == TARS[tar][offset : offset + size]


def test_in_order_a_tar_is_read_once_in_blocks() -> None:
    counted = Counted()
    reader = ReadAhead(counted, BLOCK)
    found: list[bytes] = []
    with ThreadPoolExecutor(4) as pool:
        for low in range(0, 25_300, 800):  # no thread is far behind, as in an extraction's window
            offsets = range(low, min(low + 800, 25_300), 100)
            found += pool.map(lambda at: reader.read("a", at, 100, 25_300), offsets)
    assert b"".join(found) == TARS["a"]
    singles = [each for each in counted.ranges if each[2] == 100]
    assert len(singles) <= 4  # before anything was known of the order
    blocks = [each for each in counted.ranges if each[2] > 100]
    assert len(blocks) == len(set(blocks)) == 26


def test_at_random_places_members_alone_are_read() -> None:
    counted = Counted()
    reader = ReadAhead(counted, 10)
    offsets = np.random.default_rng(0).permutation(25_000 // 400) * 400
    for at in offsets.tolist():
        reader.read("a", at, 100, 25_300)
    assert counted.bytes == 100 * len(offsets)


def test_memory_is_bounded() -> None:
    reader = ReadAhead(Counted(), BLOCK)
    for at in range(0, 25_000, 100):
        reader.read("a", at, 100, 25_300)
        reader.read("b", at, 100, 25_300)
        assert len(reader._blocks) <= far_reader.MOST_BLOCKS


def test_a_block_that_failed_is_told_and_asked_for_again() -> None:
    fails = True

    def read(tar: str, offset: int, size: int) -> bytes:
        if fails and size > 100:
            raise UserError("the store is down")
        return TARS[tar][offset : offset + size]

    reader = ReadAhead(read, BLOCK)
    reader.read("a", 0, 100, 25_300)
    with pytest.raises(UserError, match="down"):
        reader.read("a", 100, 100, 25_300)
    fails = False
    assert reader.read("a", 100, 100, 25_300) == TARS["a"][100:200]
