"""Machine code that cannot be kept is compiled again."""

from __future__ import annotations

from collections.abc import Callable

import numba
import pytest

from featcache.runtime.jit import compiled


def test_no_place_for_machine_code_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was installed read-only, for a user without a home: numba refuses to cache
    there."""
    plain = numba.njit

    def njit(*functions: object, **options: bool) -> Callable[..., object]:  # numba's own, too
        if options.pop("cache", False):
            raise RuntimeError(
                "cannot cache function '_twice': no locator available for file 'resample.py'"
            )
        made: Callable[..., object] = plain(*functions, **options)
        return made

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(lambda x: 2 * x)(21) == 42
