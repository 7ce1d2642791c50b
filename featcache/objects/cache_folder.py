"""What is kept of object stores on this machine lies below the user's own folder of caches."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ~/.cache/featcache/objects, or where XDG_CACHE_HOME says."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "featcache" / "objects"
