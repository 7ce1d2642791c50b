"""Pictures are decoded and rendered to views in threads, in order; unusable ones are put aside.

V views a picture, S pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UserError
from featcache.extraction.plan import Plan
from featcache.pictures.file_digest import file_digest
from featcache.pictures.source import PictureError
from featcache.views import pixel_path
from featcache.views import render as view_render
from featcache.views.draw import DrawnViews, draw_views
from featcache.views.fingerprint import pixel_hash, thumbnail

Kind = tuple[int, str]  # pixels of an edge, filter


@dataclass(frozen=True)
class Rendered:
    """Hold one picture's views, ready for the teacher."""

    key: str
    source_size: tuple[int, int]
    drawn: DrawnViews
    # (V, S, S, 3) of each size and filter that a teacher sees
    pixels: dict[Kind, npt.NDArray[np.uint8]]
    proofs: npt.NDArray[np.uint8] | None  # (V, S, S, 3) at the policy's size, where they are stored
    hashes: npt.NDArray[np.uint64]  # (V,)
    thumbnails: npt.NDArray[np.uint8]  # (V, 14, 14, 3)
    file_digest: npt.NDArray[np.uint8]  # (16,) of the file's bytes
    ignores_exif: bool = False  # its EXIF orientation is not applied


def prefetch(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int], window: int
) -> Iterator[tuple[int, Future[Any]]]:
    """Yield futures in order, at most `window` of them under way."""
    waiting: deque[tuple[int, Future[Any]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


def usable_pictures(
    plan: Plan,
    futures: Iterable[tuple[int, Future[Any]]],
    strict: bool,
    quarantined: list[dict[str, str]],
) -> Iterator[Rendered]:
    """Yield the pictures that can be used; the others are added to `quarantined`, or stop the work
    with `strict`."""
    for index, future in futures:
        try:
            yield future.result()
        except OSError as error:  # the disk, not the picture: what is read again may well be good
            raise UserError(
                f"picture {plan.source.keys[index]!r} cannot be read: {error}; fix this and run "
                "again"
            ) from error
        except PictureError as error:
            key = plan.source.keys[index]
            if strict:
                raise UserError(
                    f"picture {key!r} cannot be used: {error}; fix or remove it, or quarantine it "
                    "(no --strict)"
                ) from error
            quarantined.append({"key": key, "reason": str(error)})


def render_views(plans: Sequence[Plan], index: int) -> Rendered:
    """Decode one picture in full and replay its V views as each plan's teacher sees them; hash and
    thumbnail are of the policy's size and filter. The plans share pictures, policy and view
    numbers."""
    plan = plans[0]
    key = plan.source.keys[index]
    picture, data = pixel_path.read_picture(plan.source, index)
    size = (picture.height, picture.width)
    drawn = draw_views(plan.policy, rng.key_digests([key]), np.array([size]), plan.view_numbers)
    proof, seen = (
        (plan.policy.size, plan.policy.filter),
        {(each.input_px, each.filter) for each in plans},
    )
    made = {
        kind: np.stack([_replay(picture, drawn, view, kind) for view in range(plan.views)])
        for kind in {proof, *seen}
    }
    return Rendered(
        key,
        size,
        drawn,
        {kind: made[kind] for kind in seen},
        made[proof] if any(each.pixels for each in plans) else None,
        np.array([pixel_hash(each) for each in made[proof]], np.uint64),
        np.stack([thumbnail(each) for each in made[proof]]),
        np.frombuffer(file_digest(data), np.uint8),
        pixel_path.ignores_orientation(plan.source, picture),
    )


def _replay(picture: Any, drawn: DrawnViews, view: int, kind: Kind) -> npt.NDArray[np.uint8]:
    """Render one drawn view of row 0 at a size, by a filter."""
    return view_render.render(
        picture, drawn.crop[0, view], drawn.flip[0, view], drawn.jitter[0, view], *kind
    )


def view_batches(
    rendered: Iterable[Rendered], views: int, batch_size: int
) -> Iterator[list[tuple[Rendered, int]]]:
    """Yield (picture, view) pairs in row-major order, `batch_size` at a time, the last batch
    shorter."""
    batch: list[tuple[Rendered, int]] = []
    for picture in rendered:
        for view in range(views):
            batch.append((picture, view))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch
