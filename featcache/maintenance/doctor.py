"""All checks of `featcache doctor` are run, one after the other: one that fails itself is a finding
like any other, and the rest is looked at."""

from __future__ import annotations

from collections.abc import Callable

from featcache.errors import UserError
from featcache.maintenance import check_home, check_machine, check_packages
from featcache.maintenance.finding import BROKEN, Finding, error_text
from featcache.runtime import signals


def examine() -> list[Finding]:
    """Look at software, machine and home, and return what was found, in order."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", check_packages.versions),
        ("extras", check_packages.extras),
        ("compiled code", check_packages.compiled_code),
        ("cores", check_machine.cores),
        ("memory", check_machine.memory),
        ("GPUs", check_machine.gpus),
        ("limits", check_machine.limits),
        ("variables", check_packages.own_variables),
        ("disks", check_machine.disks),
        ("home", check_home.home_folder),
        ("caches", check_home.caches),
    ]
    return [found for what, check in checks for found in _guarded(what, check)]


def _guarded(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Run one check. Whatever a broken installation raises is its finding; a signal is not."""
    try:
        return check()
    except UserError as error:
        return [Finding(what, str(error), BROKEN)]
    except Exception as error:
        if signals.was_signalled():
            raise
        advice = "fix this, or install the package that fails again"
        return [Finding(what, error_text(error), BROKEN, advice)]
