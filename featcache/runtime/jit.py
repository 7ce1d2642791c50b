"""Loops as machine code that holds no lock of the interpreter: numba's, compiled on first use and
kept for later."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """Kept beside its file or in the user's cache folder, where either can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no place to keep it: compiled again in each process
        return numba.njit(nogil=True, error_model="numpy")(function)
