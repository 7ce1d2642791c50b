"""Trellis codes are searched for and read on a CPU, `LANES` tokens at a time, so that the machine's
vectors hold one number of each.

The same arithmetic as `trellis` has in tensors, in the same order: additions, products, and
comparisons of float32, none of them fused. N tokens, D width, k bits a value, B bytes of codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.runtime.jit import compiled
from featcache.targets.rotation import TURNS

LANES = 16
STATES = 256


@compiled
def _rotate(x: Any, scratch: Any, signs: Any, order: Any, block: int, turns: Any) -> None:
    """Rotate LANES tokens (D, LANES) where they are, by their `turns` after the second round;
    `scratch` is as large."""
    width = x.shape[0]
    for turn in range(signs.shape[0]):
        for i in range(width):
            if signs[turn, i] < 0:
                for lane in range(LANES):
                    x[i, lane] = -x[i, lane]
        _hadamard(x, block)
        for i in range(width):
            source = order[turn, i]
            for lane in range(LANES):
                scratch[i, lane] = x[source, lane]
        if turn == signs.shape[0] // 2 - 1:
            _turn(scratch, x, turns)
        else:
            for i in range(width):
                for lane in range(LANES):
                    x[i, lane] = scratch[i, lane]


@compiled
def _turn(source: Any, out: Any, places: Any) -> None:
    """Turn the channels of LANES tokens: what is at i comes to i + places (LANES,)."""
    width = source.shape[0]
    for lane in range(LANES):
        at = places[lane] % width
        for i in range(width):
            out[at, lane] = source[i, lane]
            at = at + 1 if at + 1 < width else 0


@compiled
def _turn_back(source: Any, out: Any, places: Any) -> None:
    width = source.shape[0]
    for lane in range(LANES):
        at = places[lane] % width
        for i in range(width):
            out[i, lane] = source[at, lane]
            at = at + 1 if at + 1 < width else 0


@compiled
def _rotate_back(x: Any, scratch: Any, signs: Any, order: Any, block: int, turns: Any) -> None:
    width = x.shape[0]
    for turn in range(signs.shape[0] - 1, -1, -1):
        if turn == signs.shape[0] // 2 - 1:
            _turn_back(x, scratch, turns)
            x[:] = scratch
        for i in range(width):
            target = order[turn, i]
            for lane in range(LANES):
                scratch[target, lane] = x[i, lane]
        _hadamard(scratch, block)
        for i in range(width):
            if signs[turn, i] < 0:
                for lane in range(LANES):
                    x[i, lane] = -scratch[i, lane]
            else:
                for lane in range(LANES):
                    x[i, lane] = scratch[i, lane]


@compiled
def _hadamard(x: Any, block: int) -> None:
    width, half = x.shape[0], 1
    while half < block:
        for first in range(0, width, 2 * half):
            for i in range(first, first + half):
                for lane in range(LANES):
                    a, b = x[i, lane], x[i + half, lane]
                    x[i, lane] = a + b
                    x[i + half, lane] = a - b
        half *= 2


@compiled
def _load(residual: Any, turns: Any, number: int, first: int, x: Any, later: Any) -> int:
    """Load up to LANES tokens from `first` on, their channels turned by the turn of this `number`,
    zeros behind the last; returns how many. `later` (LANES,) is what is left of the turns."""
    count, width = min(LANES, residual.shape[0] - first), x.shape[0]
    x[:] = 0
    later[:] = 0
    for lane in range(count):
        at = turns[first + lane, number] % TURNS % width
        later[lane] = turns[first + lane, number] // TURNS
        for i in range(width):
            x[at, lane] = residual[first + lane, i]
            at = at + 1 if at + 1 < width else 0
    return int(count)


@compiled
def _keep_better(x: Any, largest: Any, best: Any, turns: Any, number: int, first: int) -> None:
    """Keep the tokens whose largest value is smaller than that of earlier turns."""
    here = np.zeros(LANES, np.float32)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            here[lane] = max(here[lane], abs(x[i, lane]))
    for lane in range(min(LANES, turns.shape[0] - first)):
        if number == 0 or here[lane] < largest[lane]:
            largest[lane] = here[lane]
            turns[first + lane, 0] = turns[first + lane, number]
            for i in range(x.shape[0]):
                best[i, lane] = x[i, lane]


@compiled
def _unit(x: Any, rms: Any) -> None:
    """Divide tokens by their root mean square, which goes into `rms` (LANES,) float64."""
    width = x.shape[0]
    rms[:] = 0
    for i in range(width):
        for lane in range(LANES):
            rms[lane] += np.float64(x[i, lane]) * np.float64(x[i, lane])
    for lane in range(LANES):
        rms[lane] = np.sqrt(rms[lane] / width)
    for i in range(width):
        for lane in range(LANES):
            if rms[lane] > 0:
                x[i, lane] = np.float32(np.float64(x[i, lane]) / rms[lane])


@compiled
def _scale(x: Any, path: Any, table: Any, rms: float, lane: int) -> Any:
    """The factor that makes the error of a token orthogonal to it: no value shrinks on average."""
    own = common = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i, lane])
        own += value * value
        common += value * np.float64(table[path[i, lane]])
    return np.float32(rms * own / common) if common > 0 else np.float32(0)


@compiled
def _nearest(x: Any, edges: Any, path: Any) -> None:
    """Find the code of each value in a table whose `edges` (255,) lie between its numbers."""
    for i in range(x.shape[0]):
        for lane in range(LANES):
            at = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                if x[i, lane] > edges[at + step - 1]:
                    at += step
            path[i, lane] = at


def _search_of(bits: int) -> Any:
    """Return the search for the best path (D, LANES) of states through tokens (D, LANES), compiled
    for so many bits a value."""
    branches, groups = 1 << bits, STATES >> bits
    rows, parts = max(branches // groups, 1), max(groups // branches, 1)
    columns = LANES * groups

    # cost[j, lane * groups + g] is that of state j * groups + g: the last `bits` bits of two states
    # that lead to the same ones differ in j alone
    def search(x: Any, table: Any, back: Any, path: Any) -> None:
        width = x.shape[0]
        cost = np.full((branches, columns), np.float32(np.inf), np.float32)
        for lane in range(LANES):
            cost[0, lane * groups] = 0
        best, come = np.empty(columns, np.float32), np.empty(columns, np.int32)
        numbers = table.reshape(groups, branches)
        for t in range(width):
            for w in range(columns):
                best[w] = cost[0, w]
                come[w] = 0
            for j in range(1, branches):
                row = cost[j]
                for w in range(columns):
                    come[w] = np.int32(j) if row[w] < best[w] else come[w]
                    best[w] = row[w] if row[w] < best[w] else best[w]
            for w in range(columns):
                back[t, w] = come[w]
            # the next state is g * branches + b
            if groups <= branches:
                for g in range(groups):
                    for lane in range(LANES):
                        so_far, value = best[lane * groups + g], x[t, lane]
                        for r in range(rows):
                            for b in range(groups):
                                d = value - numbers[g, r * groups + b]
                                cost[g * rows + r, lane * groups + b] = so_far + d * d
            else:
                for j in range(branches):
                    for lane in range(LANES):
                        value = x[t, lane]
                        for p in range(parts):
                            g = j * parts + p
                            so_far = best[lane * groups + g]
                            for b in range(branches):
                                d = value - numbers[g, b]
                                cost[j, lane * groups + p * branches + b] = so_far + d * d
        for lane in range(LANES):
            state, least = 0, np.float32(np.inf)
            for s in range(STATES):
                here = cost[s // groups, lane * groups + s % groups]
                if here < least:
                    state, least = s, here
            for t in range(width - 1, -1, -1):
                path[t, lane] = state
                state = back[t, lane * groups + (state >> bits)] * groups + (state >> bits)

    return compiled(search)


# Made here, and no inner variables of `encode`: what is compiled of a function that holds another
# one in itself is found again by no other process.
_search_4, _search_3 = _search_of(4), _search_of(3)


@compiled
def encode(
    residual: Any,
    turns: Any,
    signs: Any,
    order: Any,
    block: int,
    table: Any,
    edges: Any,
    bits: int,
    scales: Any,
    codes: Any,
) -> None:
    """Encode residuals (N, D) float32 in 8, 4 or 3 `bits` a value to `scales` (N,) float32 and
    `codes` (N, B) uint8. Of `turns` (N, tries) the best one is used, and becomes the first."""
    width, gain = residual.shape[1], float(block) ** (len(signs) // 2)
    x = np.empty((width, LANES), np.float32)
    best, scratch, rms = np.empty_like(x), np.empty_like(x), np.empty(LANES, np.float64)
    largest, later = np.empty(LANES, np.float32), np.empty(LANES, np.int64)
    path = np.empty((width, LANES), np.int32)
    back = np.empty((width if bits < 8 else 1, LANES * (STATES >> bits)), np.uint8)
    fresh = (1 << bits) - 1
    codes[:] = 0
    for first in range(0, residual.shape[0], LANES):
        best[:] = 0
        for number in range(turns.shape[1]):
            count = _load(residual, turns, number, first, x, later)
            _rotate(x, scratch, signs, order, block, later)
            _keep_better(x, largest, best, turns, number, first)
        _unit(best, rms)
        if bits == 8:
            _nearest(best, edges, path)
        elif bits == 4:
            _search_4(best, table, back, path)
        else:
            _search_3(best, table, back, path)
        for lane in range(count):
            scales[first + lane] = _scale(best, path, table, rms[lane] / gain, lane)
            if scales[first + lane] == 0:
                continue
            for i in range(width):
                end = bits * (i + 1)  # bits of the stream up to this value
                word = (path[i, lane] & fresh) << (7 - (end - 1) % 8)
                at = first + lane, (end - 1) // 8
                codes[at] |= np.uint8(word & 255)
                if word > 255:  # it begins in the byte before
                    codes[at[0], at[1] - 1] |= np.uint8(word >> 8)


@compiled
def decode(
    factors: Any,
    turns: Any,
    codes: Any,
    signs: Any,
    order: Any,
    block: int,
    table: Any,
    bits: int,
    means: Any,
    tokens: int,
    number: int,
    out: Any,
) -> None:
    """Decode `factors` (N,), `turns` (N,) and `codes` (N, B) to `out` (N, D) float32; of `means`
    (L, D) token i is given that of level i // tokens % L, counted from `number`."""
    width = out.shape[1]
    x = np.zeros((width, LANES), np.float32)
    scratch, later = np.empty_like(x), np.zeros(LANES, np.int64)
    for first in range(0, codes.shape[0], LANES):
        count = min(LANES, codes.shape[0] - first)
        for lane in range(count):
            for i in range(width):
                end = bits * (i + 1)
                at = (end - 1) // 8
                before = np.int32(codes[first + lane, at - 1]) if at else np.int32(0)
                word = before << 8 | np.int32(codes[first + lane, at])
                x[i, lane] = table[(word >> (7 - (end - 1) % 8)) & 255]
            later[lane] = turns[first + lane] // TURNS
        _rotate_back(x, scratch, signs, order, block, later)
        for lane in range(count):
            token = first + lane
            factor, mean = factors[token], means[(number + token) // tokens % len(means)]
            at = turns[token] % TURNS % width
            for i in range(width):
                out[token, i] = x[at, lane] * factor + mean[i]
                at = at + 1 if at + 1 < width else 0
