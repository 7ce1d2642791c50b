"""Host memory of batches is allocated once and filled again and again: page-locked where a GPU
reads it.

B samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# shape of one sample and type, by array
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def allocate(layout: Layout, batch_size: int, pin: bool) -> dict[str, npt.NDArray[Any]]:
    """Allocate the arrays (B, ...) of one batch. With `pin` a GPU copies them while the host goes
    on; without, it is plain memory."""
    return {
        name: _array((batch_size, *shape), dtype, pin) for name, (shape, dtype) in layout.items()
    }


def _array(shape: tuple[int, ...], dtype: np.dtype[Any], pin: bool) -> npt.NDArray[Any]:
    if not pin:
        return np.empty(shape, dtype)
    # By bytes, since PyTorch has no unsigned numbers of more than 8 bits to speak of.
    memory: npt.NDArray[Any] = torch.empty(
        math.prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True
    ).numpy()
    return memory.view(dtype).reshape(shape)
