"""Objects of a bucket that may be those of a cache are told by their names. A listing comes from a
stranger: what passes here lies below the folder that it is joined to.
"""

from __future__ import annotations

import re

from featcache.storage.names import check_file_name
from featcache.storage.store import PARTS, SHARDS, STORES

# what a cache has beside its shards, by names below its root, and the files of shards
_DESCRIBES = re.compile(
    r"(manifest|quarantine|zarr)\.json|[^/]+\.safetensors"
    rf"|{SHARDS}/([^/.]+|manifest\.copy)\.json|{SHARDS}/[^/]+\.safetensors"
)
_LEASE = re.compile(rf"{SHARDS}/[^/.]+\.lease")
_RECORD = re.compile(rf"{SHARDS}/[^/.]+\.json")
_OF_SHARD = re.compile(rf"{SHARDS}/[^/.]+\.({'|'.join(STORES)})/[^/].*")


def _part(name: str) -> str:
    """Return a name without the folder of an addition, parts/NAME/."""
    folder, _, rest = name.partition("/")
    return rest.partition("/")[2] if folder == PARTS else name


def _is_safe(name: str) -> bool:
    folder, _, rest = name.partition("/")
    try:
        check_file_name(_part(name))
        check_file_name(rest.partition("/")[0] if folder == PARTS else folder)
    except ValueError:
        return False
    return True


def describes(name: str) -> bool:
    """Return whether an object of this name below a cache describes it, or a shard.

    >>> describes("shards/000000.json"), describes("parts/dino/manifest.json")
    (True, True)
    >>> describes("../manifest.json"), describes("shards/000000.zarr/zarr.json")
    (False, False)
    """
    return _is_safe(name) and _DESCRIBES.fullmatch(_part(name)) is not None


def is_record(name: str) -> bool:
    return _RECORD.fullmatch(_part(name)) is not None


def is_lease(name: str) -> bool:
    """Return whether an object of this name is the lease of a shard.

    >>> is_lease("shards/000000.lease"), is_lease("parts/../shards/000000.lease")
    (True, False)
    """
    return _LEASE.fullmatch(_part(name)) is not None and _is_safe(record_of(name))


def record_of(name: str) -> str:
    """Return the name of the record of a shard, by that of a file of it, or of its lease.

    >>> record_of("parts/dino/shards/000000.zarr/zarr.json"), record_of("shards/000000.lease")
    ('parts/dino/shards/000000.json', 'shards/000000.json')
    """
    before, slash, rest = name.partition(f"{SHARDS}/")
    return f"{before}{slash}{rest.partition('.')[0]}.json"


def lease_of(record: str) -> str:
    """Return the name of the lease of a shard, by that of its record.

    >>> lease_of("shards/000000.json")
    'shards/000000.lease'
    """
    return f"{record.removesuffix('.json')}.lease"


def is_of_shard(name: str) -> bool:
    """Return whether an object of this name is a file of a shard.

    >>> is_of_shard("shards/000000.zarr/features/c.0.0"), is_of_shard("shards/000000.lease")
    (True, False)
    """
    return _is_safe(name) and _OF_SHARD.fullmatch(_part(name)) is not None
