"""A cache to be attacked, in a home with a sound one and files that are nobody's to touch, and the
commands that are asked about it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from featcache.cli import cli
from featcache.extraction import extend, extract
from featcache.maintenance import transfer
from featcache.maintenance.derive import derive
from featcache.maintenance.derive_plan import Wish
from tests import hostile_json as hostile
from tests.conftest import SYNTHETIC, make_photos, make_plan

WIDE = "synthetic:levels=3,tokens=4,width=64,size=28"  # which the codecs rotate
EXTRACT = ("--teacher", SYNTHETIC, "--views", "2", "--size", "28", "--rows-per-shard", "6")
WHERE = ("--images", "PICTURES", "--out", "CACHE")
COMMANDS: dict[str, tuple[str, ...]] = {
    "info": ("info", "CACHE"),
    "info --json": ("info", "CACHE", "--json"),
    "ls": ("ls",),
    "gc": ("gc", "--yes"),
    "gc --unused": ("gc", "--unused", "0"),
    "index": ("index", "CACHE"),
    "verify": ("verify", "CACHE"),
    "repair": ("repair", "CACHE", "--images", "PICTURES"),
    "copy": ("copy", "CACHE", "DEST"),
    "copy some": ("copy", "CACHE", "DEST", "--views", "1", "--levels", "all"),
    "convert": ("convert", "CACHE", "DEST", "--store", "webdataset"),
    "archive": ("copy", "CACHE", "DEST", "--compress"),
    "derive": ("derive", "CACHE", "DEST", "--tokens", "ranked", "--keep", "1"),
    "derive some": ("derive", "CACHE", "DEST", "--levels", "3", "--views", "1"),
    "format": ("convert", "CACHE", "DEST", "--format", "3"),
    "extract": ("extract", *EXTRACT, "--levels", "1,3", *WHERE),
    "add": ("extract", *EXTRACT, "--add", "--levels", "all", *WHERE),
    "rm": ("rm", "CACHE", "--yes"),
    "show": ("show", "CACHE", "0"),
    "show --json": ("show", "CACHE", "photo1", "--json"),
    "gallery": ("gallery", "CACHE", "--count", "2", "--out", "DEST"),
    "gallery pictures": ("gallery", "CACHE", "--images", "PICTURES", "--out", "DEST"),
}  # fmt: skip
KINDS = ("manifest", "one manifest", "record", "part", "part record", "quarantine", "ledger")
RUN = {
    "time": "2026-01-01T00:00:00Z",
    "command": "train",
    "cache_id": "",
    "recipe": "mae",
    "run": "runs/a",
}


def make_pictures(folder: Path) -> Path:
    make_photos(folder)
    (folder / "bad.png").write_text("no picture")
    return folder


def make_origins(pictures: Path) -> dict[str, Path]:
    """Make a cache of twelve pictures in two shards, one of them in quarantine, with a level added;
    in each store, and derived in a codec."""
    root = pictures.parent
    _extract(pictures, SYNTHETIC, root / "zarr")
    transfer.convert(root / "zarr", root / "webdataset", store="webdataset")
    _extract(pictures, WIDE, root / "wide")
    derive(root / "wide", root / "derived", Wish(codec="t4", tokens="ranked", keep="2"))
    return {name: root / name for name in ("zarr", "webdataset", "derived")}


def _extract(pictures: Path, teacher: str, out: Path) -> None:
    extract.run(make_plan(pictures, teacher, views=2, rows_per_shard=6), out, batch_size=32)
    plan = make_plan(pictures, teacher, views=2, rows_per_shard=6, levels=(1, 2, 3))
    part = extend.plan_part(plan, out)
    assert part is not None
    extract.run(*part, batch_size=32)


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


def world(root: Path, origin: Path, pictures: Path) -> World:
    shutil.rmtree(root / "world", ignore_errors=True)
    made = World(root / "world", origin, pictures)
    os.environ["FEATCACHE_HOME"] = str(made.home)
    return made


def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let examples set the home, and disks be as fast as memory."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setenv("FEATCACHE_HOME", "")
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)
