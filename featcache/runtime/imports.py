"""A library that fails while it is imported is a matter of this machine, and one line."""

from __future__ import annotations

import traceback

from featcache.runtime import variables

OURS = ("featcache", "student", "pipelines", "benchmarks")


def failure(error: BaseException) -> str | None:
    """Return the line for an error raised where a library was being imported; None for any other.

    Libraries read variables of theirs as they are imported, and say at length what they make of a
    wrong one.
    """
    library = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name in OURS:
            library = None
        elif library is None and frame.f_code.co_name == "<module>" and name != "__main__":
            library = name
    if library is None:
        return None
    found = ", ".join(f"{name}={value!r}" for name, value in variables.recorded().items())
    reason = str(error).strip().partition("\n")[0][:200]
    return (
        f"{library} cannot be imported: {type(error).__name__}: {reason}; it must be installed "
        "whole, and the variables that it reads must be such as it takes (set are: "
        f"{found or 'none known'}); unset a wrong one, or install {library} again"
    )
