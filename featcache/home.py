"""Where caches live and where runs are noted: `$FEATCACHE_HOME`, by default `./caches`.

The run ledger lies here and never inside a cache, which may be read-only or shared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from featcache import manifest


def home() -> Path:
    return Path(os.environ.get("FEATCACHE_HOME") or "caches")


def caches() -> list[Path]:
    """Folders below home that hold a manifest, by name."""
    return sorted(path.parent for path in home().glob(f"*/{manifest.NAME}"))


def note_run(**facts: Any) -> None:
    """Append one line to the ledger; a home that cannot be written is told once and stops nothing."""
    line = json.dumps(
        {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}, sort_keys=True, default=str
    )
    try:
        home().mkdir(parents=True, exist_ok=True)
        with (home() / "runs.jsonl").open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"note: the run ledger {home() / 'runs.jsonl'} cannot be written: {error.strerror}", file=sys.stderr)
