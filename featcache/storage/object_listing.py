"""What lies below the URL of a cache, or of a place where one is to be."""

from __future__ import annotations

from dataclasses import dataclass, field

from featcache.objects.client import Client, Facts
from featcache.objects.url import ObjectUrl
from featcache.storage.object_names import describes, is_lease, is_of_shard

CARD = "README.md"  # that `featcache push` leaves
CARD_START = "<!-- written by featcache push -->\n"  # without it, a README.md is somebody else's
_MOST_OTHERS = 1000  # names that are kept of what is no cache's


@dataclass
class Listing:
    """Holds facts by the names of objects below the URL. `others` are no cache's; of too many of
    them not all are kept."""

    objects: dict[str, Facts] = field(default_factory=dict)
    leases: dict[str, Facts] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    card: Facts | None = None


def list_objects(requests: Client, url: ObjectUrl) -> Listing:
    """List what lies below a URL. A list may be behind."""
    found, start = Listing(), f"{url.path}/" if url.path else ""
    for facts in requests.list(start):
        name = facts.path.removeprefix(start)
        if not facts.path.startswith(start) or not name or name.endswith("/"):
            continue  # some tools write folders
        if describes(name) or is_of_shard(name):
            found.objects[name] = facts
        elif is_lease(name):
            found.leases[name] = facts
        elif name == CARD:
            found.card = facts
        elif len(found.others) < _MOST_OTHERS:
            found.others.append(name)
    return found
