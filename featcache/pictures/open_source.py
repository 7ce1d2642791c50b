"""A source of pictures is opened by its spec: a folder, webdataset tars (here or in an object
store), a tar of tars, parquet files or an FFCV `.beton`.

A source gives every picture a key (its path below the source without the last suffix), bytes at
random access, and labels where there are any. The decoder of the bytes is chosen by
`views.pixel_path`.
"""

from __future__ import annotations

import dataclasses
import os
import stat

from featcache.errors import UserError
from featcache.objects.url import is_object_url
from featcache.pictures import passed_over
from featcache.pictures.far_tars import open_far_tars
from featcache.pictures.folder import FolderSource, open_folder
from featcache.pictures.given_labels import read_labels
from featcache.pictures.joined import join
from featcache.pictures.parquet import ParquetSource, is_parquet, open_parquet
from featcache.pictures.patterns import expand_patterns, file_mode, literal_path
from featcache.pictures.source import ALLOWED, Source, check_keys
from featcache.pictures.spec import Spec, parse_spec, split_sources
from featcache.pictures.tars import TarSource, open_tars


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Open the pictures at `spec`. Raises UserError when there are none, or when two pictures have
    one key. What is passed over is noted in a line."""
    text = os.fspath(spec)
    specs = split_sources(text)
    if len(specs) > 1:
        return join(text, [open_source(each) for each in specs])
    given = parse_spec(text)
    given = dataclasses.replace(given, path=literal_path(given.path))
    source: Source
    if _is_beton_path(given.path):
        from featcache.pictures import beton

        given.check_kind("a .beton")
        source = beton.open_beton(given.path)
        check_keys(source)
    else:
        opened = _open(given)
        check_keys(opened)
        source = _named(opened, given)
    passed_over.log(source)
    return source


def _open(spec: Spec) -> FolderSource | TarSource | ParquetSource:
    if is_object_url(spec.path):
        return open_far_tars(spec)
    if stat.S_ISDIR(file_mode(spec.path)):
        return open_folder(spec)
    files = expand_patterns(spec.path)
    parquet = [file for file in files if is_parquet(file)]
    if not parquet:
        spec.check_kind("tars")
        return open_tars(spec.path, files, member=spec.image_member)
    if len(parquet) < len(files):
        other = next(file for file in files if not is_parquet(file))
        raise UserError(
            f"pictures {spec.path!r}: {parquet[0]!r} is parquet and {other!r} is not; files of one "
            f"kind are needed; allowed is {ALLOWED}"
        )
    return open_parquet(spec, parquet)


def _named(source: FolderSource | TarSource | ParquetSource, spec: Spec) -> Source:
    """Return a source under its whole spec, with the labels that the spec gives."""
    if spec.labels is None:
        return dataclasses.replace(source, spec=spec.text())
    tally = passed_over.Tally()
    given = read_labels(spec, source.keys, tally)
    rows = (*source.passed_over, *tally.rows)
    return dataclasses.replace(source, spec=spec.text(), given=given, passed_over=rows)


def is_beton(text: str) -> bool:
    """Return whether a spec names an FFCV file, and nothing beside it."""
    return len(split_sources(text)) == 1 and _is_beton_path(parse_spec(text).path)


def _is_beton_path(path: str) -> bool:
    return path.endswith(".beton") and not stat.S_ISDIR(file_mode(path))
