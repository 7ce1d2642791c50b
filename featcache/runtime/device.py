"""The device that a teacher or a student runs on is chosen."""

from __future__ import annotations

import torch

from featcache.errors import UsageError


def pick_device(name: str | None) -> str:
    """Return the device asked for, or cuda where there is one; a device that is not here is a
    UsageError."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=chosen).item()  # meta has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        # torch lists all its backends after the first sentence
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UsageError(
            f"--device {chosen!r} cannot be used here: {reason}; cpu always can"
        ) from error
    return chosen


def is_gpu(device: torch.device) -> bool:
    """Return whether a device works through a queue behind the host, which copies to it from
    page-locked memory without waiting."""
    return device.type == "cuda"
