"""The pictures are those of --images, or those that a cache was made from where they are still
there."""

from __future__ import annotations

from featcache.catalog import extract_command
from featcache.errors import UsageError
from featcache.pictures.source import ALLOWED, Source
from featcache.views import pixel_path
from student.setup.cache_match import MatchedCache
from student.setup.options import Options


def given_source(options: Options) -> Source | None:
    """Open the pictures of --images; None where none are given."""
    if not options.images:
        return None
    decoder = options.decoder or "pillow"
    return pixel_path.open_with_decoder(options.images, decoder, exif=options.exif)


def decoded_source(
    given: Source | None, found: MatchedCache | None, options: Options, lists: int | None = None
) -> Source:
    """Return the pictures through the decoder that was asked for, else through the cache's; without
    given ones those of its first lists, or of all."""
    source = _source_of(found, options.decoder, lists) if given is None else given
    if found is None:
        return source
    path = found.cache.identity["pixel_path"]
    check_exif(options, found)
    return pixel_path.match_decoder(
        source, {**path, "decoder": options.decoder} if options.decoder else path
    )


def check_exif(options: Options, found: MatchedCache) -> None:
    """Raise UsageError where --exif is given with a cache that was extracted without it."""
    if options.exif and found.cache.identity["pixel_path"].get("exif_transpose") is not True:
        raise UsageError(
            f"--exif: cache {str(found.cache.path)!r} was extracted without it, and training shows "
            "what the teacher saw; leave it out, or extract with --exif"
        )


def _source_of(found: MatchedCache | None, decoder: str | None, lists: int | None) -> Source:
    """Open the pictures a cache was made from."""
    if found is None:
        raise UsageError(
            f"no pictures given: --images SRC is {ALLOWED}; FEATCACHE_IMAGES sets a default"
        )
    spec = extract_command.recorded_pictures(found.cache.manifest, lists)
    return pixel_path.open_with_decoder(spec, decoder or "pillow")
