"""Is a cache what its manifest says? Every byte against its checksum, and a sample against the teacher itself.

Nothing here repairs: it names what is wrong, file by file or row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featcache import images, manifest, publish, rng, views
from featcache.errors import IdentityError, UserError
from featcache.part import Keys, added, record_problem
from featcache.reader import Cache
from featcache.store import QUARANTINE, SHARDS, record_path, store

FEATURE_BOUND = 1e-3  # per-token relative L2 between stored and recomputed features
ATTENTION_BOUND = 1e-4  # largest difference over the largest weight


class Problem(NamedTuple):
    """What is wrong with one file; `shard` where a shard must be extracted again to mend it."""

    path: Path
    text: str
    shard: str | None = None

    def __str__(self) -> str:
        return self.text


def files(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[list[str], int]:
    """(problems, shards checked) of a cache and what was added to it: every byte of every file against its checksum."""
    found: list[str] = []
    shards = 0
    for part in (path, *added(path)):
        about = manifest.read(part)
        found += [str(problem) for problem in problems(part, about, progress)]
        shards += len(about["shards"])
    return found or together(path), shards


def together(path: Path) -> list[str]:
    """Why parts that are sound, each by itself, are not one cache."""
    try:
        Cache(path).close()
    except UserError as error:
        return [str(error)]
    return []


def problems(
    part: Path, about: dict[str, Any], progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Problem]:
    """Everything that is wrong with one part, file by file."""
    backend = about["identity"]["store"]
    for text in manifest.check_files(part, about):
        yield Problem(Path(text.rpartition(": ")[0]), text)
    for path in (part / SHARDS / manifest.COPY, part / QUARANTINE):
        wanted = path.name == manifest.COPY or path.is_file() or _lacks_quarantine(part, about)
        if wanted and (damage := json_problem(path)):
            yield Problem(path, damage)
        elif path.name == manifest.COPY and manifest.read_json(path) != about:
            yield Problem(path, f"{path}: differs from {manifest.NAME}")
        elif path.name == QUARANTINE and path.is_file() and not _is_of_records(path, part, about):
            yield Problem(path, f"{path}: does not list the pictures that the records of shards name")
    for done, shard in enumerate(about["shards"], 1):
        record = record_path(part, shard["name"])
        if damage := json_problem(record):
            missing = f"{record}: missing; this shard is not extracted yet, or its record is lost"
            yield Problem(record, damage if record.is_file() else missing, shard["name"])
        else:
            read = manifest.read_json(record)
            if why := record_problem(about, shard, read):
                yield Problem(record, f"{record}: {why}", shard["name"])
            else:
                yield from _of_files(part, shard["name"], backend, read)
        progress(done, len(about["shards"]))


def _of_files(part: Path, shard: str, backend: str, record: dict[str, Any]) -> Iterator[Problem]:
    found = publish.check(part, shard, backend, record, deep=True)
    yield from (Problem(Path(text.rpartition(": ")[0]), text, shard) for text in found)
    if not found:
        keys = Keys(*store(backend).keys(part, shard, record))
        if len(keys) != record["rows"] or manifest.keys_digest(keys) != record["keys_digest"]:
            path = record_path(part, shard)
            yield Problem(path, f"{path}: its keys are not those of the shard's files", shard)


def _lacks_quarantine(part: Path, about: dict[str, Any]) -> bool:
    """Whether quarantine.json is missing although every record is there and one of them has something for it."""
    return bool(_quarantined(part, about))


def _is_of_records(path: Path, part: Path, about: dict[str, Any]) -> bool:
    rows = _quarantined(part, about)
    return rows is None or (manifest.read_json(path) == {"pictures": rows} and bool(rows))


def _quarantined(part: Path, about: dict[str, Any]) -> list[Any] | None:
    """What the records say, in order; None where one of them is missing or damaged."""
    paths = [record_path(part, shard["name"]) for shard in about["shards"]]
    if any(json_problem(path) for path in paths):
        return None
    return [row for path in paths for row in manifest.read_json(path).get("quarantined", [])]


def json_problem(path: Path) -> str | None:
    """What is wrong with a JSON of ours."""
    try:
        manifest.read_json(path)
    except UserError as error:
        return str(error)
    return None


def recompute(
    cache: Cache, source: images.Source, weights: str | None, count: int, seed: int, device: str
) -> dict[str, Any]:
    """Replay `count` random rows (one view each), run the teacher on them, compare pixels, features and attention.

    Returns the problems and, for a clean sample, the share of bad rows that 95 % of such samples would have shown.
    """
    teacher = _same_teacher(cache, weights, device)
    n = min(count, len(cache))
    raw = rng.words(rng.key_digests([f"verify:{n}"]), rng.stream("verify", seed), 2 * len(cache))[0]
    rows = np.sort(np.argsort(raw[: len(cache)], kind="stable")[:n])
    chosen = rng.below(raw[len(cache) : len(cache) + n], cache.views)
    at = {key: i for i, key in enumerate(source.keys)}
    problems, worst, worst_attention = [], 0.0, 0.0
    for row, view in zip(rows.tolist(), chosen.tolist(), strict=True):
        found, error, attention_error = _recompute_row(cache, source, at, teacher, row, view)
        problems += found
        worst, worst_attention = max(worst, error), max(worst_attention, attention_error)
    return {
        "rows": n,
        "problems": problems,
        "feature_error": worst,
        "attention_error": worst_attention,
        "bad_rows_below": 1 - 0.05 ** (1 / n) if n and not problems else None,
    }


def _same_teacher(cache: Cache, weights: str | None, device: str) -> Any:
    from featcache import teachers

    given = weights or cache.manifest["provenance"]["weights"]
    teacher = teachers.load(cache.identity["teacher"]["name"], given, device)
    here, there = teachers.weight_hash(teacher), cache.identity["teacher"]["weight_hash"]
    if here != there:
        raise IdentityError(
            f"weights {given!r} have hash {here}, the cache was made with {there}; give those with --weights"
        )
    return teacher


def pixel_problem(cache: Cache, row: int, view: int, pixels: Any) -> str | None:
    """What differs between a view rendered at the policy's size and the extracted one; None when nothing does."""
    stored = cache.read([row], view, ("pixel_hash", "thumbnail"))
    if views.pixel_hash(pixels) == int(stored["pixel_hash"][0]):
        return None
    difference = np.abs(views.thumbnail(pixels).astype(int) - stored["thumbnail"][0].astype(int))
    cause = "another picture under this key" if difference.mean() > 8 else "another decoder, library version or file"
    return (
        f"picture {cache.keys[row]!r}, view {view}: its pixels are not those the teacher saw (block means differ by "
        f"{difference.mean():.1f} levels of 255, at most {difference.max()}); likely {cause}"
    )


