"""Memory is sampled by a thread while a block runs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from featcache.extraction.progress import ExtractProgress

SAMPLE_S = 0.05


@dataclass
class MemoryMonitor:
    """Samples resident memory of this process and dirty pages of the machine while a block runs."""

    start_bytes: int = 0
    peak_bytes: int = 0
    dirty_bytes: int = 0
    quarters: dict[int, int] = field(default_factory=dict)  # per cent done -> resident bytes
    seconds: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryMonitor:
        self._dirty_before = _read_bytes("/proc/meminfo", "Dirty")
        self.start_bytes = self.peak_bytes = _read_bytes("/proc/self/status", "VmRSS")
        self._exact = _reset_peak()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._done.set()
        self._thread.join()
        if self._exact:
            self.peak_bytes = max(self.peak_bytes, _read_bytes("/proc/self/status", "VmHWM"))

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, _read_bytes("/proc/self/status", "VmRSS"))
            self.dirty_bytes = max(
                self.dirty_bytes, _read_bytes("/proc/meminfo", "Dirty") - self._dirty_before
            )

    def report(self, progress: ExtractProgress) -> None:
        done = 100 * progress.pictures // max(progress.total, 1)
        for quarter in (25, 50, 75, 100):
            if done >= quarter and quarter not in self.quarters:
                self.quarters[quarter] = _read_bytes("/proc/self/status", "VmRSS")


def _read_bytes(path: str, name: str) -> int:
    """Read the bytes of a `Name:   123 kB` line."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> bool:
    """Make VmHWM start again from now; False where a process may not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
