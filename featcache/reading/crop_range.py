"""One cache serves several crop ranges: of its views, those are used whose crop has an area in the
wanted range.

Each try of a crop draws its area uniformly and the first that fits the picture is taken, so views
drawn in (0.08, 1) of which those below 0.2 are rejected have the law of views drawn in (0.2, 1): a
cache of the widest range serves every recipe whose range lies within. A picture shows its accepted
views in turn; one that has none is left out. Of 375 x 500 pixels 82 % of the views are accepted at
0.2 and 53 % at 0.4, of squares 85 % and 60 %, of 2:1 only 72 % and 26 %.

The law is exact but for views whose ten tries all failed: they are the centre of their picture in
either range, so they are accepted whatever their area, but a wide range fails less often. (0.08, 1)
fails in 0.2 % of the views of a picture of 1:2 and in 4 % of one of 1:3, (0.2, 1) in 0.8 % and 15
%.

n pictures, V stored views.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.reading.cache import Cache
from featcache.views.draw import central_box, draw_views, stored_view
from featcache.views.policy import Policy, policy_from_dict

I64 = npt.NDArray[np.int64]
BOOL = npt.NDArray[np.bool_]
Scale = tuple[float, float]  # share of the picture's area, ends included
LEFT_OUT = 0.001  # share of the pictures that may have no view in the range
_ROWS = 1 << 16  # read at a time: some MB
_USUAL_SIZE = (375, 500)  # height and width of a picture of ImageNet, by its median
_DRAWN = 1 << 14  # views that a share is estimated from


def is_within(inner: Scale, outer: Scale) -> bool:
    """Return whether views of the outer range hold all of the inner one."""
    return outer[0] <= inner[0] <= inner[1] <= outer[1]


def in_range(areas: npt.NDArray[np.float32], scale: Scale) -> BOOL:
    """Return whether the sampled areas, as they are stored, lie in the range."""
    low, high = np.float32(scale[0]), np.float32(scale[1])
    return (areas >= low) & (areas <= high)


@functools.cache
def rejected_share(inner: Scale, outer: Scale) -> float:
    """Estimate the share of the views of the outer range that are rejected for the inner one, of
    pictures of 4:3: of v views, all are with this share to the power of v."""
    policy = Policy(scale=outer)
    sizes = np.full((_DRAWN, 2), _USUAL_SIZE)
    drawn = draw_views(policy, rng.key_digests(map(str, range(_DRAWN))), sizes)
    centre = (drawn.crop[:, 0] == central_box(policy, sizes)).all(1)
    return 1 - float((in_range(drawn.area[:, 0], inner) | centre).mean())


def accepted_views(cache: Cache, rows: I64, scale: Scale) -> BOOL:
    """Return (n, V) which stored views of the pictures `rows` (n,) a range of areas accepts."""
    policy = policy_from_dict(cache.identity["policy"])
    out = np.zeros((len(rows), cache.views), bool)
    for low in range(0, len(rows), _ROWS):
        part = rows[low : low + _ROWS]
        for view in range(cache.views):
            fits = in_range(cache.read(part, view, ("area",))["area"], scale)
            outside = np.flatnonzero(~fits)
            box = cache.read(part[outside], view, ("crop", "source_size"))
            centre = central_box(policy, box["source_size"].astype(np.int64))
            fits[outside] = (box["crop"] == centre).all(1)
            out[low : low + len(part), view] = fits
    return out


@dataclass(frozen=True)
class ViewSchedule:
    """Schedules which view each picture shows in an epoch, of those that were accepted: every one
    equally often.

    A pure function of (key, epoch): not of the batch, the process or the order of the pictures.
    """

    digests: rng.U64  # (n, 2), ascending
    order: npt.NDArray[np.unsignedinteger]  # (n, V): view numbers, the accepted ones first
    counts: I64  # (n,): how many were accepted, at least one

    @classmethod
    def of(cls, digests: rng.U64, accepted: BOOL) -> ViewSchedule:
        """Make a schedule from digests (n, 2) of the keys and accepted (n, V)."""
        ascending = np.lexsort((digests[:, 1], digests[:, 0]))
        order = np.argsort(~accepted, axis=1, kind="stable").astype(np.uint16)
        return cls(digests[ascending], order[ascending], accepted.sum(1)[ascending])

    def view(self, digests: rng.U64, epoch: int | I64) -> I64:
        """Return the view numbers (B,) of the pictures with digests (B, 2), which are among those
        of the schedule; one epoch, or one per picture."""
        at = np.searchsorted(self.digests[:, 0], digests[:, 0])
        # keys whose first words are equal lie together
        while (wrong := self.digests[at, 1] != digests[:, 1]).any():
            at = at + wrong
        return self.order[at, stored_view(digests, epoch, self.counts[at])].astype(np.int64)


def keys_without_view(accepted: BOOL, keys: Sequence[str], rows: I64) -> list[str]:
    """List the keys of the pictures of which no view was accepted: accepted (n, V) of rows (n,)."""
    return [keys[row] for row in rows[~accepted.any(1)].tolist()]