def _recompute_row(
    cache: Cache, source: images.Source, at: dict[str, int], teacher: Any, row: int, view: int
) -> tuple[list[str], float, float]:
    import torch

    from featcache import codecs, extract

    key = cache.keys[row]
    if key not in at:
        return [f"picture {key!r} is not in {source.spec!r}"], 0.0, 0.0
    try:
        picture = images.decode(source.read(at[key]))
    except (images.PictureError, OSError) as reason:
        return [f"picture {key!r} can no longer be used: {reason}"], 0.0, 0.0
    policy = views.from_dict(cache.identity["policy"])
    codec = codecs.CODECS[cache.identity["codec"]]
    stored = cache.read(
        [row], view, (*codec.arrays(teacher.width), "attention", "mask_order", "crop", "flip", "jitter")
    )
    replayed = [
        views.render(picture, stored["crop"][0], stored["flip"][0], stored["jitter"][0], size, policy.filter)
        for size in (policy.size, teacher.input_px)
    ]
    device = next(iter(teacher.state_dict().values())).device
    pixels = torch.from_numpy(replayed[1].copy()).permute(2, 0, 1)[None].to(device)
    coded, _, attention, _ = extract.compute(teacher, pixels, cache.levels, cache.identity["codec"], 1)
    host = {name: values.cpu().numpy() for name, values in coded.items()}
    if cache.identity["tokens"] == "ranked":  # by the stored order: a tie may fall otherwise when computed again
        host = {
            name: extract.ranked(values, stored["mask_order"], stored[name].shape[2]) for name, values in host.items()
        }
    new = codec.decode({name: torch.from_numpy(values) for name, values in host.items()})
    old = codec.decode({name: torch.from_numpy(stored[name]) for name in host})
    error = float(((new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)).max())
    a = attention[0].cpu().numpy()
    attention_error = float(np.abs(a - stored["attention"][0]).max() / a.max())
    problems = list(filter(None, [pixel_problem(cache, row, view, replayed[0])]))
    if error > FEATURE_BOUND or attention_error > ATTENTION_BOUND:
        problems.append(
            f"picture {key!r}, view {view}: features differ by {error:.1e} (allowed {FEATURE_BOUND:.0e}), attention by "
            f"{attention_error:.1e} (allowed {ATTENTION_BOUND:.0e})"
        )
    return problems, error, attention_error
