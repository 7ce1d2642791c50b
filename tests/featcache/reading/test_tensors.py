"""Stored arrays become tensors of the same values, copied once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featcache.reading.tensors import copy_to_device, to_tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_wide_unsigned_numbers_become_int64(dtype: type) -> None:
    most = np.iinfo(dtype).max
    found = to_tensor(np.array([0, 1, most // 2 + 1, most], dtype))
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1, most // 2 + 1, most]


def test_the_widest_keep_their_bits() -> None:
    assert to_tensor(np.array([1, 2**64 - 1], np.uint64)).tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, bool])
def test_other_numbers_stay(dtype: type) -> None:
    values = np.array([0, 1, 3]).astype(dtype)
    found = to_tensor(values)
    assert found.numpy().dtype == values.dtype
    np.testing.assert_array_equal(found.numpy(), values)


def test_memory_is_shared_unless_it_must_not_be() -> None:
    values = np.zeros(3, np.float32)
    shared, own = copy_to_device(values, CPU), copy_to_device(values, CPU, own=True)
    values += 1
    assert (shared.tolist(), own.tolist()) == ([1.0] * 3, [0.0] * 3)
    assert copy_to_device(shared, CPU) is shared
