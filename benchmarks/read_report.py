"""Results of `bench_read` are collected, compared with its claims, and formatted as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click

from benchmarks import markdown_table
from benchmarks.cold import PAIRS, ColdRates
from benchmarks.comparison import Comparison
from benchmarks.records import ReadCase


@dataclass
class Results:
    """Every measured number, for the JSON, and the claims of the last lines."""

    facts: dict[str, Any]
    claims: list[tuple[str, float, bool | None]] = field(default_factory=list)

    def add(self, group: str, comparison: Comparison, name: str, versus: str, **more: Any) -> None:
        self.facts["results"].append({"group": group, **comparison.facts(name, versus), **more})

    def note_pages(self, group: str, *shares: float) -> None:
        """Note the smallest share in the page cache before and after; with less than all of it,
        disks were measured too."""
        self.facts.setdefault("resident", {})[group] = min(shares)
        if min(shares) < 0.99:
            click.echo(
                f"\n{group}: only {100 * min(shares):.0f} % was in the page cache; fewer --rows",
                err=True,
            )

    def claim(self, text: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
        """Add a line to the end; with neither bound it is only printed."""
        aimed = low > 0 or high < math.inf
        self.claims.append((text, value, low <= value <= high if aimed else None))

    def lines(self) -> Iterator[str]:
        for text, value, holds in self.claims:
            yield f"{text} = {value:.2f}" + {True: "  ok", False: "  MISSED", None: ""}[holds]


class PeerResult(NamedTuple):
    """A reader of a peer's format, and ours over it, without and with row checks, in the same kind
    of order."""

    peer: str
    layout: str
    name: str
    kind: str
    by_hand: bool
    gb_s: float
    memcpy: float
    ours: float
    ours_checked: float


def fastest(peer_results: Sequence[PeerResult]) -> list[PeerResult]:
    """Return the fastest reader of each peer for each order, by its own library and by hand."""
    sorts = dict.fromkeys((result.peer, result.kind, result.by_hand) for result in peer_results)
    return [
        min((b for b in peer_results if (b.peer, b.kind, b.by_hand) == sort), key=lambda b: b.ours)
        for sort in sorts
    ]


# ------------------------------------------------------------ tables


def ours_table(facts: Sequence[dict[str, Any]]) -> str:
    """Format our rates beside memcpy's."""
    rows = [
        (
            r["name"],
            *(f"{r[key]:.2f}" for key in ("gb_s", "versus_gb_s", "ratio")),
            f"{r['lowest']:.2f} to {r['highest']:.2f}",
        )
        for r in facts
        if r["group"] == "ours"
    ]
    return markdown_table(["", "GB/s", "memcpy GB/s", "ratio", "range"], rows)


def _marked(name: str, bold: bool) -> str:
    return f"**{name}**" if bold else name


def peers_table(peer_results: Sequence[PeerResult]) -> str:
    """Format all readers; the fastest of each peer for each order in bold."""
    bold = fastest(peer_results)
    rows = [
        (
            f"{_marked(result.name, result in bold)}{' (by hand)' if result.by_hand else ''}",
            result.layout,
            result.kind,
            f"{result.gb_s:.2f}",
            f"{result.memcpy:.2f}",
            f"{result.ours:.2f}",
            f"{result.ours_checked:.2f}",
        )
        for result in peer_results
    ]
    return markdown_table(
        ["", "files", "order", "GB/s", "/ memcpy", "ours / it", "ours, checks / it"], rows
    )


def cold_table(cold: ColdRates) -> str:
    """Format rates from the disk beside plain reads of the same bytes."""
    plain = dict(PAIRS)
    rows = [
        (
            name,
            f"{cold.median(name):.2f}",
            f"{cold.ratio(name, plain[name]):.2f}" if name in plain else "1",
        )
        for name in cold.gb_s
    ]
    return markdown_table(["", "GB/s", "/ plain"], rows)


def claim_ours(
    comparison: Comparison, threads: int, levels: int, visible: int, results: Results
) -> None:
    """Add what is claimed of our own reads, of all rows and of parts of them."""
    plain, checked = ReadCase("rows", threads, checks=False), ReadCase("rows", threads, checks=True)
    results.claim(
        "random rows, no checks / memcpy", comparison.ratio(plain.name, plain.memcpy.name), 0.8
    )
    results.claim(
        "random rows, row checks / memcpy", comparison.ratio(checked.name, checked.memcpy.name), 0.6
    )
    for case in (plain, checked):
        fresh = case._replace(fresh=True)
        words = "row checks" if case.checks else "no checks"
        results.claim(
            f"random rows without out=, {words} / memcpy",
            comparison.ratio(fresh.name, fresh.memcpy.name),
            0.7,
        )
    for case in (plain, checked):
        words = "row checks" if case.checks else "no checks"
        if levels > 1:
            part = comparison.time_ratio(case._replace(levels=1).name, case.name)
            results.claim(f"time for 1 of {levels} levels / all, {words}", part, high=1.25 / levels)
        for threads in sorted({1, case.threads}):
            whole = case._replace(threads=threads)
            for kept in (False, True):
                few = whole._replace(tokens=visible, kept=kept)
                text = (
                    f"{visible} {'kept' if kept else 'ranked'} tokens / all, {words}, "
                    f"threads: {threads}"
                )
                results.claim(
                    f"time for {text}", comparison.time_ratio(few.name, whole.name), high=0.35
                )
    for threads in sorted({1, plain.threads}):
        bare = ReadCase("rows", threads, bare=True)
        for kept in (False, True):
            few = bare._replace(tokens=visible, kept=kept)
            text = f"{visible} {'kept' if kept else 'ranked'} tokens / all, threads: {threads}"
            results.claim(
                f"plain preads: time for {text}", comparison.time_ratio(few.name, bare.name)
            )
