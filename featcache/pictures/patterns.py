"""A path, a glob or a brace pattern names tars; what exists is taken as it is written."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from braceexpand import braceexpand

from featcache.errors import UserError
from featcache.objects.url import is_object_url
from featcache.pictures.source import ALLOWED
from featcache.pictures.spec import SEPARATOR, split_sources
from featcache.runtime.local_path import local_path

MOST_TARS = 1_000_000  # that a pattern may name
_DEEPEST = 50  # braces within braces; braceexpand takes seconds for thousands
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_ESCAPED = re.compile(r"\\.", re.DOTALL)


def literal_path(spec: str) -> str:
    """Return the path that a spec is, with `~` as the home folder where nothing has that name; the
    URL of an object store as it is. Raises UserError for text that can be neither."""
    if is_object_url(spec):
        return spec
    if not spec.strip() or "\0" in spec:
        raise UserError(f"no pictures found: {spec!r} is no path; allowed is {ALLOWED}")
    return local_path(spec, "no pictures found:")


def absolute(spec: str) -> str:
    """Return a spec as other folders take it; URLs as they are."""
    return SEPARATOR.join(
        each if is_object_url(each) else os.path.abspath(each)  # noqa: PTH100 (a pattern)
        for each in split_sources(spec)
    )


def file_mode(path: str) -> int:
    """Return the mode of what is at a path, 0 where nothing is, as under a name that is too long
    for one: many alternatives in braces are. Raises OSError where it cannot be looked at."""
    try:
        return Path(path).stat().st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return 0
        raise


def expand_patterns(spec: str) -> list[str]:
    """Return the tars that a path, a glob or a brace pattern names, each once. Raises UserError
    where one does not exist, and where there is none."""
    parts = [spec] if os.path.lexists(spec) else _expand_below(_literal_folder(spec), spec)
    tars = list(dict.fromkeys(path for part in parts for path in _expand_glob(part) or [part]))
    missing = next((path for path in tars if not stat.S_ISREG(file_mode(path))), None)
    if missing is not None:
        what = "is no regular file" if file_mode(missing) else "does not exist"
        raise UserError(f"no pictures found: {missing[:300]!r} {what}; allowed is {ALLOWED}")
    return tars


def _literal_folder(spec: str) -> str:
    """Return the longest beginning of a spec that is a folder, with its slash: braces in the name
    of a folder that exists are part of its name, as the brackets are.

    >>> _literal_folder("/no such folder {a,b}/{0..9}.tar"), _literal_folder("{0..9}.tar")
    ('/', '')
    """
    end = spec.rfind("/")
    while end >= 0 and not stat.S_ISDIR(file_mode(spec[: end + 1])):
        end = spec.rfind("/", 0, end)
    return spec[: end + 1]


def _expand_below(folder: str, spec: str) -> list[str]:
    return [folder + name for name in expand_braces(spec[len(folder) :])]


def expand_braces(spec: str) -> list[str]:
    """Expand at most MOST_TARS names; they are counted first, since braceexpand holds ranges and
    inner braces in memory."""
    try:
        if _most_names(spec) <= MOST_TARS:
            return list(braceexpand(spec))
    except (ValueError, RecursionError) as error:  # UnbalancedBracesError, or thousands of digits
        raise UserError(
            f"pictures {spec[:200]!r}: its braces cannot be expanded ({str(error)[:80]}), perhaps "
            f"one is not closed; allowed is {ALLOWED}"
        ) from error
    raise UserError(
        f"pictures {spec[:200]!r}: its braces name more than {MOST_TARS} tars; give a smaller "
        f"range; allowed is {ALLOWED}"
    )


def _most_names(spec: str) -> int:
    """An upper bound of the names: the product of the alternatives of all braces, inner ones too.

    >>> _most_names("{a,b}-{0..9}"), _most_names("{1..3,{x,y}}")
    (20, 4)
    """
    total, open_braces = 1, list[list[int]]()
    for at, char in enumerate(_ESCAPED.sub("..", spec)):
        if char == "{":
            open_braces.append([at + 1, 1])
            if len(open_braces) > _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} within each other")
        elif char == "," and open_braces:
            open_braces[-1][1] += 1
        elif char == "}" and open_braces:
            begin, alternatives = open_braces.pop()
            found = _RANGE.fullmatch(spec[begin:at])
            total = min(total * (_length(found) if found else alternatives), MOST_TARS + 1)
    return total


def _length(found: re.Match[str]) -> int:
    first, last, step = found.groups()
    return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1


def _expand_glob(part: str) -> list[str]:
    """Return what a glob matches, sorted; nothing for the name of a file that exists."""
    return [] if os.path.lexists(part) or not glob.has_magic(part) else sorted(_matches(part))


def _matches(pattern: str) -> Iterator[str]:
    """Yield matches as `glob.glob` does, which leaves out in silence what it may not list."""
    folder, name = os.path.split(pattern)
    folders: Iterator[str] = iter([folder])
    if glob.has_magic(folder) and folder != pattern and not os.path.lexists(folder):
        folders = (each for each in _matches(folder) if Path(each).is_dir())
    for each in folders:
        if not glob.has_magic(name):
            if os.path.lexists(os.path.join(each, name)):  # noqa: PTH118 (the text is kept as given)
                yield os.path.join(each, name)  # noqa: PTH118
        elif Path(each or ".").is_dir():
            for found in fnmatch.filter(_names(each or "."), name):
                if not found.startswith(".") or name.startswith("."):
                    yield os.path.join(each, found)  # noqa: PTH118


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (text, not Paths)
    except OSError as error:
        raise UserError(
            f"pictures: the folder {folder!r} cannot be listed: {error.strerror}; make it "
            "readable, or name the tars without a pattern"
        ) from error
