"""A place in an object store is named by a URL: `s3://bucket/path`, `gs://bucket/path`,
`az://container/path`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from featcache.errors import UsageError

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# S3's rule is the narrowest of the three but for the underscore, which old buckets of GCS have
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_MOST_BYTES = 1024  # of an object's name, in all three


@dataclass(frozen=True)
class ObjectUrl:
    """Names an object, or what begins so. `path` has no slash at its ends; empty is the whole
    bucket."""

    scheme: Literal["s3", "gs", "az"]
    bucket: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' * bool(self.path)}{self.path}"

    def join(self, name: str) -> ObjectUrl:
        """Return what lies below."""
        return parse(f"{self}/{name}")

    @property
    def name(self) -> str:
        """Return the last part of the path; the bucket where there is none."""
        return self.path.rpartition("/")[2] or self.bucket


def is_url(text: str) -> bool:
    """Return whether a text is meant as a URL, known or not, and not as a path.

    >>> is_url("s3://bucket/cache"), is_url("ftp://host"), is_url("./s3"), is_url("C:/caches")
    (True, True, False, False)
    """
    return _URL.match(text) is not None


def is_object_url(text: object) -> bool:
    """Return whether a text is meant as a place in an object store.

    >>> is_object_url("s3://bucket/cache"), is_object_url("http://host/cache")
    (True, False)
    """
    match = _URL.match(text) if isinstance(text, str) else None
    return match is not None and match[1].lower() in SCHEMES


def parse(text: str) -> ObjectUrl:
    """Parse a URL. Raises UsageError for one that names no place in an object store.

    >>> str(parse("s3://bucket/caches/clip/"))
    's3://bucket/caches/clip'
    """
    match = _URL.match(text)
    scheme = match[1] if match else ""
    if scheme not in SCHEMES:
        raise _wrong(text, f"known are {', '.join(f'{each}://' for each in SCHEMES)}")
    bucket, _, path = text[len(scheme) + 3 :].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise _wrong(
            text,
            "its bucket must have 3 to 63 lower-case letters, digits, dots, dashes and underscores",
        )
    path = path.strip("/")
    if len(path.encode(errors="replace")) > _MOST_BYTES:
        raise _wrong(text, f"a name has {_MOST_BYTES} bytes at most")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise _wrong(text, "a part of its path is empty, '.' or '..', which leads nowhere there")
    if not path.isprintable():
        raise _wrong(text, "its path has characters that cannot be printed")
    if "?" in path or "#" in path:
        raise _wrong(text, "'?' and '#' have no meaning in it; options go into the environment")
    return ObjectUrl(scheme, bucket, path)  # type: ignore[arg-type]


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(
        f"{text!r} names no place in an object store: {why}; write it as s3://BUCKET/PATH"
    )
