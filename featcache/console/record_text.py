"""A record of a cache is told in lines: how its views were drawn, and what each teacher says of
them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featcache.console.block_map import block_map
from featcache.errors import counted

ORDER_SHOWN = 12  # patches of the mask order
LARGEST_MAP = 60  # patches a side of an attention that a terminal has room for


def lines(facts: Mapping[str, Any], shades: str) -> Iterator[str]:
    """Yield the lines of a record, as `drawing.record.describe` tells it."""
    for teacher in facts["random_weights"]:
        yield f"RANDOM WEIGHTS: {teacher} was never trained, no meaning in its features"
    yield facts["key"]
    yield (
        f"row {facts['row']} of {facts['rows']}, row {facts['row_of_shard']} of shard "
        f"{facts['shard']}; cache {facts['cache']}, id {facts['id']}"
    )
    for view in facts["views"]:
        yield ""
        yield from _view(view, facts["stored_views"], shades)
    yield ""
    views = counted(len(facts["views"]), "view")
    if facts["problems"]:
        yield from facts["problems"]
    else:
        yield f"checksums: all {len(facts['arrays'])} arrays of {views} are as they were written"


def _view(view: Mapping[str, Any], stored: int, shades: str) -> Iterator[str]:
    if "crop" in view:
        top, left, height, width = view["crop"]
        rows, columns = view["source_size"]
        yield (
            f"view {view['view']} of {stored}: {height} x {width} of {rows} x {columns} pixels, "
            f"from row {top}, column {left}"
            f"{'; mirrored' if view['flip'] else ''}{_jitter(view['jitter'])}"
        )
    else:
        yield f"view {view['view']} of {stored}"
    for teacher, found in view["teachers"].items():
        yield f"  {teacher}"
        for level, about in found["levels"].items():
            yield f"    level {level}: {_level(about)}"
        if found["attention"] is not None:
            yield from _attention(found["attention"], found["half"], shades)
        if found["mask_order"] is not None:
            yield f"    mask order begins {_first(found['mask_order'])}"
        if found["token_ids"] is not None:
            yield f"    token ids begin {_first(found['token_ids'])}"


def _jitter(jitter: Mapping[str, Any]) -> str:
    """Say how the colours were changed; nothing where they were not."""
    if all(factor == 1 for factor in jitter.values()):
        return ""
    return "; " + ", then ".join(f"{name} x {factor:.3f}" for name, factor in jitter.items())


def _level(about: Mapping[str, Any]) -> str:
    tokens, width = about["shape"]
    stored = about["stored_tokens"]
    here = (
        counted(tokens, "token")
        if stored == tokens
        else f"{stored} of {counted(tokens, 'token')} stored"
    )
    text = f"{here} x {width}, norm {_norms(about['norm'])}"
    residual = about["residual_norm"]
    return text + (f"; residual stream {_norms(residual)}" if residual else "")


def _norms(norms: Mapping[str, float | None]) -> str:
    """Say the norms of a level's tokens.

    >>> _norms({"cls": 27.71, "mean": 20.0, "min": 1.5, "max": 1234.5})
    '[CLS] 27.7, patches 20 (1.5 to 1.23e+03)'
    """
    first = "no number" if norms["cls"] is None else f"{norms['cls']:.3g}"
    if norms["mean"] is None:
        return f"[CLS] {first}, no patch"
    low, high = norms["min"], norms["max"]
    return f"[CLS] {first}, patches {norms['mean']:.3g} ({low:.3g} to {high:.3g})"


def _attention(attention: Sequence[float], half: int, shades: str) -> Iterator[str]:
    side = math.isqrt(len(attention))
    yield (
        f"    attention: sum {sum(attention):.3f}, largest {max(attention):.4f}; half of it in "
        f"{half} of {counted(len(attention), 'patch', 'patches')}"
    )
    if side <= LARGEST_MAP:
        yield from (f"      |{line}|" for line in block_map(attention, side, shades))


def _first(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > ORDER_SHOWN else ""
    return ", ".join(map(str, numbers[:ORDER_SHOWN])) + more
