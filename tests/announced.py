"""The entry points that pyproject.toml declares, as an installed package has them, whatever is
installed where the tests run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def declared() -> dict[str, dict[str, str]]:
    """Return group -> name -> module of the entry points."""
    return tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]


def announce(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, groups: dict[str, dict[str, str]]
) -> None:
    """Put the metadata of a distribution before all others that Python finds."""
    info = folder / f"{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    parts = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(parts))
    monkeypatch.syspath_prepend(str(folder))


def announce_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announce what this repository declares."""
    announce(folder, monkeypatch, "featcache", declared())
