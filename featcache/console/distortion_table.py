"""What a codec loses is told level by level, beside what the teacher's own arithmetic changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.console.text import format_table
from featcache.errors import counted
from featcache.storage import manifest
from featcache.storage.part import added_parts, describe_part


def loss_lines(cache: Path) -> list[str]:
    """Return lines on the cache at `cache`, and on what was added to it."""
    lines = []
    for part in (cache, *added_parts(cache)):
        about = manifest.read(part)
        identity, facts = about["identity"], about["provenance"].get("distortion", {})
        found = distortion_lines(identity["codec"], identity["levels"], facts)
        lines += [f"added, {describe_part(about)}:", *found] if found and part != cache else found
    return lines


def distortion_lines(codec: str, levels: Sequence[int], facts: Mapping[str, Any]) -> list[str]:
    """Return lines on what was measured as a part was begun; none where nothing was.

    >>> for line in distortion_lines("t4", [11, 12], {
    ...     "views": 16, "cosine": [0.9972, 0.9971], "mse": [0.0057, 0.0056],
    ...     "worst": [0.0103, 0.0088], "added_loss": [0.0216, 0.0224], "batch_mse": [1e-7, 2e-7],
    ...     "batch_added_loss": [1e-7, 0.0]}):
    ...     print(line)
    codec t4 loses, of 16 views:
    level  cosine  relative MSE  worst token  added loss at a residual of 0.5
    11     0.9972  5.7e-03       1.0e-02      2.16 %
    12     0.9971  5.6e-03       8.8e-03      2.24 %
    the teacher alone, in batches of another size: relative MSE 2.0e-07, added loss 0.00 %
    """
    lines = []
    if facts.get("mse"):
        names = (
            "level",
            "cosine",
            "relative MSE",
            "worst token",
            "added loss at a residual of 0.5",
        )
        every = zip(
            levels, *(facts[key] for key in ("cosine", "mse", "worst", "added_loss")), strict=True
        )
        rows = [
            (str(level), f"{cosine:.4f}", f"{mse:.1e}", f"{worst:.1e}", _percent(added))
            for level, cosine, mse, worst, added in every
        ]
        lines = [f"codec {codec} loses, of {counted(facts['views'], 'view')}:"]
        lines += [line.rstrip() for line in format_table([names, *rows]).split("\n")]
    for what, key in (
        ("in batches of another size", "batch"),
        (f"in {facts.get('precision')}", "precision"),
    ):
        if facts.get(f"{key}_mse"):
            mse, added = max(facts[f"{key}_mse"]), max(facts[f"{key}_added_loss"])
            lines.append(
                f"the teacher alone, {what}: relative MSE {mse:.1e}, added loss {_percent(added)}"
            )
    return lines


def _percent(share: float) -> str:
    """Write a share in percent; never -0.00."""
    return f"{max(100 * share, 0.0):.2f} %"
