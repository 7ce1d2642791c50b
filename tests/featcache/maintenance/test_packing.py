"""Packing reads ahead, and no further than the first error."""

from __future__ import annotations

import threading

import pytest

from featcache.maintenance.packing import read_ahead, reading_threads


def test_after_an_error_no_further_picture_is_read() -> None:
    failed, read = threading.Event(), []

    def work(row: int) -> int:
        if row == 0:
            raise OSError("damaged")
        failed.wait()
        read.append(row)
        return row

    def pack() -> None:
        with reading_threads() as pool:
            try:
                list(read_ahead(pool, work, range(10_000), 10_000, "packing"))
            finally:
                threading.Timer(0.2, failed.set).start()  # what is being read may end

    with pytest.raises(OSError, match="damaged"):
        pack()
    assert len(read) < 100  # those that threads had in hand
