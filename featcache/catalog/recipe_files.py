"""The files of recipes are found without importing any of them (they need torch; `info` must not),
and what each states in a literal is parsed and never run.

A package of recipes announces itself with the entry point group `featcache.recipes`; each of its
files states what its default configuration reads:

    SERVED_BY = {"fields": ("features", "attention"), "levels": "last:5", "mask_ratio": 0.7}
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.pictures.regular_file import open_regular
from featcache.runtime.user_file import reason

ENTRY_POINT_GROUP = "featcache.recipes"
NEEDS_LITERAL = "SERVED_BY"
_LARGEST_BYTES = 1 << 20  # of a recipe; the largest of ours has 13 kB

_LOG = logging.getLogger(__name__)


def installed_files() -> Iterator[Path]:
    """Yield every file of the packages that are announced; a package that is not there is told."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        package, *inner = point.value.split(".")
        try:
            spec = importlib.util.find_spec(package)  # of a top-level name, which imports nothing
        except (ImportError, ValueError):
            spec = None
        folders = [Path(folder, *inner) for folder in _locations(spec)]
        if not any(folder.is_dir() for folder in folders):
            _LOG.warning("recipes are announced in %r, which is no package here", point.value)
        for folder in folders:
            yield from sorted(folder.glob("*.py"))


def _locations(spec: Any) -> list[str]:
    return list(spec.submodule_search_locations or []) if spec else []


def read_needs(path: Path) -> dict[str, Any] | None:
    """Read the literal of one file; None where there is none. Raises UserError where the file is no
    Python, or its SERVED_BY no literal."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a text that is only parsed
            return _literal(ast.parse(_bytes(path)))
    except (OSError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"recipe {str(path)!r} cannot be read: {reason(error)}; its {NEEDS_LITERAL} is a "
            "literal, which is parsed and not run: fix the file"
        ) from error


def _literal(module: ast.Module) -> dict[str, Any] | None:
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if [getattr(target, "id", "") for target in targets] == [NEEDS_LITERAL]:
            value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return value if isinstance(value, dict) else None
    return None


def _bytes(path: Path) -> bytes:
    """Read a file as the interpreter would: what encoding it has, it says itself."""
    with open(open_regular(path), "rb") as file:  # noqa: PTH123 (a descriptor)
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    return data
