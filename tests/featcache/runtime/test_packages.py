"""Packages are compared by their metadata: a folder of written dist-infos stands before the real
ones."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from featcache.runtime import packages


def write(folder: Path, name: str, version: str, *lines: str) -> None:
    """Write what pip leaves of a package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
    (info / "METADATA").write_text("\n".join((*head, *lines)) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are found first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


EXTRAS = (
    "Provides-Extra: fast", "Provides-Extra: all", "Provides-Extra: round",
    'Requires-Dist: zz-quick>=2; extra == "fast"',
    'Requires-Dist: zz-here; extra == "fast"',
    'Requires-Dist: zz-tool; extra == "all"',
    'Requires-Dist: featcache[fast,round]; extra == "all"',
    'Requires-Dist: featcache[all]; extra == "round"',
)  # fmt: skip


def test_what_an_extra_lacks_is_told_with_the_extras_that_it_names(site: Path) -> None:
    """Those that name one another as well."""
    write(site, "featcache", "9.0", "Requires-Dist: zz-always>=1", *EXTRAS)
    write(site, "zz_here", "0.1")
    write(site, "zz_quick", "1.9")
    assert packages.extras() == ["all", "fast", "round"]
    assert packages.missing("fast") == ["zz-quick>=2"]
    assert packages.missing("all") == ["zz-tool", "zz-quick>=2"]
    assert packages.missing("round") == ["zz-tool", "zz-quick>=2"]
    assert [need.name for need in packages.required("featcache")] == ["zz-always"]


def test_an_extra_that_is_whole_lacks_nothing(site: Path) -> None:
    write(site, "featcache", "9.0", *EXTRAS[:1], *EXTRAS[3:5])
    write(site, "zz_here", "0.1")
    write(site, "zz_quick", "2.0+local")
    assert packages.missing("fast") == []


def test_packages_that_do_not_go_together(site: Path) -> None:
    write(site, "featcache", "9.0", "Requires-Dist: zz-a", "Requires-Dist: zz-b")
    write(site, "zz_a", "1.0", "Requires-Dist: zz-b==2.0", "Requires-Dist: zz-c; extra == 'x'")
    write(site, "zz_b", "2.1", "Requires-Dist: zz-d<3", "Requires-Dist: (no requirement")
    assert packages.conflicts() == [
        "zz-a 1.0 needs zz-b==2.0, and 2.1 is installed",
        "zz-b 2.1 needs zz-d<3, and none is installed",
    ]


def test_a_marker_of_another_machine_asks_for_nothing(site: Path) -> None:
    write(site, "featcache", "9.0", "Requires-Dist: zz-a; sys_platform == 'win32'")
    assert packages.required("featcache") == []


def test_damaged_metadata_is_no_version(site: Path) -> None:
    (site / "zz_bare-1.0.dist-info").mkdir()
    assert packages.version("zz-bare") is None
    assert packages.version("zz-not-there") is None
    with pytest.raises(PackageNotFoundError):
        packages.required("zz-not-there")
