"""Pictures that were renamed or moved since the extraction are matched by their content
(`--match content`)."""

from __future__ import annotations

import contextlib

from accelerate import PartialState

from featcache.console.progress_bar import ProgressBar
from featcache.errors import UsageError, counted
from featcache.pictures.source import Source
from featcache.reading import content_match
from featcache.reading.cache import Cache
from featcache.reading.join import StoredPixels
from student.setup.options import Options, RunRequest

KINDS = ("key", "content")


def check(options: Options, what: str) -> None:
    """Raise UsageError where pictures are to be matched by content, and `what` matches none."""
    if options.match != "key":
        raise UsageError(
            f"--match {options.match} finds pictures among the rows of a cache, and {what}; leave "
            "it out"
        )


def matched(request: RunRequest, cache: Cache, source: Source) -> Source:
    """Return the pictures under the cache's keys of their content, where that is asked for, and
    say how many have another key now."""
    if request.options.match == "key":
        return source
    if isinstance(source, StoredPixels):
        check(request.options, "pixels come from the cache itself")
    bar = ProgressBar("match", "pictures", enabled=PartialState().is_main_process)
    with contextlib.closing(bar):
        found = content_match.rename(cache, source, request.options.workers, bar)
    pairs = zip(found.keys, found.order.tolist(), strict=True)
    renamed = sum(key != source.keys[at] for key, at in pairs)
    request.say(
        f"note: {renamed} of {counted(len(source), 'picture')} of {source.spec} have other names "
        "than in the cache, and were found by their content"
    )
    if found.left_out:
        some = counted(len(found.left_out), "picture")
        request.say(
            f"note: {some} cannot be decoded, no more than are in the cache's quarantine: left "
            f"out, the first is {found.left_out[0]!r}"
        )
    return found
