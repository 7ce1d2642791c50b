"""Which patches the student sees.

A mask is a function that orders the patches of each picture; the first `n_visible` of the order are seen. A function
takes what its parameters name - `raw` (the picture's own random words of this epoch), `attention` (the teacher's CLS
attention) or `mask_order` (the order stored with the cache) - so that a new mask is one function and one line in
`MASKS`. Everything is a pure function of (seed, epoch, key): worker, batch and world size never enter.

Shapes: n pictures, P patches, V = n_visible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UsageError, UserError, near

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


def kept_count(n_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: truncated, as the released code does.

    >>> kept_count(196, 0.7), kept_count(196, 0.75)
    (58, 49)
    """
    return int(n_patches * (1 - mask_ratio))


def uniform(raw: U64) -> I64:
    """raw (n, P) -> order (n, P): every subset equally likely."""
    return np.argsort(raw, axis=1, kind="stable")


def attentive(raw: U64, attention: npt.NDArray[np.floating]) -> I64:
    """raw, attention (n, P) -> order (n, P): what the teacher attends to is likely visible (MaskAlign and MILAN).

    Patch j finishes at e_j / p_j with e_j ~ Exp(1); the order of finishing is a draw without replacement in proportion
    to the attention, which need not sum to one. A weight of zero is legal and comes last.
    """
    _check_attention(attention)
    return rng.race(attention, raw)


def _check_attention(weight: npt.NDArray[np.floating]) -> None:
    """A row that is not finite, has a negative weight, or nothing but zeros cannot be sampled from."""
    wrong = ~np.isfinite(weight).all(axis=1) | (weight < 0).any(axis=1) | ~(weight > 0).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"cannot draw an attentive mask: attention of row {row} runs from {weight[row].min()} to "
            f"{weight[row].max()} ({int(wrong.sum())} such rows of {len(weight)}); allowed: finite weights >= 0, not "
            "all zero; run featcache verify on the cache, or train with mask=uniform"
        )


def stored(mask_order: npt.NDArray[np.integer]) -> I64:
    """The order that was drawn when the view was extracted: the same mask in every epoch that shows this view."""
    return np.asarray(mask_order).astype(np.int64)


MASKS: dict[str, Callable[..., I64]] = {"attentive": attentive, "uniform": uniform, "stored": stored}


def fields(name: str) -> tuple[str, ...]:
    """The cache arrays a mask reads.

    >>> fields("attentive"), fields("uniform"), fields("stored")
    (('attention',), (), ('mask_order',))
    """
    return tuple(p for p in inspect.signature(known(name)).parameters if p != "raw")


def known(name: str) -> Callable[..., I64]:
    """The mask of this name, or an error that lists the names."""
    if name not in MASKS:
        raise UsageError(f"unknown mask {name!r}: {near(name, MASKS)}; choose one with mask=NAME")
    return MASKS[name]


def draw(
    name: str,
    *,
    digests: U64,
    seed: int,
    epoch: int,
    n_visible: int,
    n_patches: int,
    attention: npt.NDArray[np.floating] | None = None,
    mask_order: npt.NDArray[np.integer] | None = None,
) -> tuple[I64, I64]:
    """digests (n, 2) -> ids_keep (n, V) and ids_masked (n, P-V), each ascending.

    `attention` and `mask_order` are (n, P) and are looked at only by the masks that name them.
    """
    rows: dict[str, npt.NDArray | None] = {"attention": attention, "mask_order": mask_order}
    given = {field: _rows(name, field, rows[field], (len(digests), n_patches)) for field in fields(name)}
    if "raw" in inspect.signature(MASKS[name]).parameters:
        given["raw"] = rng.words(digests, rng.stream("mask:" + name, seed), n_patches, epoch=epoch)
    return split(MASKS[name](**given), n_visible)


def _rows(name: str, field: str, array: npt.NDArray | None, shape: tuple[int, int]) -> npt.NDArray:
    if array is None or array.shape != shape:
        got = "nothing" if array is None else f"shape {array.shape}"
        raise UserError(
            f"cannot draw mask {name!r}: its {field} is {got}, needed: one row of {shape[1]} patches for each of "
            f"{shape[0]} pictures; use a cache that holds {field} on this patch grid, or train with mask=uniform"
        )
    return array


def split(order: I64, n_visible: int) -> tuple[I64, I64]:
    """order (n, P) -> its first n_visible and the others, each ascending."""
    n, n_patches = order.shape
    visible = np.zeros(order.shape, bool)
    if order.size and (order.min() < 0 or order.max() >= n_patches):
        raise UserError(
            f"cannot cut a mask: its order names patches {order.min()} to {order.max()}, allowed: 0 to "
            f"{n_patches - 1}; run featcache verify on the cache"
        )
    np.put_along_axis(visible, order[:, :n_visible], True, axis=1)
    short = np.flatnonzero(visible.sum(axis=1) != n_visible)
    if short.size:
        raise UserError(
            f"cannot cut a mask: the order of row {short[0]} holds {int(visible[short[0]].sum())} different patches "
            f"among its first {n_visible}, needed: {n_visible}; run featcache verify on the cache"
        )
    ids_keep = np.nonzero(visible)[1].reshape(n, n_visible)
    return ids_keep, np.nonzero(~visible)[1].reshape(n, n_patches - n_visible)
