"""Levels are stored in 8, 4 or 3 bits a value: what is left of a token without the channels' means
is rotated, divided by its root mean square, and written as one stream of bits.

The value of a channel is `table[w]`, where w is the last 8 bits of the stream up to there: with 4
or 3 new bits a value, most of the window is shared with the values before, and the best stream is
searched for (Viterbi; trellis-coded quantisation, Marcellin and Fischer 1990, with the shift
register of Mao, Gray and Linder 2012). With 8 new bits it is the nearest number of the table.

    token    scale, 4 bytes (float32, little-endian), then D k / 8 bytes, the first bit the highest
    decoded  mean + scale / gain * rotate_back(values)

The scale makes the error orthogonal to the token, so that decoded tokens are not shorter on
average. Its lowest 12 bits are `turn`, the number of the token's own rotation. Of `TRIES` numbers
that begin with a hash of the token, the one whose largest value is smallest is taken: tokens which
are alike do not share an error, so what they lose is gone on average, and no token has a value far
beyond the table. L levels, T tokens, D width, B bytes of a token, N tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.targets import rotation, trellis_tables
from featcache.targets.codec_names import SCALE_BYTES, token_bytes

State = Mapping[str, Tensor]
_STATES = 256
_CHUNK = 1 << 14  # tokens of one search on a GPU: 16 or 32 bytes a value
_LEAST = 64  # tokens that are worth a thread
_TURNS = rotation.TURNS**2 - 1
TRIES, _STEP = 4, 1237  # turns of a token, and from one to the next


def prepare(sample: Iterable[Tensor], seed: int, bits: int) -> dict[str, Tensor]:
    """Make the state from views (L, T, D), as fp16 has them: `mean` (L, D) float32 of all their
    tokens, summed in float64 in the order given; `signs` and `order` of the rotation; `table`."""
    total, count = torch.zeros(()), 0
    for levels in sample:
        # in the order of tokens, wherever the views are
        total = total + levels.half().cpu().double().cumsum(1)[:, -1]
        count += levels.shape[1]
    mean = (total / count).float()
    return {
        "mean": mean,
        **rotation.draw(mean.shape[-1], seed),
        "table": trellis_tables.table(bits),
    }


def state_problem(state: State, levels: int, width: int, bits: int) -> str:
    """Say what is wrong with a state that was read from a file, for L levels of width D; empty
    where nothing is. Its numbers become places in memory."""
    expected = prepare([torch.zeros(1, 1, width)], 0, bits)
    shapes = {name: tuple(like.shape) for name, like in expected.items()}
    shapes["mean"] = (levels, width)
    if state.keys() != expected.keys():
        return f"it holds {', '.join(sorted(state)) or 'nothing'}, not {', '.join(expected)}"
    for name, like in expected.items():
        if (tuple(state[name].shape), state[name].dtype) != (shapes[name], like.dtype):
            return (
                f"{name!r} is {state[name].dtype} {list(state[name].shape)}, {like.dtype} "
                f"{list(shapes[name])} is needed"
            )
    problems = {
        "'mean' is not finite": not state["mean"].isfinite().all(),
        "'mean' is not that of normalised levels": not (
            state["mean"].abs() <= 2 * width**0.5  # no level is beyond the root of D
        ).all(),
        "'signs' are not 1 and -1": not (state["signs"].abs() == 1).all(),
        "'order' is no permutation": not (
            state["order"].sort(1).values == torch.arange(width)
        ).all(),
        "'table' is not the codec's": not torch.equal(state["table"], expected["table"]),
    }
    return next((text for text, found in problems.items() if found), "")


def encode(h: Tensor, state: State, bits: int) -> Tensor:
    """Encode levels (..., L, T, D) to (..., L, T, B) uint8, where they are."""
    _check_width(h, state["mean"].shape[-1])
    rounded = h.half()
    residual = (rounded.float() - state["mean"][:, None]).reshape(-1, h.shape[-1])
    first = _hashes(rounded).reshape(-1)
    on_cpu = h.device.type == "cpu" and _compiles()
    work = _encode_on_cpu if on_cpu else _encode
    scales, turns, codes = work(residual.contiguous(), first, state, bits)
    head = _with_turns(scales, turns)[:, None].contiguous().view(torch.uint8)
    return torch.cat((head, codes), 1).reshape(*h.shape[:-1], token_bytes(h.shape[-1], bits))


def decode(coded: Tensor, state: State, bits: int) -> Tensor:
    """Decode (..., L, T, B) uint8 to (..., L, T, D) float32, where they are."""
    _check_width(coded, token_bytes(state["mean"].shape[-1], bits))
    flat = coded.reshape(-1, coded.shape[-1])
    scales = flat[:, :SCALE_BYTES].contiguous().view(torch.float32)[:, 0]
    turns = scales.view(torch.int32) & _TURNS
    factors = scales / rotation.gain(state["mean"].shape[-1])
    codes = flat[:, SCALE_BYTES:]
    shape = (*coded.shape[:-1], state["mean"].shape[-1])
    if coded.device.type == "cpu" and _compiles():
        return _decode_on_cpu(factors, turns, codes, state, bits, coded.shape[-2]).reshape(shape)
    out = coded.new_empty(len(flat), shape[-1], dtype=torch.float32)
    parts = (each.split(_CHUNK) for each in (factors, turns, codes, out))
    for factor, turn, code, values in zip(*parts, strict=True):  # a batch at once is too large
        turned = rotation.rotate_back(state["table"][_windows(code, bits)], state, turn)
        torch.mul(turned, factor[:, None], out=values)
    return out.reshape(shape) + state["mean"][:, None]


def _check_width(values: Tensor, wanted: int) -> None:
    """Raise UserError for tokens of another size: compiled loops would read beyond them."""
    if values.shape[-1] != wanted:
        raise UserError(
            f"tokens of {values.shape[-1]} numbers are given, the codec's state is made for "
            f"{wanted}; extract again"
        )


def _hashes(rounded: Tensor) -> Tensor:
    """Hash tokens (..., D) of float16 to (...) numbers below 4,096: the sum of their bits, times
    the golden ratio of 32 bits."""
    total = (rounded.contiguous().view(torch.int16).long() & 0xFFFF).sum(-1)
    return ((total * 0x9E3779B1 >> 20) & _TURNS).int()


def _with_turns(scales: Tensor, turns: Tensor) -> Tensor:
    """Return the float32 nearest to each scale whose lowest bits are `turns`; 0, and what is below
    the normal numbers, becomes 0."""
    bits = scales.view(torch.int32)
    nearest = ((bits - turns + (_TURNS + 1) // 2) & ~_TURNS) + turns
    normal = scales >= torch.finfo(torch.float32).tiny
    return torch.where(normal, nearest, 0).int().view(torch.float32)


def _compiles() -> bool:
    from numba import config

    return not config.DISABLE_JIT  # type: ignore[attr-defined]


# ------------------------------------------------------------ on a CPU, compiled


def _encode_on_cpu(
    residual: Tensor, first: Tensor, state: State, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    from featcache.targets import trellis_jit

    n, width = residual.shape
    scales, codes = torch.empty(n), torch.empty(n, width * bits // 8, dtype=torch.uint8)
    table = state["table"].numpy()
    turns = (first[:, None] + _STEP * torch.arange(TRIES, dtype=torch.int32)) & _TURNS
    arrays = [each.numpy() for each in (residual, turns, scales, codes)]
    edges = ((table[1:] + table[:-1]) / 2).astype("f4")

    def run(part: slice) -> None:
        of, turn, scale, code = (each[part] for each in arrays)
        trellis_jit.encode(of, turn, *_rotation(state, width), table, edges, bits, scale, code)

    _in_threads(run, n)
    return scales, turns[:, 0], codes


def _decode_on_cpu(
    factors: Tensor, turns: Tensor, codes: Tensor, state: State, bits: int, tokens: int
) -> Tensor:
    from featcache.targets import trellis_jit

    width = state["mean"].shape[-1]
    out = torch.empty(len(codes), width)
    arrays = [each.numpy() for each in (factors, turns, codes.contiguous(), out)]
    table, means = (state[name].contiguous().numpy() for name in ("table", "mean"))

    def run(part: slice) -> None:
        factor, turn, code, to = (each[part] for each in arrays)
        given = (factor, turn, code, *_rotation(state, width), table, bits)
        trellis_jit.decode(*given, means, tokens, part.start, to)

    _in_threads(run, len(codes))
    return out


def _rotation(state: State, width: int) -> tuple[Any, Any, int]:
    return state["signs"].numpy(), state["order"].numpy(), rotation.block_width(width)


def _in_threads(run: Callable[[slice], None], n: int) -> None:
    """Run over ranges of n tokens, in as many threads as torch has. They are made each time: a
    process that forks would lose those that are kept."""
    threads = max(1, min(torch.get_num_threads(), n // _LEAST))
    ends = [n * i // threads for i in range(threads + 1)]
    parts = [slice(*pair) for pair in pairwise(ends)]
    if threads == 1:
        run(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))


# ------------------------------------------------------------ on any device, in tensors


def _encode(
    residual: Tensor, first: Tensor, state: State, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    parts = zip(residual.split(_CHUNK), first.split(_CHUNK), strict=True)
    found = [_encode_chunk(*part, state, bits) for part in parts]
    scales, turns, codes = (torch.cat(each) for each in zip(*found, strict=True))
    return scales, turns, codes


def _encode_chunk(
    residual: Tensor, first: Tensor, state: State, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    turns, x = first, rotation.rotate(residual, state, first)
    for number in range(1, TRIES):
        others = (first + _STEP * number) & _TURNS
        turned = rotation.rotate(residual, state, others)
        better = turned.abs().amax(1) < x.abs().amax(1)
        turns, x = torch.where(better, others, turns), torch.where(better[:, None], turned, x)
    rms = x.double().square().mean(1, keepdim=True).sqrt()
    x = torch.where(rms > 0, x.double() / rms, 0).float()
    path = _nearest(x, state["table"]) if bits == 8 else _viterbi(x, state["table"], bits)
    value, found = x.double(), state["table"][path].double()
    own, common = value.square().sum(1), (value * found).sum(1)
    rms = rms[:, 0] / rotation.gain(x.shape[1])
    scales = torch.where(common > 0, rms * own / common, 0).float()
    fresh = torch.where(scales[:, None] == 0, 0, path & ((1 << bits) - 1))
    return scales, turns, _pack(fresh, bits)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def _viterbi(x: Tensor, table: Tensor, bits: int) -> Tensor:
    """Search for the states (N, D) whose numbers are nearest to x (N, D), all in all."""
    groups = _STATES >> bits
    cost = x.new_full((len(x), _STATES), torch.inf)
    cost[:, 0] = 0
    come = torch.empty(x.shape[1], len(x), groups, dtype=torch.uint8, device=x.device)
    for t in range(x.shape[1]):
        # states that differ in the bits which are lost next lead to the same ones
        best, at = cost.reshape(len(x), -1, groups).min(1)
        come[t] = at
        distance = (x[:, t, None] - table).square()
        cost = (best[:, :, None] + distance.reshape(len(x), groups, -1)).reshape(len(x), -1)
    state, path = cost.argmin(1), torch.empty(x.shape, dtype=torch.long, device=x.device)
    for t in range(x.shape[1] - 1, -1, -1):
        path[:, t] = state
        group = (state >> bits)[:, None]
        state = (come[t].gather(1, group).long() * groups + group)[:, 0]
    return path


def _pack(fresh: Tensor, bits: int) -> Tensor:
    """Write the new bits of values (N, D) as streams (N, B)."""
    shifts = torch.arange(bits - 1, -1, -1, device=fresh.device)
    stream = (fresh[..., None] >> shifts & 1).reshape(len(fresh), -1, 8)
    weights = 1 << torch.arange(7, -1, -1, device=fresh.device)
    return (stream * weights).sum(2).to(torch.uint8)


def _windows(codes: Tensor, bits: int) -> Tensor:
    """Return the last 8 bits (N, D) of streams (N, B) at each value."""
    count = codes.shape[1] * 8 // bits
    end = bits * torch.arange(1, count + 1, device=codes.device) - 1
    before = codes.new_zeros(len(codes), 1)
    bytes_ = torch.cat((before, codes), 1).int()
    word = bytes_[:, end // 8] << 8 | bytes_[:, end // 8 + 1]
    return (word >> (7 - end % 8)) & 255
