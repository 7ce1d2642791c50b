"""`python -m pipelines.pack_images` is `featcache pack` under its older name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import pack_images
from tests.conftest import Ran


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a/one.png", "b/two.png", "b/three.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_images", *map(str, arguments)])
    pack_images.main()


def test_it_packs_what_the_command_packs(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    featcache_command: Callable[..., Ran],
) -> None:
    options = ("--shard-size", 2, "--seed", 1, "--name", "train")
    ran = featcache_command("pack", photos, tmp_path / "new", *options)
    assert ran.out == (
        f"3 pictures (2 classes) in 2 shards: {tmp_path}/new/train-000000.tar ... "
        "train-000001.tar\n"
    )
    start(monkeypatch, photos, tmp_path / "old", *options)
    names = ["classes.json", "train-000000.tar", "train-000001.tar"]
    for folder in ("old", "new"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_mistake_is_one_line(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, photos, tmp_path / "out")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--shard-size N is needed for tars; give 1000, or name OUT.beton" in said
