"""Settings name the teacher levels that are aligned, and their weights."""

from __future__ import annotations

from featcache.errors import UsageError, counted, near
from featcache.runtime.numbers import is_whole


def parse_align_levels(text: str) -> list[int] | None:
    """Return the levels that `align_levels` names: None for auto, [-K] for last:K, else the numbers
    of the list."""
    if text == "auto":
        return None
    kind, colon, count = text.partition(":")
    if kind == "last" and colon and is_whole(count) and int(count) > 0:
        return [-int(count)]
    if numbers := parse_block_numbers(text):
        return numbers
    raise UsageError(
        f"cannot read align_levels={text!r}; allowed: auto, last:K, or block numbers from 1 such "
        "as 8,10,12; change it with align_levels=VALUE"
    )


def parse_block_numbers(text: str) -> list[int]:
    """Return the block numbers from 1 of a list, ascending, each once; none where it is no list.

    >>> parse_block_numbers("12, 8,8"), parse_block_numbers("0,3"), parse_block_numbers("last:2")
    ([8, 12], [], [])
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(is_whole(part) and int(part) > 0 for part in parts):
        return []
    return sorted({int(part) for part in parts})


def aligned_levels(level_weights: str, align_levels: str, teacher_depth: int) -> dict[int, float]:
    """Return the aligned teacher levels (block numbers from 1, ascending) and their weights, those
    of weight 0 left out.

    `auto` aligns what the weights name: the last K for top:K, the last for last, all for mean and
    linear-decay.

    >>> aligned_levels("top:2", "auto", 12)
    {11: 0.5, 12: 0.5}
    >>> aligned_levels("mean", "8,12", 12)
    {8: 0.5, 12: 0.5}
    """
    chosen = parse_align_levels(align_levels)
    if chosen is None:
        kind, count = parse_level_weights(level_weights)
        chosen = [-{"top": count, "last": 1}.get(kind, teacher_depth)]
    if chosen[0] < 0:
        _check_depth(-chosen[0], level_weights, align_levels, teacher_depth)
        chosen = list(range(teacher_depth + chosen[0] + 1, teacher_depth + 1))
    _check_depth(chosen[-1], level_weights, align_levels, teacher_depth)
    weights = expand_level_weights(level_weights, len(chosen))
    return {level: weight for level, weight in zip(chosen, weights, strict=True) if weight > 0}


def _check_depth(needed: int, level_weights: str, align_levels: str, teacher_depth: int) -> None:
    if needed > teacher_depth:
        raise UsageError(
            f"cannot align levels: level_weights={level_weights} with align_levels={align_levels} "
            f"needs {counted(needed, 'level')}; allowed: the teacher's {teacher_depth}; "
            "give fewer, as in "
            f"level_weights=top:{teacher_depth}, or teacher_depth=N of a deeper teacher"
        )


LEVEL_WEIGHTS = ("top:K", "mean", "last", "linear-decay")


def expand_level_weights(name: str, n: int) -> tuple[float, ...]:
    """Return the weights of n aligned levels, lowest first; they sum to 1.

    >>> expand_level_weights("top:2", 4)
    (0.0, 0.0, 0.5, 0.5)
    >>> expand_level_weights("linear-decay", 3)
    (0.0, 0.3333333333333333, 0.6666666666666666)
    """
    kind, count = parse_level_weights(name)
    if kind == "top":
        if count > n:
            # The released code would give the n levels 1/K each, a sum of n/K.
            raise UsageError(
                f"cannot weight levels: level_weights={name} needs "
                f"{counted(count, 'level')}, {n} are "
                f"aligned; give level_weights=top:{n} or less, or align more levels"
            )
        return (0.0,) * (n - count) + (1 / count,) * count
    if kind == "mean":
        return (1 / n,) * n
    if kind == "last":
        return (0.0,) * (n - 1) + (1.0,)
    if n < 2:
        raise UsageError(
            f"cannot weight levels: linear-decay over {n} level is 0 everywhere; allowed: 2 levels "
            "or more; give level_weights=last, or align more levels"
        )
    return tuple(i / (n * (n - 1) / 2) for i in range(n))


def parse_level_weights(name: str) -> tuple[str, int]:
    """Return ('top', K), or (name, 0) for the names without a count; anything else is refused."""
    kind, colon, count = name.partition(":")
    if kind == "top" and colon and is_whole(count) and int(count) > 0:
        return kind, int(count)
    if name in LEVEL_WEIGHTS[1:]:
        return name, 0
    raise UsageError(
        f"unknown level_weights {name!r}: {near(name, LEVEL_WEIGHTS)} (K a whole number from 1, "
        "such as top:5)"
    )
