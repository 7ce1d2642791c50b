"""Caches live, and runs are logged, below `$FEATCACHE_HOME`, by default `./caches`.

The run ledger lies here and never inside a cache, which may be read-only or shared.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from featcache.storage import manifest

_LOG = logging.getLogger(__name__)


def home() -> Path:
    return Path(os.environ.get("FEATCACHE_HOME") or "caches")


def caches() -> list[Path]:
    """List the folders below home that hold a manifest, by name."""
    found = (path.parent for path in home().glob(f"*/{manifest.NAME}"))
    # hidden ones are half removed
    return sorted(path for path in found if not path.name.startswith("."))


def log_run(**facts: Any) -> None:
    """Append one line to the run ledger; a home that cannot be written is reported and stops
    nothing."""
    line = json.dumps(
        {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts},
        sort_keys=True,
        default=str,
    )
    try:
        home().mkdir(parents=True, exist_ok=True)
        with (home() / "runs.jsonl").open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        _LOG.warning(
            "the run ledger %r cannot be written: %s", str(home() / "runs.jsonl"), error.strerror
        )


def runs_of(cache_id: str) -> list[dict[str, Any]]:
    """Return the ledger's lines on training with a cache, oldest first; lines that cannot be read
    are passed over."""
    try:
        lines = (home() / "runs.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if cache_id in line:
            try:
                facts = json.loads(line)
            except ValueError:  # a process died while it wrote
                continue
            if (
                isinstance(facts, dict)
                and facts.get("cache_id") == cache_id
                and facts.get("command") == "train"
            ):
                found.append(facts)
    return found
