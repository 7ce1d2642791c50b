"""Progress counts what an extraction has done, and names the stage that holds it up.

    decode   pictures read, decoded and rendered, in `workers` threads
    copy     pixels to the device, targets back to the host
    teacher  the forward
    encode   levels normalised and encoded, orders and checksums
    write    rows appended and shards published

The stages overlap, so the one that is busy longest bounds the rate. On a GPU its seconds are the
device's own clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

STAGES = ("decode", "copy", "teacher", "encode", "write")


@dataclass
class ExtractProgress:
    """Count busy seconds of each stage and what is done; `report` is called after every batch."""

    report: Callable[[ExtractProgress], None] = lambda progress: None
    # called while other processes hold the last shards
    waiting: Callable[[int], None] = lambda shards: None
    # called with a sentence on what is done before the first shard
    note: Callable[[str], None] = lambda text: None
    pictures: int = 0
    total: int = 0  # that this work has to do
    there: int = 0  # of complete shards, made before or by other processes meanwhile
    exif_ignored: int = 0  # pictures whose EXIF orientation is not applied
    workers: int = 1
    started: float = field(default_factory=time.perf_counter)
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.busy[name] += seconds

    @property
    def slowest(self) -> str:
        """Name the stage that bounds the rate: decoding is shared by its threads, the others have
        one each."""
        return max(
            self.busy, key=lambda name: self.busy[name] / (self.workers if name == "decode" else 1)
        )

    @property
    def rate(self) -> float:
        """Return pictures a second since the start."""
        return self.pictures / max(time.perf_counter() - self.started, 1e-9)
