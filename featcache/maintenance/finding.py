"""A finding of `featcache doctor`: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """Say in one line what was found; `state` is ok, note (work goes on, though not as well) or
    broken, `advice` what to do, `facts` the numbers behind the line."""

    what: str
    value: str
    state: str = OK
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_facts(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "what": self.what,
            "value": self.value,
            "state": self.state,
            "advice": self.advice,
            **self.facts,
        }


def error_text(error: BaseException) -> str:
    """Say an error in a few words: the file and reason of one of the system, the kind of another.

    >>> error_text(FileNotFoundError(2, "No such file or directory", "a"))
    "'a': No such file or directory"
    >>> error_text(ImportError("no such library\\nat all"))
    'ImportError: no such library'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename!r}: {error.strerror}" if error.filename else error.strerror
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:300]}"


def gigabytes(count: float) -> str:
    """Write a number of bytes.

    >>> gigabytes(51_234_567_890), gigabytes(67_108_864)
    ('51.23 GB', '0.07 GB')
    """
    return f"{count / 1e9:,.2f} GB"
