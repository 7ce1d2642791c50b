"""Installed packages are compared with what featcache's own metadata asks for; none is imported."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

OWN = "featcache"


def version(name: str) -> str | None:
    """Return the installed version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):  # KeyError: its metadata is damaged
        return None


def required(name: str, extra: str = "") -> list[Requirement]:
    """Return what an installed package needs on this machine, or what an extra of it adds. Raises
    PackageNotFoundError where the package is not installed."""
    parsed = (_parse(text) for text in metadata.requires(name) or [])
    return [each for each in parsed if each is not None and _applies(each, extra)]


def _parse(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:  # a foreign package's own mistake
        return None


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if marker is None:
        return not extra
    always = marker.evaluate({"extra": ""})
    return marker.evaluate({"extra": extra}) and not always if extra else always


def meets(specifier: SpecifierSet, found: str | None) -> bool:
    """Return whether a version is one of those allowed; a version of no known form is not.

    >>> meets(SpecifierSet(">=2.11"), "2.12.0.dev1+cu130"), meets(SpecifierSet(">=2.11"), "2.9.1")
    (True, False)
    >>> meets(SpecifierSet(">=1"), "as I like"), meets(SpecifierSet(), None)
    (False, False)
    """
    try:
        return found is not None and specifier.contains(found, prereleases=True)
    except InvalidVersion:
        return False


def extras() -> list[str]:
    """Return the names of featcache's extras, in alphabetical order."""
    return sorted(metadata.metadata(OWN).get_all("Provides-Extra") or [])


def missing(extra: str, above: tuple[str, ...] = ()) -> list[str]:
    """Return what an extra needs and is not installed as it needs it, with the extras that it
    names; `above` are those that led here."""
    found: list[str] = []
    for need in required(OWN, extra):
        if canonicalize_name(need.name) == OWN:
            below = sorted(need.extras - {extra, *above})
            found += [name for each in below for name in missing(each, (*above, extra))]
        elif not meets(need.specifier, version(need.name)):
            found.append(f"{need.name}{need.specifier}")
    return list(dict.fromkeys(found))


def conflicts() -> list[str]:
    """Say which of the packages that featcache needs lack what they need themselves."""
    names = [need.name for need in required(OWN)]
    return [line for name in names if version(name) for line in _lacking(name)]


def _lacking(name: str) -> list[str]:
    return [
        f"{name} {version(name)} needs {need.name}{need.specifier}, and "
        f"{version(need.name) or 'none'} is installed"
        for need in required(name)
        if not meets(need.specifier, version(need.name))
    ]
