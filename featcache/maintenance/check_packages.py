"""`featcache doctor` looks at software: versions, extras, compiled code and variables.

Each library is imported where it is looked at, so that a broken one is a finding.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from pathlib import Path
from typing import Any

from featcache.errors import UserError, near
from featcache.maintenance.finding import BROKEN, NOTE, OK, Finding, error_text
from featcache.runtime import variables

_SHOWN = (
    "featcache", "torch", "torchvision", "timm", "open_clip_torch", "accelerate", "zarr",
    "numcodecs", "pillow", "numba",
)  # fmt: skip
_ORDER = 10_000  # numbers that the compiled loop adds


def versions() -> list[Finding]:
    """Tell the versions that matter, and every package that is missing or not as featcache needs
    it."""
    from importlib.metadata import PackageNotFoundError

    from packaging.utils import canonicalize_name

    from featcache.runtime import packages

    try:
        needs = {canonicalize_name(each.name): each for each in packages.required(packages.OWN)}
    except PackageNotFoundError:
        needs = {}
    rows = [_python(), _own(bool(needs))]
    for name in dict.fromkeys((*map(canonicalize_name, _SHOWN[1:]), *needs)):
        need, found = needs.get(name), packages.version(name)
        wanted = str(need.specifier) if need else ""
        good = packages.meets(need.specifier, found) if need else found is not None
        if not good or name in map(canonicalize_name, _SHOWN):
            rows.append(_package(name, found, wanted, good))
    return rows + _conflicts(bool(needs))


def _package(name: str, found: str | None, wanted: str, good: bool) -> Finding:
    facts = {"version": found, "needed": wanted}
    if good:
        return Finding(name, f"{found}{f' ({wanted})' if wanted else ''}", OK, "", facts)
    told = f"{found or 'not installed'}; {wanted or 'any version'} is needed"
    return Finding(name, told, BROKEN, f"pip install '{name}{wanted}'", facts)


def _own(installed: bool) -> Finding:
    from featcache import __version__

    if installed:
        return Finding("featcache", __version__, facts={"version": __version__})
    told = f"{__version__}, not installed: what it needs, and recipes, are not known"
    return Finding("featcache", told, NOTE, "pip install -e . in its folder")


def _python() -> Finding:
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.specifiers import SpecifierSet

    from featcache.runtime import packages

    found = platform.python_version()
    try:
        (wanted,) = metadata(packages.OWN).get_all("Requires-Python") or [""]
    except PackageNotFoundError:
        wanted = ""
    good = packages.meets(SpecifierSet(wanted), found)
    state, advice = (OK, "") if good else (BROKEN, "make the environment with such a Python")
    told = f"{found}{f' ({wanted})' if wanted else ''}"
    return Finding("python", told, state, advice, {"version": found, "needed": wanted})


def _conflicts(installed: bool) -> list[Finding]:
    """Tell packages that do not go together, as torchvision and another torch."""
    from featcache.runtime import packages

    return [
        Finding("packages", line, NOTE, "install versions that go together (`pip check`)")
        for line in (packages.conflicts() if installed else [])
    ]


def extras() -> list[Finding]:
    """Tell which extras are not installed, and the line that installs each."""
    from importlib.metadata import PackageNotFoundError

    from featcache.runtime import packages

    try:
        lacking = {name: packages.missing(name) for name in packages.extras()}
    except PackageNotFoundError:
        return []
    return [_extra(name, gone) for name, gone in lacking.items()]


def _extra(name: str, gone: list[str]) -> Finding:
    what, facts = f"extra {name}", {"missing": gone}
    if not gone:
        return Finding(what, "installed", facts=facts)
    told = f"not installed: {', '.join(gone)}"
    return Finding(what, told, OK, f"for it: pip install 'featcache[{name}]'", facts)


def compiled_code() -> list[Finding]:
    """Compile a small loop, compare its result, and tell where its machine code is kept."""
    import numba
    from numba.core.dispatcher import Dispatcher

    from featcache.runtime.jit import compiled

    start, loop = time.monotonic(), compiled(_add)
    found, seconds = loop(_ORDER), time.monotonic() - start
    told = f"works ({seconds:.1f} s)"
    if not isinstance(loop, Dispatcher):
        advice = "unset NUMBA_DISABLE_JIT: the same loops take hours in the interpreter"
        return [Finding("compiled code", "numba is turned off", BROKEN, advice)]
    if found != _ORDER * (_ORDER - 1) // 2:
        told = f"a loop gives {found}, not {_ORDER * (_ORDER - 1) // 2}"
        advice = f"install numba {numba.__version__} and llvmlite again"
        return [Finding("compiled code", told, BROKEN, advice)]
    return [Finding("compiled code", told), _kept_code(loop.stats.cache_path)]


def _add(count: int) -> int:
    total = 0
    for i in range(count):
        total += i
    return total


def _kept_code(folder: str | None) -> Finding:
    facts = {"path": folder}
    if folder is None:
        told = "cannot be written: every process compiles again, for some seconds"
        advice = "set NUMBA_CACHE_DIR to a folder of your own that can be written"
        return Finding("numba's cache", told, NOTE, advice, facts)
    return Finding("numba's cache", f"{folder!r} can be written", facts=facts)


def own_variables() -> list[Finding]:
    """Tell the variables of featcache and whether they make sense, and those set that change its
    numbers."""
    rows = [_home_variable(), _images_variable()]
    for name in variables.unknown():  # their values may be anybody's secret
        advice = f"unset it; {near(name, variables.OWN)}"
        rows.append(Finding(name, "set, and means nothing to featcache", NOTE, advice))
    numeric: dict[str, Any] = {"variables": variables.recorded()}
    told = ", ".join(f"{name}={value!r}" for name, value in numeric["variables"].items())
    return [*rows, Finding("arithmetic", told or "no variable set that changes it", facts=numeric)]


def _home_variable() -> Finding:
    value = os.environ.get("FEATCACHE_HOME")
    if not value:
        return Finding("FEATCACHE_HOME", "not set: caches lie in ./caches")
    return Finding("FEATCACHE_HOME", repr(value))  # whether it serves, `home` tells


def _images_variable() -> Finding:
    from featcache.pictures.spec import split_sources

    name, value = "FEATCACHE_IMAGES", os.environ.get("FEATCACHE_IMAGES")
    if not value:
        return Finding(name, "not set: --images names the pictures")
    try:
        found = [_pictures(name, each) for each in split_sources(value)]
    except UserError as error:
        return Finding(name, str(error), BROKEN, "name pictures that exist, or unset it")
    except OSError as error:
        return Finding(name, error_text(error), BROKEN, "fix this, or unset it")
    if len(found) == 1:
        return found[0]
    return next((each for each in found if each.state == BROKEN), Finding(name, repr(value)))


def _pictures(name: str, text: str) -> Finding:
    """Look at one of the sources that a variable names."""
    from featcache.objects.url import is_object_url
    from featcache.pictures.open_source import is_beton
    from featcache.pictures.patterns import expand_patterns, file_mode, literal_path
    from featcache.pictures.spec import parse_spec

    path = literal_path(parse_spec(text).path)
    if is_object_url(path):
        return Finding(name, f"{text!r} (an object store is not asked here)")
    mode = file_mode(path)
    if is_beton(path) and not stat.S_ISREG(mode):
        return Finding(name, f"{text!r}: no such file", BROKEN, "name pictures, or unset it")
    if not stat.S_ISDIR(mode):
        expand_patterns(path)
    elif not os.access(Path(path), os.R_OK | os.X_OK):
        return Finding(name, f"{text!r} cannot be listed", BROKEN, "allow it, or unset it")
    return Finding(name, repr(text))
