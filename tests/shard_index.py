"""Rewrite the index of a sharded file, as an attacker does who knows the format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import crc32c


def change_index(path: Path, entries: int, change: Mapping[int, int]) -> None:
    """Write other numbers into the index of a file of so many chunks, and the checksum that fits
    them."""
    data = bytearray(path.read_bytes())
    begin = len(data) - 4 - 16 * entries
    for number, value in change.items():
        data[begin + 8 * number : begin + 8 * number + 8] = value.to_bytes(8, "little")
    data[-4:] = crc32c.crc32c(bytes(data[begin:-4])).to_bytes(4, "little")
    path.write_bytes(data)
