"""Other packages announce families of teachers; what is announced wrongly is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import announced as families
from tests import announced

FAMILY = """
from featcache.teachers import synthetic

def load(name, options, weights):
    assert name == "nets:one", name
    return synthetic.load("synthetic", {"levels": 2, "tokens": 4, "width": 8, **options}, weights)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    points = {"nets": "package_of_nets", "broken": "package_of_errors", "empty": "package_of_none"}
    announced.announce(tmp_path, monkeypatch, "nets", {families.ENTRY_POINT_GROUP: points})
    (tmp_path / "package_of_nets.py").write_text(FAMILY)
    (tmp_path / "package_of_errors.py").write_text("import nothing_of_that_name")
    (tmp_path / "package_of_none.py").write_text("load = 3")
    return tmp_path


def test_a_family_of_another_package_is_loaded_by_its_prefix(nets: Path) -> None:
    teacher = teachers.load("nets:one,width=16")
    assert (teacher.name, teacher.width, teacher.depth) == ("nets:one,width=16", 16, 2)
    assert not teachers.is_registered("nets:one")
    with pytest.raises(UsageError, match="nets:NAME"):
        teachers.load("nts:one")


def test_what_is_announced_wrongly_is_one_line(nets: Path) -> None:
    for prefix, told in {
        "broken": "cannot be imported: ModuleNotFound",
        "empty": "lacks load",
    }.items():
        with pytest.raises(UserError, match=told) as caught:
            teachers.load(f"{prefix}:one")
        assert "\n" not in str(caught.value)


def test_families_of_this_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"a": "package_of_nets", "b": "package_of_errors"}.items():
        points = {"timm": value, "nets": value}
        announced.announce(tmp_path / name, monkeypatch, name, {families.ENTRY_POINT_GROUP: points})
    for name in ("a", "b"):
        (tmp_path / name / "package_of_nets.py").write_text(FAMILY)
        (tmp_path / name / "package_of_errors.py").write_text(FAMILY)
    assert teachers.family("timm:vit_tiny_patch16_224").__name__ == "featcache.teachers.timm_vit"
    assert teachers.family("nets:one").__name__ == "package_of_errors"  # the one found first
    assert "those of package_of_nets are hidden" in caplog.text


def test_this_repository_announces_runs() -> None:
    assert announced.declared()[families.ENTRY_POINT_GROUP] == {
        "run": "student.features.run_family"
    }
