"""A sample of rows is replayed, run through the teacher, and compared with what is stored.

Pixels come first: a row whose picture is missing, unreadable or another one says nothing about the
cache, and is told apart from one whose features differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import IdentityError
from featcache.pictures.source import PictureError, Source
from featcache.reading.cache import Cache
from featcache.reading.pixel_check import pixel_problem
from featcache.views import pixel_path
from featcache.views.policy import policy_from_dict
from featcache.views.render import render

# from this share of rows with other pixels on, the pictures are taken for others than those
OTHER_PICTURES = 0.9


class RecomputedRow(NamedTuple):
    """Hold what one row showed; without `errors` it was not compared, because its pixels are not
    those of the extraction."""

    problem: str | None = None
    # of features, of attention: 0 where the teacher gives none
    errors: tuple[float, float] | None = None


def recompute(
    cache: Cache,
    source: Source,
    weights: str | None,
    count: int,
    seed: int,
    device: str,
    named: Sequence[str] = (),
) -> dict[str, Any]:
    """Replay `count` random rows (one view each), compare their pixels, run the teacher on those
    that are the same, and compare features and attention.

    `named`: the teacher, where the user names it (`teachers.recorded_spec`).
    Returns the problems and, for a clean sample, the share of bad rows that 95 % of such samples
    would have shown. `other_pictures`: so many of the rows have other pixels that the pictures, not
    the cache, must be wrong.
    """
    pixel_path.check_pixel_path(source, cache.identity["pixel_path"], f"cache {str(cache.path)!r}")
    teacher = _same_teacher(cache, weights, device, named)
    at = {key: i for i, key in enumerate(source.keys)}
    pairs = _sample(cache, count, seed)
    found = [_recompute_row(cache, source, at, teacher, row, view) for row, view in pairs]
    n = len(found)
    problems = [row.problem for row in found if row.problem]
    errors = [row.errors for row in found if row.errors is not None]
    return {
        "rows": n,
        "of_rows": len(cache),
        "views": cache.views,
        "compared": len(errors),
        "teacher": cache.teachers[0],
        "other_teachers": cache.teachers[1:],  # whose rows are not looked at
        "problems": problems,
        "other_pictures": n > 0 and n - len(errors) >= OTHER_PICTURES * n,
        "feature_error": max((features for features, _ in errors), default=None),
        "attention_error": max((attention for _, attention in errors), default=None),
        "bad_rows_below": 1 - 0.05 ** (1 / n) if n and not problems else None,
    }


def _sample(cache: Cache, count: int, seed: int) -> list[tuple[int, int]]:
    """Draw `count` rows, ascending, each with one of its views; all rows where there are fewer."""
    n = min(count, len(cache))
    raw = rng.words(rng.key_digests([f"verify:{n}"]), rng.stream("verify", seed), 2 * len(cache))[0]
    rows = np.sort(np.argsort(raw[: len(cache)], kind="stable")[:n])
    views = rng.below(raw[len(cache) : len(cache) + n], cache.views)
    return list(zip(rows.tolist(), views.tolist(), strict=True))


def _same_teacher(cache: Cache, weights: str | None, device: str, named: Sequence[str] = ()) -> Any:
    from featcache import teachers
    from featcache.models import precision
    from featcache.models.weights import weight_hash

    given = weights or cache.manifest["provenance"]["weights"]
    where = f"cache {str(cache.path)!r}"
    spec = teachers.recorded_spec(cache.identity["teacher"]["name"], named, where, "--teacher")
    teacher = precision.configure_like(teachers.load(spec, given, device), cache.identity)
    here, there = weight_hash(teacher), cache.identity["teacher"].get("weight_hash", "")
    if here != there:
        raise IdentityError(
            f"weights {given!r} have hash {here}, the cache was made with {there}; give those with "
            "--weights"
        )
    return teacher


def _recompute_row(
    cache: Cache, source: Source, at: dict[str, int], teacher: Any, row: int, view: int
) -> RecomputedRow:
    from featcache.models import precision

    key = cache.keys[row]
    if key not in at:
        return RecomputedRow(f"picture {key!r} is not in {source.spec!r}")
    try:
        picture = pixel_path.decode_picture(source, at[key])
    except (PictureError, OSError) as reason:
        return RecomputedRow(f"picture {key!r} can no longer be used: {reason}")
    policy = policy_from_dict(cache.identity["policy"])
    drawn = cache.read([row], view, ("crop", "flip", "jitter"))
    proof, pixels = (
        render(picture, drawn["crop"][0], drawn["flip"][0], drawn["jitter"][0], size, policy.filter)
        for size in (policy.size, teacher.input_px)
    )
    if problem := pixel_problem(cache, row, view, proof):
        return RecomputedRow(problem)
    bound, attention_bound = precision.BOUNDS[precision.execution_config(teacher).precision]
    error, allowed, attention_error = _errors(cache, teacher, row, view, pixels, bound)
    if error <= allowed and attention_error <= attention_bound:
        return RecomputedRow(None, (error, attention_error))
    return RecomputedRow(
        f"picture {key!r}, view {view}: features differ by {error:.1e} (allowed {allowed:.0e}), "
        f"attention by {attention_error:.1e} (allowed {attention_bound:.0e})",
        (error, attention_error),
    )


def _errors(
    cache: Cache, teacher: Any, row: int, view: int, pixels: npt.NDArray[np.uint8], bound: float
) -> tuple[float, float, float]:
    """Measure how far stored features and attention are from the teacher's on these pixels (S, S,
    3) of its input size: of the worst token the relative error and what is allowed, which is
    `bound` and what the codec loses, and the error of attention."""
    import torch

    from featcache.extraction.forward import compute_targets, rank_tokens
    from featcache.reading.feature_reader import FeatureReader
    from featcache.targets.codecs import LOSSLESS

    reader = FeatureReader(cache)
    weighed = ["attention"] if "attention" in cache.fields else []
    stored = cache.read([row], view, (*reader.fields, *weighed, "mask_order"))
    device = next(iter(teacher.state_dict().values())).device
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
    coded, _, attention, _ = compute_targets(teacher, batch, cache.levels, LOSSLESS, 1, {})
    new = coded["features"].float().cpu().numpy()
    old = reader.decode({name: torch.from_numpy(stored[name]) for name in reader.fields}).numpy()
    # by the stored order: a tie may fall otherwise when computed again
    if cache.identity["tokens"] == "ranked":
        new = rank_tokens(new, stored["mask_order"], old.shape[2])
    norm, residual = (np.linalg.norm(each, axis=-1) for each in (new, reader.residual(new)))
    error = np.linalg.norm(new - old, axis=-1) / np.maximum(norm, 1e-12)
    allowed = bound + reader.codec.tolerance * residual / np.maximum(norm, 1e-12)
    worst = (error / allowed).argmax()
    found = float(error.flat[worst]), float(allowed.flat[worst])
    if not weighed:
        return *found, 0.0
    a = attention[0].cpu().numpy()
    return *found, float(np.abs(a - stored["attention"][0]).max() / a.max())
