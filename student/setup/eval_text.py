"""The result of an evaluation is told in a few lines."""

from __future__ import annotations

from typing import Any

from featcache.console.text import join_lines

_CHOSEN = ("k", "temperature", "blr", "C")  # what a protocol chooses on training pictures


def of_result(name: str, facts: dict[str, Any]) -> str:
    """Return accuracies with their intervals, and what was chosen on training pictures."""
    training = f", {facts['n_train']} training" if facts["n_train"] else ""
    lines = [
        f"{name} of {facts['of']}{' on ' + test if len(facts['tests']) > 1 else ''}: top-1 "
        f"{each['top1']:.2f} % ({each['interval'][0]:.1f} to {each['interval'][1]:.1f}; "
        f"{each['n_test']} test{training} pictures)"
        for test, each in facts["tests"].items()
    ]
    if "grid" in facts:
        chosen = [f"--{key} {facts[key]:g}" for key in _CHOSEN if key in facts]
        lines.append(f"{' '.join(chosen)}: best of {len(facts['grid'])} on training pictures")
    if "skipped" in facts:
        lines.append(f"left out, as they cannot be decoded: {facts['skipped']['count']}")
    return join_lines(lines)
