"""A user's own .py file is run as a module."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from featcache.errors import UsageError, UserError
from featcache.runtime.signals import was_signalled

_PREFIX = "featcache_user_file_"  # of the names of such modules


def load_module(path: Path, kind: str, needs: Mapping[str, str], example: str) -> ModuleType:
    """Run the file of a `kind` (teacher, recipe) as a module. It stays in sys.modules, where
    dataclasses look up their annotations.

    `needs`: the functions and classes that it must define, and what to say of each; `example`: a
    file that has them. Raises UsageError where the file or a name is missing, UserError where the
    file fails as it is imported.
    """
    if not path.is_file():
        raise UsageError(
            f"cannot load {kind} {str(path)!r}: no such file; give a name or the path of your own "
            ".py file"
        )
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{kind}_{path.stem}_{digest}", path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if was_signalled():  # what a library made of it is no mistake of the file's
            raise
        raise UserError(
            f"{kind} {str(path)!r} fails as it is imported: {reason(error)}; fix the file"
        ) from error
    if missing := [name for name in needs if not callable(getattr(module, name, None))]:
        raise UsageError(
            f"cannot use {kind} {str(path)!r}: it lacks {', '.join(missing)}; needed: "
            f"{', '.join(needs.values())}; add what is missing, as {example} has it"
        )
    return module


def reason(error: BaseException) -> str:
    """Return the kind and first line of an exception."""
    try:
        lines = str(error).strip().splitlines() or ["no message"]
    except Exception:  # its own way of saying it fails
        lines = ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def failure(error: BaseException) -> str:
    """Return the line that tells an exception which came out of a user's file; empty where none of
    its frames is of one.

    The file's own mistakes come out anywhere: in a teacher's `forward`, in a recipe's `needs`.
    """
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_PREFIX):
            found = f"{trace.tb_frame.f_code.co_filename!r} fails at line {trace.tb_lineno}"
        trace = trace.tb_next
    return f"your own file {found}: {reason(error)}; fix the file" if found else ""
