"""Paths that a user gives are of this machine's file system: other places are refused, and `~` is
somebody's home."""

from __future__ import annotations

import os
import re
import sys

from featcache.errors import UsageError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/(?=/)", re.IGNORECASE)


def local_path(text: str, what: str) -> str:
    """Return a path as the file system takes it; `~` and `~user` are home folders where nothing has
    such a name here. Raises UsageError, which names the path as `what`, for a path elsewhere, as
    s3://bucket/name, and for text that can be no path.

    >>> local_path("caches/one", "--out")
    'caches/one'
    """
    if match := _SCHEME.match(text):
        raise UsageError(
            f"{what} {text!r}: {match[0]}/ is no place of this machine, and only a local path "
            "works here; give one"
        )
    if not text or "\0" in text:
        raise UsageError(f"{what} {text!r} can be no path; give the path of a file or folder")
    check_encoding(text, what)
    return _expand_home(text, what)


def _expand_home(text: str, what: str) -> str:
    if not text.startswith("~") or os.path.lexists(text):
        return text
    path = os.path.expanduser(text)  # noqa: PTH111 (the text is kept as given)
    if path == text:
        raise UsageError(
            f"{what} {text!r}: there is no such user, nor a file of that name; give the whole path"
        )
    return path


def check_encoding(name: str, what: str) -> None:
    """Raise UsageError for a name that is UTF-8 where Python was told that names are not."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8" or not is_encoded(name):
        return
    raise UsageError(
        f"{what} {name!a}: in this locale Python takes names for {encoding}, and this one is "
        "UTF-8; set PYTHONUTF8=1, or LC_ALL=C.UTF-8, and run the same command again"
    )


def is_encoded(name: str) -> bool:
    """Return whether a name was not decoded, although it is UTF-8.

    >>> is_encoded("na\\udcc3\\udcafve"), is_encoded("na\\udcefve"), is_encoded("naïve")
    (True, False, False)
    """
    try:
        return name.encode("ascii", "surrogateescape").decode() != name
    except UnicodeError:
        return False
