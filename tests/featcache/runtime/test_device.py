"""A device that is not here is one short line."""

from __future__ import annotations

import pytest

from featcache.errors import UsageError
from featcache.runtime.device import pick_device


@pytest.mark.parametrize("name", ["meta", "vulkan", "hpu", "privateuseone", "nonsense", "cpu:-1"])
def test_a_device_without_numbers_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device '{name}' cannot be used here") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_cpu_is_always_here() -> None:
    assert pick_device("cpu") == "cpu"
