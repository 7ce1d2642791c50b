"""A step's views and targets come through one contract, from a cache or from the teacher in the
loop.

Both give the same views, the same fields and the same masks for a picture and an epoch; only the
storage between teacher and student differs.

n training pictures, B samples of a batch, V stored views, L levels, P patches, D width of the
teacher, E width of a derived target, S pixels a side.
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
HostBatch = dict[str, Any]  # arrays of a batch on the host; some may be on the device already
# training pictures (m,) in views (m,) -> mean and variance (L, 2)
Moments = Callable[[I64, I64], npt.NDArray[np.float32]]


class ResidentRows(Protocol):
    """Rows in memory answer in place of the cache (`--resident`)."""

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Copy all arrays (B, ...) of training pictures `indices` (B,) in their views (B,), into
        the memory of `out`."""
        ...

    def take(self, name: str, indices: I64, view: I64) -> npt.NDArray[Any]:
        """Copy one array (B, ...) of training pictures `indices` (B,) in their views (B,)."""
        ...


class Targets(Protocol):
    """The loader and the trainer ask this of every source of targets."""

    policy: Policy
    is_stored: bool  # features come from storage, not from a teacher in the loop
    stored_pixels: bool  # so do pixels, and no picture is decoded

    @property
    def is_io_bound(self) -> bool:
        """Tell whether all of a batch is read from files as it is stored, and nothing is
        decoded."""
        ...

    @property
    def moments(self) -> Moments | None:
        """Give the mean and variance (L, 2) of each level over the whole batch of a step; None
        where they are not asked for, or known only when the teacher has run."""
        ...

    def layout(self) -> buffers.Layout:
        """Return shape and dtype of one sample, for every array of a batch."""
        ...

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        """digests (B, 2), rounds () or (B,) -> (B,): choose the view that each picture shows when
        it has been shown `rounds` times before: its epoch, where every picture is shown once in
        each."""
        ...

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Read the stored arrays (B, ...) of training pictures `indices` (B,) in their views (B,),
        into the memory of `out`; called in a loader thread."""
        ...

    def step_metrics(self, indices: I64) -> dict[str, int]:
        """Return what metrics say of a step's pictures `indices` (global batch,)."""
        ...

    def mask_inputs(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that a mask is drawn from, (B, P) each, where they are stored."""
        ...

    def render(
        self, picture: Image.Image, host: HostBatch, i: int, key: str, digest: rng.U64, view: int
    ) -> dict[str, Any]:
        """Render `pixels` (S, S, 3) of sample i, and `teacher_pixels` where a teacher in the loop
        wants another size. Not called where pixels are stored."""
        ...

    def pixel_hashes(self, indices: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        """indices (m,), view (m,) -> (m,): return the hashes of the pixels the teacher saw; None
        where none are stored, and nothing is checked."""
        ...

    def check_pixels(
        self, pixels: npt.NDArray[np.uint8], index: int, view: int, stored_hash: int
    ) -> None:
        """Raise IdentityError when rendered pixels (S, S, 3) are not those the teacher saw."""
        ...

    def draw(self, host: HostBatch) -> dict[str, npt.NDArray[Any]]:
        """Draw what `to_device` needs of random numbers (B, ...); called in a loader thread."""
        ...

    def device_arrays(self, host: HostBatch) -> tuple[str, ...]:
        """Return the names of the arrays of a batch that `to_device` reads on the device."""
        ...

    def to_device(
        self, host: HostBatch, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what a recipe takes, and the arrays (B, P) that a mask is drawn from where `host`
        has no masks yet; all on the device, which is not waited for. What of `host` is a tensor on
        the device already is taken as it is.

        `features` (B, L, 1 + P, D), or `targets` (B, 1 + P, E) derived from the one level; beside
        them `feature_stats` (B, L, 1 + P, 2), `moments` (L, 2), `token_ids` (B, P) and `second`
        (B, 1 + P, E of that teacher) where the recipe asks for them.
        """
        ...
