"""What later steps will read from an object store is fetched by a thread of its own, step by step,
as far ahead as there is room for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
# has fetched what will be read of pictures (m,) in views (m,); False: there is no room yet
FetchAhead = Callable[[I64, I64], bool]
Samples = Callable[[int], tuple[I64, I64]]  # step -> pictures (m,) and views (m,) of this process
_AGAIN_S = 0.05  # until room is looked for again


class ReadAhead:
    """Fetches steps [first, last) in their order, and passes over those that the reader has come
    to. Nothing is fetched twice: a reader that comes to a step waits until its fetch is done."""

    def __init__(self, samples: Samples, fetch: FetchAhead) -> None:
        self._samples, self._fetch = samples, fetch
        self._changed = threading.Condition()
        self._reading, self._fetching = -1, -1
        self._is_stopped = False
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def running(self, first: int, last: int) -> Iterator[ReadAhead]:
        """Fetch until the block is left."""
        thread = threading.Thread(
            target=self._run, args=(first, last), name="student-read-ahead", daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._is_stopped = True
                self._changed.notify_all()
            thread.join()

    def arrive(self, step: int) -> None:
        """Note that a step is read now. Raises what its fetch raised."""
        with self._changed:
            self._reading = max(self._reading, step)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not 0 <= self._fetching <= step)
            if self._error is not None:
                raise self._error

    def _run(self, first: int, last: int) -> None:
        for step in range(first, last):
            while self._begin(step):
                done = self._fetched(step)
                with self._changed:
                    self._fetching = -1
                    self._changed.notify_all()
                    if done:
                        break
                    self._changed.wait(_AGAIN_S)
            if self._is_stopped or self._error is not None:
                return

    def _begin(self, step: int) -> bool:
        """Return whether a step is still to be fetched."""
        with self._changed:
            if self._is_stopped or step <= self._reading:
                return False
            self._fetching = step
            return True

    def _fetched(self, step: int) -> bool:
        try:
            return self._fetch(*self._samples(step))
        except BaseException as error:  # the reader raises it
            self._error = error
            return True
