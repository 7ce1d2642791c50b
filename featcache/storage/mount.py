"""A cache in an object store is mounted at a folder of this machine.

What describes it (manifests, records, ends of teachers) is brought to the folder when it is
mounted, and again when it has changed. The files of shards stay where they are: rows are read by
ranges, and a file is brought whole where all of it is looked at. Each process has a folder of its
own.

    s3://bucket/clip/manifest.json          ~/.cache/featcache/objects/CACHE/PROCESS/manifest.json
    s3://bucket/clip/shards/000000.json     .../shards/000000.json
    s3://bucket/clip/shards/000000.zarr/    not there, or brought

A listing comes from a stranger: names that no cache has are passed over, so that nothing is written
anywhere else.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
from pathlib import Path

from featcache.errors import tell_as
from featcache.objects.cache_folder import cache_folder
from featcache.objects.client import client
from featcache.objects.url import ObjectUrl
from featcache.storage import files, kept_files
from featcache.storage.mounted import Mount
from featcache.storage.owner import writer_id

_own_folders: dict[tuple[str, int], Path] = {}  # of URLs, by process


def default_folder(url: ObjectUrl) -> Path:
    """Return the folder of this process that a URL is mounted at, below the user's own folder of
    caches. What is left there of processes that have ended is removed."""
    digest = hashlib.blake2b(str(url).encode(), digest_size=8).hexdigest()
    shared = cache_folder() / digest
    key = (str(shared), os.getpid())
    if key not in _own_folders:
        kept_files.sweep_processes(shared)
        _own_folders[key] = shared / writer_id()
        atexit.register(_remove_own, *key)
    return _own_folders[key]


def _remove_own(shared: str, process: int) -> None:
    if process == os.getpid():  # and not one that was forked from it
        shutil.rmtree(_own_folders[shared, process], ignore_errors=True)


def mount_at(folder: Path) -> Mount:
    """Return what answers for a folder that `mount` gave."""
    found = files.files_of(folder)
    assert isinstance(found, Mount)
    return found


def mount(url: ObjectUrl, folder: Path | None = None) -> Path:
    """Mount a cache, or the place where one is to be, and return its folder."""
    folder = (folder or default_folder(url)).absolute()
    made, requests = files.files_of(folder), client(url)
    if not isinstance(made, Mount):
        made = Mount(url, folder, requests)
    made.use(requests)
    made.refresh()
    files.mount(str(folder), made)
    tell_as(str(folder), str(url))
    return folder
