"""The caches in an object store are found: the one that a URL names, or those one level below."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featcache.errors import UserError
from featcache.objects.client import client
from featcache.objects.url import ObjectUrl
from featcache.storage import manifest
from featcache.storage.mount import mount

_AT_ONCE = 16  # requests


def caches(url: ObjectUrl, failed: Callable[[str, UserError], None]) -> list[Path]:
    """Return the mounted folders of the cache at a URL, or of those one level below, by name;
    `failed` is told of each of several that cannot be opened."""
    requests = client(url)
    start = f"{url.path}/" if url.path else ""

    def holds_cache(prefix: str) -> bool:
        return requests.facts(f"{prefix}{manifest.NAME}") is not None

    if holds_cache(start):
        return [mount(url)]
    below = list(requests.folders(start))
    with ThreadPoolExecutor(_AT_ONCE, "featcache-objects") as pool:
        there = list(pool.map(holds_cache, (f"{each.rstrip('/')}/" for each in below)))
    found = []
    for prefix, has in zip(below, there, strict=True):
        if has:
            place = requests.place(prefix.strip("/"))
            try:
                found.append(mount(place))
            except UserError as error:
                failed(str(place), error)
    return found
