"""Runs are sorted by a score, best first."""

from __future__ import annotations

from typing import Any

from featcache.errors import UsageError, near
from featcache.storage import json_file

Facts = dict[str, Any]


def best_first(found: list[Facts], wanted: str) -> tuple[list[Facts], str, list[str]]:
    """Sort runs by their newest score of a protocol, or of PROTOCOL/TEST; those without come last.
    Return them, PROTOCOL/TEST and notes. UsageError where no run has the score, or where several
    test sets may be meant."""
    label = _label(found, wanted)
    with_score = [facts for facts in found if label in facts["scores"]]
    without = [facts for facts in found if label not in facts["scores"]]
    ordered = sorted(with_score, key=lambda facts: -facts["scores"][label]["score"])
    settings = {json_file.digest(facts["scores"][label]["settings"]) for facts in with_score}
    notes = [f"note: {label} was measured with several settings; `student compare` says which"] * (
        len(settings) > 1
    )
    return ordered + without, label, notes


def _label(found: list[Facts], wanted: str) -> str:
    """Return the PROTOCOL/TEST that is meant."""
    scores = {label: each for facts in found for label, each in facts["scores"].items()}
    if wanted in scores:
        return wanted
    meant = sorted(label for label, each in scores.items() if each["protocol"] == wanted)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UsageError(
            f"--sort {wanted[:80]}: there are several test sets; give one of {', '.join(meant[:8])}"
        )
    if not scores:
        raise UsageError(
            f"--sort {wanted[:80]}: no run here has a score; `student eval` writes results.jsonl"
        )
    raise UsageError(f"--sort: no run has a score {wanted[:80]!r}: {near(wanted, scores)}")
