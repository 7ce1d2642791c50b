"""Masks choose the patches that the student sees.

A mask is a function that orders the patches of each picture; the first `n_visible` of the order are
seen. A function takes what its parameters name - `raw` (the picture's own random words of this
epoch, one a patch), `exponentials` (draws of Exp(1) from such words), `draws` (as many rounds of
words as it wants), `n_visible`, `attention` (the teacher's CLS attention) or `mask_order` (the
order stored with the cache) - so that a new mask is one function and one line in `MASKS`.
Everything is a pure function of (seed, epoch, key): worker, batch and world size never enter.

With the teacher in the loop `attention` and `mask_order` are tensors on its device. So a mask that
takes one of them draws `exponentials` at most, which are made on the host, and computes by what is
exact on every device and what arrays and tensors share.

Shapes: n pictures, P patches, V = n_visible.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UsageError, UserError, counted, near

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
BOOL = npt.NDArray[np.bool_]

# of 196 patches or more: what a block of `blockwise` covers at least, while so many are left to
# hide
MIN_BLOCK = 16
ASPECT = 0.3  # its smallest height over width; the largest is 1 / 0.3
ROUNDS = 1000  # of P words, four a try: 49,000 tries on 196 patches, where 30 are the rule


COUNTS = ("visible", "hidden")


def kept_count(n_patches: int, mask_ratio: float, counted: str = "visible") -> int:
    """Return how many patches stay visible: truncated, as the released code does. Or what is left
    where the `hidden` ones are truncated, as CAE's and CAE v2's random masks do
    (Atten4Vis/CAE furnace/masking_generator.py at 1016f85).

    >>> kept_count(196, 0.7), kept_count(196, 0.75)
    (58, 49)
    >>> kept_count(196, 0.7, "hidden"), kept_count(196, 0.75, "hidden")
    (59, 49)
    """
    if counted == "hidden":
        return n_patches - int(mask_ratio * n_patches)
    return int(n_patches * (1 - mask_ratio))


def uniform(raw: U64) -> I64:
    """Order the patches so that every subset is equally likely: raw (n, P) -> order (n, P)."""
    return np.argsort(raw, axis=1, kind="stable")


def attentive(exponentials: Any, attention: Any) -> Any:
    """Order the patches so that what the teacher attends to is likely visible (MaskAlign and
    MILAN): exponentials, attention (n, P) -> order (n, P).

    Patch j finishes at e_j / p_j with e_j ~ Exp(1); the order of finishing is a draw without
    replacement in proportion to the attention, which need not sum to one. A weight of zero is legal
    and comes last.
    """
    return rng.finish_order(exponentials, attention)


def topk(attention: Any) -> Any:
    """Order the patches by falling attention, equals in raster order: attention (n, P) -> order (n,
    P).

    Nothing is drawn, so that a view shows the same in each epoch (MR-MAE's focused mimicking, as
    its text reads).
    """
    return (-attention).argsort(stable=True)


def unfit(attention: Any) -> Any:
    """Return (n,) whether each row of attention (n, P), an array or a tensor, cannot be sampled
    from: it is not finite, has a negative weight, or nothing but zeros."""
    allowed = (attention >= 0) & (attention < math.inf)
    return ~allowed.all(1) | ~(attention > 0).any(1)


def check_attention(weight: npt.NDArray[np.floating]) -> None:
    """Refuse rows that cannot be sampled from."""
    wrong = unfit(weight)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"cannot take a mask from it: attention of row {row} runs from "
            f"{weight[row].min()} to "
            f"{weight[row].max()} ({int(wrong.sum())} such rows of {len(weight)}); allowed: finite "
            "weights >= 0, not all zero; run featcache verify on the cache, or train with "
            "mask=uniform"
        )


def stored(mask_order: Any) -> Any:
    """Return the order that was drawn when the view was extracted: the same mask in every epoch
    that shows this view."""
    return mask_order


def blockwise(draws: Callable[[int], U64], n_visible: int) -> I64:
    """Hide rectangles one by one until exactly P - n_visible patches are hidden (BEiT's blocks, as
    CAE makes them).

    draws(k) gives (n, P) words. A try is refused when its rectangle spans the grid's height or
    width, hides nothing new or more than is left to hide. (The released generator looks at what is
    left after every ten tries; a refused try changes nothing, so tries in a row are the same law.
    Atten4Vis/CAE furnace/masking_generator.py; METHODS 0.4. Ours: grids of fewer than 196 patches
    have smaller blocks in proportion; of 4 x 4 patches no 16 could ever be hidden.)
    """
    n, n_patches = draws(0).shape
    side, wanted = math.isqrt(n_patches), n_patches - n_visible
    if side**2 != n_patches:
        raise UserError(
            f"cannot draw mask 'blockwise' on {counted(n_patches, 'patch', 'patches')}: "
            "a square grid is needed; "
            "mask=uniform"
        )
    hidden = np.zeros((n, side, side), bool)
    for k in range(ROUNDS):
        words = draws(k)
        for t in range(0, n_patches - 3, 4):
            rows = np.flatnonzero(hidden.sum((1, 2)) < wanted)
            if not rows.size:
                return np.argsort(hidden.reshape(n, -1), axis=1, kind="stable")
            hidden[rows] |= _block(rng.uniform(words[rows, t : t + 4]), hidden[rows], wanted)
    raise UserError(
        f"cannot hide {wanted} of {side} x {counted(side, 'patch', 'patches')} in "
        f"blocks: {ROUNDS * (n_patches // 4)} "
        "tries were refused; blocks need a larger grid; give another mask_ratio, or mask=uniform"
    )


def _block(u: npt.NDArray[np.float64], hidden: BOOL, wanted: int) -> BOOL:
    """Return the patches that one try of each row adds, none where it is refused, for u (m, 4) in
    [0, 1) and hidden (m, G, G)."""
    side = hidden.shape[-1]
    left, least = wanted - hidden.sum((1, 2)), min(MIN_BLOCK, math.ceil(MIN_BLOCK * side**2 / 196))
    area = least + (left - least) * u[:, 0]  # between the two, whichever is larger
    aspect = np.exp(math.log(ASPECT) * (1 - 2 * u[:, 1]))
    # height, width
    size = np.rint(np.sqrt(area[:, None] * np.stack([aspect, 1 / aspect], 1))).astype(np.int64)
    first = np.floor(u[:, 2:] * (side - size + 1))  # row, column
    at = np.arange(side)
    inside = (at >= first[..., None]) & (at < (first + size)[..., None])  # (m, 2, G)
    new = inside[:, 0, :, None] & inside[:, 1, None, :] & ~hidden
    count = new.sum((1, 2))
    good = (size < side).all(1) & (count > 0) & (count <= left)
    return new & good[:, None, None]


MASKS: dict[str, Callable[..., I64]] = {
    "attentive": attentive,
    "topk": topk,
    "uniform": uniform,
    "stored": stored,
    "blockwise": blockwise,
}
# parameters of a mask that are no arrays of a cache
DRAWN = ("raw", "exponentials", "draws", "n_visible")


def fields(name: str) -> tuple[str, ...]:
    """Return the cache arrays that a mask reads.

    >>> fields("attentive"), fields("uniform"), fields("stored")
    (('attention',), (), ('mask_order',))
    """
    return tuple(p for p in inspect.signature(known(name)).parameters if p not in DRAWN)


def known(name: str) -> Callable[..., I64]:
    """Return the mask of this name, or raise an error that lists the names."""
    if name not in MASKS:
        raise UsageError(f"unknown mask {name!r}: {near(name, MASKS)}; choose one with mask=NAME")
    return MASKS[name]


def draw(
    name: str,
    *,
    digests: U64,
    seed: int,
    epoch: int | I64,
    n_visible: int,
    n_patches: int,
    attention: npt.NDArray[np.floating] | None = None,
    mask_order: npt.NDArray[np.integer] | None = None,
) -> tuple[I64, I64]:
    """Draw ids_keep (n, V) and ids_masked (n, P-V), each ascending, for digests (n, 2) and `epoch`,
    one or one per picture.

    `attention` and `mask_order` are (n, P) and are looked at only by the masks that name them.
    """
    own = drawn(
        name, digests=digests, seed=seed, epoch=epoch, n_visible=n_visible, n_patches=n_patches
    )
    rows = {"attention": attention, "mask_order": mask_order}
    given = _given(name, rows, (len(digests), n_patches))
    if "attention" in given:
        check_attention(given["attention"])
    return split(np.asarray(MASKS[name](**own, **given)).astype(np.int64), n_visible)


def order_on_device(
    name: str, own: Mapping[str, Any], rows: Mapping[str, Any], shape: tuple[int, int]
) -> Any:
    """Order the patches (n, P) = `shape` by what was `drawn` and the `rows` that the mask takes, by
    name, all of them tensors: the order that `draw` would take. Attention is not checked, since
    that would wait for it."""
    own = {key: value for key, value in own.items() if key in DRAWN}
    return MASKS[name](**own, **_given(name, rows, shape))


def drawn(
    name: str, *, digests: U64, seed: int, epoch: int | I64, n_visible: int, n_patches: int
) -> dict[str, Any]:
    """Return what a mask takes beside arrays of a cache, by the names of its parameters."""

    def words(purpose: str) -> U64:
        return rng.words(digests, rng.stream(purpose, seed), n_patches, epoch=epoch)

    makers: dict[str, Callable[[], Any]] = {
        "raw": lambda: words(f"mask:{name}"),
        "exponentials": lambda: rng.exponentials(words(f"mask:{name}")),
        "draws": lambda: lambda k: words(f"mask:{name}:{k}"),
        "n_visible": lambda: n_visible,
    }
    asked = inspect.signature(known(name)).parameters
    return {parameter: make() for parameter, make in makers.items() if parameter in asked}


def _given(name: str, rows: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """Return the arrays that a mask takes, each (n, P) = `shape`, or raise a UserError."""
    given = {field: rows.get(field) for field in fields(name)}
    for field, array in given.items():
        if array is None or tuple(array.shape) != shape:
            got = "nothing" if array is None else f"shape {tuple(array.shape)}"
            raise UserError(
                f"cannot draw mask {name!r}: its {field} is {got}, needed: one row of {shape[1]} "
                f"patches for each of {counted(shape[0], 'picture')}; use a cache that "
                f"holds {field} on this "
                "patch grid, or train with mask=uniform"
            )
    return given


def split(order: I64, n_visible: int) -> tuple[I64, I64]:
    """Split order (n, P) into its first n_visible and the others, each ascending."""
    n, n_patches = order.shape
    visible = np.zeros(order.shape, bool)
    if order.size and (order.min() < 0 or order.max() >= n_patches):
        raise UserError(
            f"cannot cut a mask: its order names patches {order.min()} to {order.max()}, allowed: "
            f"0 to {n_patches - 1}; run featcache verify on the cache"
        )
    np.put_along_axis(visible, order[:, :n_visible], True, axis=1)
    short = np.flatnonzero(visible.sum(axis=1) != n_visible)
    if short.size:
        raise UserError(
            f"cannot cut a mask: the order of row {short[0]} holds {int(visible[short[0]].sum())} "
            f"different patches among its first {n_visible}, needed: {n_visible}; run featcache "
            "verify on the cache"
        )
    ids_keep = np.nonzero(visible)[1].reshape(n, n_visible)
    return ids_keep, np.nonzero(~visible)[1].reshape(n, n_patches - n_visible)
