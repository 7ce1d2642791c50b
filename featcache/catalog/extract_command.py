"""The `featcache extract` or `derive` command that a cache comes from is rebuilt from its manifest:
it finishes the cache, or adds to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from featcache.errors import UsageError, command_line, counted, short
from featcache.models.contract import REGISTERED
from featcache.objects.url import is_object_url
from featcache.objects.url import parse as parse_url
from featcache.pictures.spec import SEPARATOR
from featcache.storage import manifest, picture_lists
from featcache.storage.index import open_index
from featcache.storage.part import added_parts, describe_part
from featcache.storage.store import record_path
from featcache.views import pixel_path
from featcache.views.policy import Policy

BATCH_SIZE = 32  # of `featcache extract` where none is given
_LONGEST_PATH, _LONGEST_NAME = 4096, 256  # bytes, the end not included


def shell_line(words: Sequence[str]) -> str:
    """Return the line to be typed, quoted for a shell.

    >>> shell_line(["--teacher", "clip-b16", "--images", "my pictures"])
    "featcache extract --teacher clip-b16 --images 'my pictures'"
    """
    return command_line("featcache", "extract", *words)


def for_cache(manifest: Mapping[str, Any], out: Path) -> str:
    """Return the command that makes, or continues, the cache at `out`."""
    if is_derived(manifest):
        return _derive_line(manifest, out)
    return shell_line([*extract_options(manifest), "--out", str(out)])


def for_addition(manifest: Mapping[str, Any], cache: Path) -> str:
    """Return the command that makes, or continues, what was added to a cache."""
    if is_derived(manifest):
        return _derive_line(manifest, cache)
    return shell_line([*extract_options(manifest), "--add", "--out", str(cache)])


def is_derived(manifest: Mapping[str, Any]) -> bool:
    """Tell whether a cache was derived from another, and not extracted."""
    return "parent" in manifest["identity"]


def _derive_line(manifest: Mapping[str, Any], out: Path) -> str:
    identity, provenance = manifest["identity"], manifest["provenance"]
    merged = {
        "levels": ",".join(map(str, identity["levels"])),
        "views": identity["views"],
    }
    given = {
        **{key: identity[key] for key in ("codec", "tokens", "keep") if key in identity},
        **(merged if provenance.get("merged") else {}),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return command_line("featcache", "derive", parent_path(manifest) or "PARENT", out, *words)


def parent_path(manifest: Mapping[str, Any]) -> str:
    """Return where the cache was that this one was derived from; empty where what is recorded is no
    absolute path, nor a URL, as derivation writes it: another text may be an option, or lead to
    anywhere."""
    path = str(manifest["provenance"].get("derived_from", ""))
    if is_object_url(path):
        with contextlib.suppress(UsageError):
            return str(parse_url(path))
        return ""
    names = [os.fsencode(name) for name in path.split("/")]
    fine = path.startswith("/") and "\0" not in path and len(os.fsencode(path)) < _LONGEST_PATH
    return path if fine and max(map(len, names)) < _LONGEST_NAME else ""


def pictures_text(manifest: Mapping[str, Any], lists: int | None = None) -> str:
    """Return what a manifest says of where the pictures were, of its first lists or of all."""
    provenance = manifest["provenance"]
    sources = [provenance["source"], *provenance.get(picture_lists.SOURCES, ())]
    return SEPARATOR.join(map(str, sources[:lists]))


def recorded_pictures(manifest: Mapping[str, Any], lists: int | None = None) -> str:
    """Return where the pictures of a cache were, of its first lists or of all. Raises UsageError
    for a URL: no object store is asked, as whoever runs this, because a manifest says so."""
    spec = pictures_text(manifest, lists)
    if any(map(is_object_url, spec.split(SEPARATOR))):
        raise UsageError(
            f"the cache says that its pictures are {short(spec)}, and no object store is asked "
            "because a cache says so; if you trust that, give it as --images"
        )
    return spec


class Unfinished(NamedTuple):
    """A cache, or what was added to it, lacks shards."""

    what: str
    shards: int
    shards_complete: int
    pictures_left: int
    finish: str  # the command

    def __str__(self) -> str:
        return (
            f"unfinished: {self.shards_complete} of {counted(self.shards, 'shard')} of "
            f"{self.what} are there, "
            f"{counted(self.pictures_left, 'picture is', 'pictures are')} left; finish "
            f"it with: {self.finish}"
        )


def unfinished(cache: Path) -> Iterator[Unfinished]:
    """Yield what is missing of the cache at `cache` and of what was added to it; nothing where all
    is complete."""
    for part in (cache, *added_parts(cache)):
        part_manifest = manifest.read(part)
        if open_index(part, part_manifest) is not None:  # of a part that is complete
            continue
        left = [
            shard["count"]
            for shard in part_manifest["shards"]
            if not record_path(part, shard["name"]).is_file()
        ]
        if left:
            finish = (
                for_cache(part_manifest, cache)
                if part == cache
                else for_addition(part_manifest, cache)
            )
            total = len(part_manifest["shards"])
            yield Unfinished(
                describe_part(part_manifest), total, total - len(left), sum(left), finish
            )


def extract_options(
    manifest: Mapping[str, Any],
    levels: Sequence[int] | None = None,
    views: int | None = None,
    *,
    keep: bool = True,
) -> list[str]:
    """Return the options that extract what this manifest states, with these levels and views; all
    tokens without `keep`."""
    identity, provenance = manifest["identity"], manifest["provenance"]
    depth = identity["teacher"]["depth"]
    policy = {
        key: value for key, value in identity["policy"].items() if value != Policy().as_dict()[key]
    }
    size = provenance.get("batch_size", BATCH_SIZE)
    given = {
        "teacher": identity["teacher"]["name"],
        "levels": format_levels(identity["levels"] if levels is None else levels, depth),
        "images": pictures_text(manifest),
        "views": views or identity.get("first_view", 0) + identity["views"],
        **({} if provenance["weights"] == REGISTERED else {"weights": provenance["weights"]}),
        **{
            key: ",".join(map(repr, value)) if isinstance(value, list) else value
            for key, value in policy.items()
        },
        **{key: identity[key] for key in ("order", "codec", "store", "tokens")},
        **({"keep": identity["keep"]} if keep and "keep" in identity else {}),
        **({"pixels": identity["pixels"]} if "pixels" in identity else {}),
        **(
            {"precision": identity["teacher"]["precision"]}
            if "precision" in identity["teacher"]
            else {}
        ),
        "rows-per-shard": identity["rows_per_shard"],
        # a real network gives other bits at another
        **({} if size == BATCH_SIZE else {"batch-size": size}),
    }
    compiled = ["--compile"] if provenance.get("compiled") else []
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [*words, *pixel_path.options(identity["pixel_path"]), *compiled]


def format_levels(levels: Sequence[int], depth: int) -> str:
    """Write block numbers as `--levels` takes them; a recipe that reads no level still needs a
    cache with one.

    >>> format_levels([11, 12], 12), format_levels([8, 12], 12)
    ('last:2', '8,12')
    >>> format_levels([1, 2], 2), format_levels([], 12)
    ('all', 'last:1')
    """
    if list(levels) == list(range(1, depth + 1)):
        return "all"
    if list(levels) == list(range(depth - len(levels) + 1, depth + 1)):
        return f"last:{max(len(levels), 1)}"
    return ",".join(map(str, levels))
