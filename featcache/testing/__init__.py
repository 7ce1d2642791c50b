"""Public tests: what a new store must pass, for those who write one (`pip install
'featcache[testing]'`)."""

from __future__ import annotations

from featcache.errors import UserError

try:
    import hypothesis  # noqa: F401
    import pytest
except ImportError as error:
    raise UserError(
        "featcache.testing needs pytest and hypothesis: pip install 'featcache[testing]'"
    ) from error

# that a failed assertion shows its values
pytest.register_assert_rewrite(
    "featcache.testing.case", "featcache.testing.faults", "featcache.testing.rows"
)
