"""What is written, renamed or removed lies in folders of the cache itself, never behind a link.

A cache that comes from elsewhere may have a link in the place of `shards/`, `parts/` or a part, and
writing through it would change, or remove, files of others. Everything that writes to shards asks
`own_shards` for the folder. Reading follows links: hubs of models and git-annex keep a cache's
files as links. Where a file is replaced, the link is, and not what it points to; the folder that
a user names may itself be a link.
"""

from __future__ import annotations

from pathlib import Path

from featcache.errors import UserError
from featcache.storage.manifest import COPY, NAME
from featcache.storage.store import PARTS, SHARDS


def linked_folder(part: Path) -> Path | None:
    """Return the first folder on the way from a cache to a part's shards that is a link; None where
    there is none."""
    root = part.parent.parent
    is_addition = part.parent.name == PARTS and (
        (root / NAME).is_file() or (root / SHARDS / COPY).is_file()
    )
    way = (part.parent, part, part / SHARDS) if is_addition else (part / SHARDS,)
    return next((folder for folder in way if folder.is_symlink()), None)


def own_shards(part: Path) -> Path:
    """Return the folder of a part's shards, to write or to remove files there. Raises UserError
    where it lies behind a link."""
    if link := linked_folder(part):
        raise UserError(
            f"{str(link)!r} is a link to {str(link.readlink())!r}, and what lies behind it is left "
            "as it is; copy the cache (`featcache copy`), or put the folder itself there"
        )
    return part / SHARDS
