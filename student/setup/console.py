"""A run of several processes speaks with one voice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featcache.console.text import echo, print_facts
from featcache.errors import one_line


@dataclass(frozen=True)
class Console:
    """The first process of a run speaks, all others say nothing."""

    speaks: bool
    as_json: bool

    def say(self, text: str) -> None:
        if self.speaks:
            echo(one_line(text), err=True)

    def print(self, facts: dict[str, Any], text: str) -> None:
        if self.speaks:
            print_facts(facts, self.as_json, text)
