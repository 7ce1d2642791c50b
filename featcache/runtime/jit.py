"""Loops are compiled by numba on first use, kept for later, and hold no lock of the interpreter."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """Compile a function; the machine code is kept beside its file or in the user's cache folder,
    where either can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it: compiled again in each process
        return numba.njit(nogil=True, error_model="numpy")(function)
