"""Where a step's views and targets come from: a cache, or the teacher in the loop.

Both give the same views, the same fields and the same masks for a picture and an epoch; only the
storage between teacher and student differs. n rows of training pictures, B batch, V stored views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.views.policy import Policy
from student.targets import buffers

I64 = npt.NDArray[np.int64]
HostBatch = dict[str, Any]  # arrays of a batch on the host
Moments = Callable[[I64, I64], npt.NDArray[np.float32]]  # of training pictures (n,) in views (n,)


class ResidentRows(Protocol):
    """Rows that answer in place of the cache."""

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Arrays of training pictures `at`."""
        ...

    def take(self, name: str, at: I64, view: I64) -> npt.NDArray[Any]:
        """One of them."""
        ...


class Targets(Protocol):
    """What the loader and the trainer ask of either kind."""

    policy: Policy
    is_stored: bool  # features come from storage, not from a teacher in the loop
    stored_pixels: bool  # so do pixels, and no picture is decoded

    @property
    def only_read(self) -> bool:
        """Whether all of a batch comes from files, as it lies there."""
        ...

    @property
    def moments(self) -> Moments | None:
        """Mean and variance (L, 2) of each level over training pictures in their views, the whole
        batch of a step; None where they are not asked for, or known only when the teacher has
        run."""
        ...

    def layout(self) -> buffers.Layout:
        """Shape and type of one sample of every array of a batch."""
        ...

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        """Which view each picture shows when it has been shown `rounds` times before: its epoch,
        where every picture is shown once in each."""
        ...

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Stored arrays of training pictures `at`, in the memory of `out`; called in a loader
        thread."""
        ...

    def noted(self, at: I64) -> dict[str, int]:
        """What a row of metrics says of a step's pictures."""
        ...

    def sources(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        """The arrays a mask is drawn from, where they are stored."""
        ...

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        """`pixels` (S, S, 3) of sample i, and `teacher_pixels` where a teacher in the loop wants
        another size. Not called where pixels are stored."""
        ...

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        """(m,) of the pixels the teacher saw; None where none are stored, and nothing is
        checked."""
        ...

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        """Raise when rendered pixels, of the `stored` hash, are not those the teacher saw."""
        ...

    def complete(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        """Tensors on the device (features), and the arrays a mask is drawn from."""
        ...
