"""What is stored of views is checked as it is read: a checksum tells that bytes are those that were
written, not that an extraction wrote them.

These numbers become boxes of pictures and indices of patches; one out of range would end a process,
or train on other patches. Features are not among them: what is not finite there is told by the
loss. Token ids are compared with the vocabulary of who reads them. Some 10 us for a thousand rows.

n rows, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError

Values = npt.NDArray[Any]
_PIXELS = 1 << 20  # a side of a picture
_JITTER_ORDERS = 6
_JITTER_LARGEST = 2.0


def value_problem(name: str, values: Values, identity: Mapping[str, Any]) -> str:
    """Say what is out of range in the values (n, ...) of one array; empty where nothing is, or the
    array is not looked at."""
    check = _CHECKS.get(name)
    return check(values, identity["teacher"]) if check and values.size else ""


def check_values(where: str, name: str, values: Values, identity: Mapping[str, Any]) -> None:
    """Raise UserError where `value_problem` finds one; `where` names the cache and the field."""
    if why := value_problem(name, values, identity):
        raise UserError(f"{where} holds {why}, which no extraction writes; extract it again")


def _crop(values: Values, teacher: Mapping[str, Any]) -> str:
    corner, sides = values[..., :2], values[..., 2:]
    inside = corner.min() >= 0 and sides.min() >= 1 and values.max() <= _PIXELS
    return "" if inside else "a box has no area or lies outside of any picture"


def _jitter(values: Values, teacher: Mapping[str, Any]) -> str:
    factors, order = values[..., :3], values[..., 3]
    fine = (
        factors.min() >= 0
        and factors.max() <= _JITTER_LARGEST
        and order.min() >= 0
        and order.max() < _JITTER_ORDERS
    )  # not a number is none of these
    return "" if fine else "a factor or an order of colours that no policy draws"


def _mask_order(values: Values, teacher: Mapping[str, Any]) -> str:
    patches = teacher["patches"]
    rows = values.reshape(-1, patches)
    if rows.max() >= patches:
        return f"a patch {rows.max()} of {patches}"
    seen = np.zeros(rows.shape, bool)
    np.put_along_axis(seen, rows.astype(np.intp), True, 1)
    return "" if seen.all() else "an order names a patch twice"


def _attention(values: Values, teacher: Mapping[str, Any]) -> str:
    return (
        "" if values.min() >= 0 and values.max() < np.inf else "a weight is negative or no number"
    )


def _source_size(values: Values, teacher: Mapping[str, Any]) -> str:
    return "" if values.min() >= 1 and values.max() <= _PIXELS else "a picture has no pixels"


_CHECKS: Mapping[str, Callable[[Values, Mapping[str, Any]], str]] = {
    "crop": _crop,
    "jitter": _jitter,
    "mask_order": _mask_order,
    "attention": _attention,
    "source_size": _source_size,
}
