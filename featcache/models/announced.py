"""Families of teachers come from other packages too: each announces a prefix of names, and the
module that loads them, by an entry point.

    [project.entry-points."featcache.teachers"]
    mynets = "mypackage.teachers"            # --teacher mynets:NAME

The module has `load(name, options, weights)`, as a family of `featcache.teachers` has. None is
imported before a name with its prefix is asked for.
"""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import entry_points
from types import ModuleType

from featcache.errors import UserError
from featcache.runtime.signals import was_signalled
from featcache.runtime.user_file import reason

ENTRY_POINT_GROUP = "featcache.teachers"
_LOG = logging.getLogger(__name__)


def prefixes() -> list[str]:
    """Return the prefixes that installed packages announce."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def find(prefix: str) -> ModuleType | None:
    """Import the family of a prefix; None where no package announces it. UserError where it cannot
    be imported, or is none."""
    found = [point.value for point in entry_points(group=ENTRY_POINT_GROUP, name=prefix)]
    if not found:
        return None
    value, *hidden = dict.fromkeys(found)
    if hidden:
        _LOG.warning("teachers %r: of %s those of %s are hidden", f"{prefix}:", value, hidden[0])
    try:
        module = importlib.import_module(value)
    except (Exception, SystemExit) as error:
        if was_signalled():
            raise
        raise UserError(
            f"teachers {prefix!r}:NAME are announced in {value!r}, which cannot be imported: "
            f"{reason(error)}; reinstall the package that announces it"
        ) from error
    if not callable(getattr(module, "load", None)):
        raise UserError(
            f"teachers {prefix!r}:NAME are announced in {value!r}, which lacks load(name, options, "
            "weights) -> Teacher; fix the package that announces it"
        )
    return module
