"""The contract of stores, as a test class to inherit.

    from featcache.testing.store import StoreContract

    class TestMine(StoreContract):
        name = "mine"  # its name in featcache.storage.store.STORES

pytest then runs every test of it. A store's own file formats are tested beside it; here only the
contract of `featcache.storage.store` is used, and what `featcache.storage.commit` does for all
stores alike.
"""

from __future__ import annotations

from featcache.testing.faults import FaultsContract
from featcache.testing.rows import RowsContract

__all__ = ["StoreContract"]


class StoreContract(RowsContract, FaultsContract):
    """Every store passes this, whoever writes it: set `name`, and `form` where shards of another
    form are to be written."""
