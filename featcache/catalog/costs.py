"""Costs are summed from the lines of the run ledger, for each cache and each command.

A line is one invocation: a run that was resumed five times has six, of which each counts its own
part alone. Runs are told apart by their folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from featcache.catalog import ledger

EXTRACTS = ("extract", "repair")  # commands in which a teacher makes what a cache holds
_SUMS = (
    "wall_s",
    "device_s",
    "bytes_read",
    "picture_bytes",
    "bytes_written",
    "teacher_s",
    "teacher_saved_s",
)


@dataclass
class Cost:
    """Sums over lines. What a line does not know is left out, and `unknown` counts those lines, of
    `saved` apart."""

    lines: int = 0
    stopped: int = 0
    failed: int = 0
    unknown: int = 0  # lines that say nothing of what they cost, such as those of older versions
    saved_unknown: int = 0  # lines of training from a cache whose teacher's seconds nobody knows
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0))
    runs: set[str] = field(default_factory=set)
    saving_runs: set[str] = field(default_factory=set)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self.lines += 1
        self.stopped += line.get("outcome") == "stopped"
        self.failed += line.get("outcome") == "failed"
        self.unknown += line.get("wall_s") is None
        self.saved_unknown += bool(line.get("views_shown")) and line.get("teacher_saved_s") is None
        for name in _SUMS:
            self.sums[name] += line.get(name) or 0
        if run := line.get("run"):
            self.runs.add(run)
            if line.get("teacher_saved_s"):
                self.saving_runs.add(run)

    def as_json(self) -> dict[str, Any]:
        """Return the sums as plain JSON."""
        return {
            "lines": self.lines,
            "stopped": self.stopped,
            "failed": self.failed,
            "unknown": self.unknown,
            "saved_unknown": self.saved_unknown,
            "runs": len(self.runs),
            **{
                name: round(each, 6) if name.endswith("_s") else each
                for name, each in self.sums.items()
            },
        }


@dataclass
class Costs:
    """All that the ledgers say: by (cache, command), where no cache is "", and by cache."""

    by_command: dict[tuple[str, str], Cost] = field(default_factory=dict)
    total: Cost = field(default_factory=Cost)
    paths: dict[str, str] = field(default_factory=dict)  # where a line last said that a cache was
    passed_over: int = 0  # lines that are none of ours

    @property
    def caches(self) -> list[str]:
        """List the caches that lines name, by id."""
        return sorted({cache for cache, _ in self.by_command if cache})

    def of_caches(self) -> list[Cost]:
        """Return the costs of all work on caches: a teacher in the loop pays nothing back."""
        return [cost for (cache, _), cost in self.by_command.items() if cache]

    def of_cache(self, cache: str) -> list[Cost]:
        """Return the costs of a cache's commands."""
        return [cost for (of, _), cost in self.by_command.items() if of == cache]


def read() -> Costs:
    """Sum all lines of all ledgers."""
    costs = Costs()
    for line in _lines(costs):
        if line["command"] == ledger.USE:  # it announces a run, which has a line of its own
            continue
        cache = line.get("cache_id") or ""
        costs.by_command.setdefault((cache, line["command"]), Cost()).add(line)
        costs.total.add(line)
        if cache and line.get("cache"):
            costs.paths[cache] = line["cache"]
    return costs


def _lines(costs: Costs) -> Iterator[dict[str, Any]]:
    for path in ledger.readable_files():
        for line in ledger.read(path):
            costs.passed_over += line is None
            if line is not None:
                yield line


def payback(costs: list[Cost]) -> dict[str, float | None]:
    """Return the share of the teacher's seconds that runs have saved again, and after how many runs
    such as these all are; null where nothing was spent or saved, as far as is known.

    >>> made, trained = Cost(), Cost()
    >>> made.add({"teacher_s": 30.0})
    >>> trained.add({"run": "a", "teacher_saved_s": 12.0})
    >>> payback([made, trained])
    {'paid_back': 0.4, 'paid_back_after_runs': 2.5}
    """
    spent = sum(cost.sums["teacher_s"] for cost in costs)
    saved = sum(cost.sums["teacher_saved_s"] for cost in costs)
    runs = len(set[str]().union(*(cost.saving_runs for cost in costs)))
    known = bool(spent and saved)
    return {
        "paid_back": round(saved / spent, 3) if known else None,
        # a line may name no run
        "paid_back_after_runs": round(spent / (saved / runs), 2) if known and runs else None,
    }


def seconds_per_view(cache_id: str) -> dict[str, float]:
    """Return what a view took each teacher of a cache as it was extracted, by the ledgers, or as
    the cache was from which it was copied or derived; a teacher of whom nothing is known is
    absent."""
    spent: dict[str, dict[str, tuple[float, float]]] = {}
    origins: dict[str, str] = {}
    for line in _lines(Costs()):
        cache = line.get("cache_id") or ""
        if line.get("from_id"):
            origins[cache] = line["from_id"]
        if line["command"] in EXTRACTS:
            _add_teachers(spent.setdefault(cache, {}), line.get("teacher_cost", {}))
    rates: dict[str, float] = {}
    seen = set[str]()
    while cache_id and cache_id not in seen:
        seen.add(cache_id)
        for name, (seconds, views) in spent.get(cache_id, {}).items():
            if views > 0:
                rates.setdefault(name, seconds / views)
        cache_id = origins.get(cache_id, "")
    return rates


def _add_teachers(
    sums: dict[str, tuple[float, float]], more: dict[str, tuple[float, float]]
) -> None:
    for name, (seconds, views) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + seconds, before[1] + views)
