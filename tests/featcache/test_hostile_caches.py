"""A cache or a ledger from an attacker: each command ends well or with one line, soon, and touches
nothing but its own folder.

Every JSON of a cache is changed at random places, with right checksums and without, and given to
every command that reads one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.cli import cli
from featcache.extraction import extend, extract
from featcache.maintenance import transfer
from tests import hostile_json as hostile
from tests.conftest import SYNTHETIC, make_photos, make_plan

EXTRACT = ("--teacher", SYNTHETIC, "--views", "2", "--size", "28", "--rows-per-shard", "6")
WHERE = ("--images", "PICTURES", "--out", "CACHE")
COMMANDS: dict[str, tuple[str, ...]] = {
    "info": ("info", "CACHE"),
    "info --json": ("info", "CACHE", "--json"),
    "ls": ("ls",),
    "gc": ("gc", "--unused", "0"),
    "verify": ("verify", "CACHE"),
    "repair": ("repair", "CACHE", "--images", "PICTURES"),
    "copy": ("copy", "CACHE", "DEST"),
    "copy some": ("copy", "CACHE", "DEST", "--views", "1", "--levels", "all"),
    "convert": ("convert", "CACHE", "DEST", "--store", "webdataset"),
    "extract": ("extract", *EXTRACT, "--levels", "1,3", *WHERE),
    "add": ("extract", *EXTRACT, "--add", "--levels", "all", *WHERE),
    "rm": ("rm", "CACHE", "--yes"),
}  # fmt: skip
KINDS = ("manifest", "one manifest", "record", "part", "part record", "quarantine", "ledger")
RUN = {
    "time": "2026-01-01T00:00:00Z",
    "command": "train",
    "cache_id": "",
    "recipe": "mae",
    "run": "runs/a",
}
CHECKS = list(HealthCheck)  # a fixture serves all examples, and some of them are slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_photos(tmp_path_factory.mktemp("hostile") / "pictures")
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def origins(pictures: Path) -> dict[str, Path]:
    """A cache of twelve pictures in two shards, one of them in quarantine, with a level added; in
    each store."""
    out = pictures.parent / "zarr"
    extract.run(make_plan(pictures, views=2, rows_per_shard=6), out, batch_size=32)
    plan = make_plan(pictures, views=2, rows_per_shard=6, levels=(1, 2, 3))
    part = extend.plan_part(plan, out)
    assert part is not None
    extract.run(*part, batch_size=32)
    transfer.convert(out, pictures.parent / "webdataset", "webdataset")
    return {name: pictures.parent / name for name in ("zarr", "webdataset")}


class World:
    """A home with the attacked cache and a sound one, a place to copy to, and files that are
    nobody's to touch."""

    def __init__(self, root: Path, origin: Path, pictures: Path) -> None:
        self.root, self.pictures = root, pictures
        self.home, self.cache, self.dest = root / "home", root / "home/odd", root / "there/dest"
        self.ledger = self.home / "runs.jsonl"
        shutil.copytree(origin, self.cache)
        shutil.copytree(origin, self.home / "sound")
        self.dest.parent.mkdir()
        for folder in (root, self.home, self.dest.parent):
            (folder / "trap").write_text("not yours")
        self.ledger.write_text("".join(f"{json.dumps(self.run())}\n" for _ in range(2)))

    def run(self) -> dict[str, Any]:
        return {**RUN, "cache_id": hostile.read(self.home / "sound/manifest.json")["id"]}

    @property
    def part(self) -> Path:
        return next((self.cache / "parts").iterdir())

    def path(self, kind: str) -> Path:
        """The file of a kind."""
        return {
            "manifest": self.cache / "manifest.json",
            "one manifest": self.cache / "manifest.json",
            "record": self.cache / "shards/000001.json",
            "part": self.part / "manifest.json",
            "part record": self.part / "shards/000000.json",
            "quarantine": self.cache / "quarantine.json",
            "ledger": self.ledger,
        }[kind]

    def forge(self, kind: str, value: Any) -> None:
        """Put a changed value into its place."""
        path = self.path(kind)
        if kind in ("manifest", "part"):
            hostile.make_valid(path.parent, value)
        elif kind == "ledger":
            with self.ledger.open("a") as file:
                file.write(f"{json.dumps(value)}\n")
        else:
            hostile.write(path, value)

    def read(self, kind: str) -> Any:
        return self.run() if kind == "ledger" else hostile.read(self.path(kind))

    def ask(self, command: str) -> hostile.Outcome:
        """Run a command on the attacked cache; whatever it does, it does there."""
        words = {"CACHE": self.cache, "DEST": self.dest, "PICTURES": self.pictures}
        args = [words.get(word, word) for word in COMMANDS[command]]
        with hostile.unchanged(self.root, self.cache, self.dest, self.ledger):
            ran = hostile.run(cli, args)
        hostile.assert_one_line(ran)
        return ran


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where examples make their worlds; the home of each is set by `world`."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a disk takes most of the time
    monkeypatch.setenv("FEATCACHE_HOME", "")
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)
    return tmp_path


def world(root: Path, origin: Path, pictures: Path) -> World:
    shutil.rmtree(root / "world", ignore_errors=True)
    made = World(root / "world", origin, pictures)
    os.environ["FEATCACHE_HOME"] = str(made.home)
    return made


def attack(data: st.DataObject, root: Path, origins: dict[str, Path], pictures: Path) -> None:
    """One example: a JSON is changed, and a command reads it."""
    here = world(root, origins[data.draw(st.sampled_from(list(origins)))], pictures)
    kind = data.draw(st.sampled_from(KINDS))
    if data.draw(st.integers(0, 7)):
        here.forge(kind, data.draw(hostile.mutations(here.read(kind))))
    else:
        path = here.path(kind)
        path.write_bytes(data.draw(hostile.raw_bytes(path.read_bytes())))
    here.ask(data.draw(st.sampled_from(list(COMMANDS))))


@settings(max_examples=120, suppress_health_check=CHECKS)
@given(st.data())
def test_no_json_makes_a_command_fail_otherwise_than_in_a_line(
    home: Path, origins: dict[str, Path], pictures: Path, data: st.DataObject
) -> None:
    attack(data, home, origins, pictures)


@pytest.mark.slow
@settings(max_examples=5000, suppress_health_check=CHECKS)
@given(st.data())
def test_no_json_makes_a_command_fail_otherwise_than_in_a_line_at_length(
    home: Path, origins: dict[str, Path], pictures: Path, data: st.DataObject
) -> None:
    attack(data, home, origins, pictures)
