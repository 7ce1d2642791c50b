"""A row file only grows: it counts its bytes, keeps their running crc32c, and pushes dirty pages
out as it goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

# after so many bytes the kernel is asked to write them out, and to forget those before
PUSH_BYTES = 16 << 20


class RowFile:
    """Writes without a buffer, and is never read. A whole shard would otherwise stay dirty in
    memory until its last moment: 6 GB that stall everyone at fsync. POSIX_FADV_DONTNEED starts the
    write-out of a dirty range and drops a clean one, so asking for everything so far at each step
    writes the newest range and forgets the older ones."""

    def __init__(self, path: Path) -> None:
        # of a writer's folder that is there; else somebody has taken it away
        path.parent.mkdir(exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.bytes = 0
        self.crc = 0
        self._pushed = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write an array's bytes in C order."""
        view = (
            np.ascontiguousarray(rows).reshape(-1).data.cast("B") if rows.size else memoryview(b"")
        )
        self.crc = crc32c(view, self.crc)
        self.bytes += len(view)
        while view:  # a raw file may take less than it is given
            view = view[os.write(self.fd, view) :]
        if self.bytes - self._pushed >= PUSH_BYTES:
            self._push()

    def _push(self) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS, whose kernel writes out on its own
            os.posix_fadvise(self.fd, 0, self.bytes, os.POSIX_FADV_DONTNEED)
        self._pushed = self.bytes

    def close(self) -> None:
        os.fsync(self.fd)
        self.abort()

    def abort(self) -> None:
        """Close without a sync; more than once does no harm, whenever an interrupt falls: the
        number of a closed file may be another file's already."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
