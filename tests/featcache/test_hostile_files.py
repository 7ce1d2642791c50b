"""Keys, the index of tars, the end of a teacher and special files from an attacker: with right
checksums, and none of them what an extraction writes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastcrc.crc32 import iscsi
from safetensors.numpy import load, save

from featcache.errors import UserError
from featcache.reading.cache import Cache
from tests import hostile_json as hostile
from tests.hostile_cache import make_origins, make_pictures, set_up, world


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("hostile") / "pictures")


@pytest.fixture(scope="module")
def origins(pictures: Path) -> dict[str, Path]:
    return make_origins(pictures)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where examples make their worlds."""
    set_up(monkeypatch)
    return tmp_path


def record_file(part: Path, shard: str, store: str, name: str, data: bytes) -> None:
    """Put other bytes into a file of a shard, with right checksums; of a Zarr chunk without its
    last four bytes."""
    path = part / f"shards/{shard}.{store}/{name}"
    crc = iscsi(data)
    path.write_bytes(data + crc.to_bytes(4, "little") if store == "zarr" else data)
    record = hostile.read(part / f"shards/{shard}.json")
    record["files"][name] = {"bytes": path.stat().st_size, "crc32c": f"{crc:08x}"}
    hostile.write(part / f"shards/{shard}.json", record)


def offsets_of(data: bytes) -> list[bytes]:
    """Offsets of keys that are no offsets: too many, too few, falling, negative, beyond the end."""
    good = np.frombuffer(data, "<i8")
    made = [good[:-1], np.append(good, good[-1]), good[::-1], good - 1, good * 10**6, good * 0]
    made += [np.zeros(0, "<i8"), np.array([0, 2**62, -(2**62)]), np.full(7, 2**63 - 1)]
    return [np.ascontiguousarray(each, "<i8").tobytes() for each in made] + [data[:-3]]


READERS = ("info", "verify", "copy", "copy some", "convert", "repair", "add", "extract")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["key_bytes/c.0", "key_offsets/c.0"])
def test_keys_that_are_no_text(
    home: Path, origins: dict[str, Path], pictures: Path, name: str
) -> None:
    data = (origins["zarr"] / f"shards/000001.zarr/{name}").read_bytes()[:-4]
    blobs = [b"\xff" * len(data), data[:-1], data + b"x", "ü".encode() * (len(data) // 2), b""]
    for i, new in enumerate(offsets_of(data) if "offsets" in name else blobs):
        here = world(home, origins["zarr"], pictures)
        record_file(here.cache, "000001", "zarr", name, new)
        ran = here.ask(READERS[i % len(READERS)])
        with contextlib.suppress(UserError), Cache(here.cache) as cache:
            cache.keys.find(list(cache.keys))
        assert ran.status in (0, 1)


def forged_index(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The index of a shard of tars with some numbers or words changed and its checksum made
    anew."""
    tensors = {name: values.copy() for name, values in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["index"])
    change(about, tensors)
    with contextlib.suppress(KeyError):
        crc = iscsi(json.dumps([about["arrays"], tensors["offsets"].shape]).encode())
        for name in ("offsets", "key_offsets", "key"):
            crc = iscsi(tensors[name].tobytes(), crc)
        about["crc32c"] = f"{crc:08x}"
    return bytes(save(tensors, {"index": json.dumps(about)}))


def shift(by: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(about: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["offsets"] = tensors["offsets"] + by

    return change


INDEX_CHANGES: list[Callable[[dict[str, Any], dict[str, Any]], Any]] = [
    *(shift(by) for by in (-(10**9), 10**9, -(2**62), 2**62)),
    lambda about, tensors: about.update(arrays=[]),
    lambda about, tensors: about.update(arrays={"a": 1}),
    lambda about, tensors: about.update(arrays=[["a"]] * len(about["arrays"])),
    lambda about, tensors: about.update(arrays=None),
    lambda about, tensors: about.update(arrays=about["arrays"][::-1]),
    lambda about, tensors: tensors.update(offsets=tensors["offsets"][:, :-1]),
    lambda about, tensors: tensors.update(offsets=tensors["offsets"][:1]),
    lambda about, tensors: tensors.update(offsets=tensors["offsets"].ravel()),
    lambda about, tensors: tensors.update(offsets=tensors["offsets"].astype(np.float64)),
    lambda about, tensors: tensors.update(key_offsets=tensors["key_offsets"][::-1].copy()),
    lambda about, tensors: tensors.update(key_offsets=np.zeros(0, np.int64)),
    lambda about, tensors: tensors.update(
        key_offsets=tensors["key_offsets"][:3], offsets=tensors["offsets"][:, :2].copy()
    ),
    lambda about, tensors: tensors.update(key=np.full_like(tensors["key"], 255)),
    lambda about, tensors: tensors.pop("key"),
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("number", range(len(INDEX_CHANGES)))
def test_an_index_of_tars_that_leads_elsewhere(
    home: Path, origins: dict[str, Path], pictures: Path, number: int
) -> None:
    here = world(home, origins["webdataset"], pictures)
    path = here.cache / "shards/000001.webdataset/index.safetensors"
    new = forged_index(path.read_bytes(), INDEX_CHANGES[number])
    record_file(here.cache, "000001", "webdataset", path.name, new)
    for command in ("info", "verify", ("copy", "copy some", "repair", "add")[number % 4]):
        here.ask(command)
    with contextlib.suppress(UserError), Cache(here.cache) as cache:
        cache.read(np.arange(len(cache)), 1, cache.fields)


TAILS: list[dict[str, Any]] = [
    {},
    {"gamma": np.zeros(8, np.float32)},
    {"gamma": np.zeros(7, np.float32), "beta": np.zeros(8, np.float32)},
    {"gamma": np.zeros((8, 8), np.float32)},
    {"gamma": np.full(8, np.nan, np.float32)},
    {"gamma": np.zeros(8, np.int64)},
    {"eps": np.zeros(3, np.float32)},
    {"rms_gamma": np.ones(7, np.float32), "eps": np.ones((), np.float32)},
    {"rms_gamma": np.ones(8, np.float32)},
    {"identity": np.zeros(3, np.float32)},
    {"proj": np.zeros((8, 0), np.float32)},
    {"proj": np.zeros(8, np.float32)},
]


@pytest.mark.slow
@pytest.mark.parametrize("data", [*map(save, TAILS), b"", b"\xff" * 100, b"{}", bytes(8) + b"{}"])
def test_the_end_of_a_teacher_that_is_none(
    home: Path, origins: dict[str, Path], pictures: Path, data: bytes
) -> None:
    here = world(home, origins["zarr"], pictures)
    about = here.read("manifest")
    name = next(iter(about["files"]))
    (here.cache / name).write_bytes(data)
    about["files"][name] = {"bytes": len(data), "crc32c": f"{iscsi(data):08x}"}
    here.forge("manifest", about)
    for command in ("info", "verify", "copy", "repair"):
        here.ask(command)
    with Cache(here.cache) as cache, contextlib.suppress(UserError):
        cache.derive("f", [0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["manifest.json", "shards/000001.json", "shards/manifest.copy.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_what_is_no_regular_file(
    home: Path, origins: dict[str, Path], pictures: Path, path: str, kind: str
) -> None:
    """A pipe is not waited for, and gigabytes of nothing are not read."""
    for command in ("info", "repair", "copy"):
        here = world(home, origins["zarr"], pictures)
        (here.cache / path).unlink()
        if kind == "pipe":
            os.mkfifo(here.cache / path)
        elif kind == "folder":
            (here.cache / path).mkdir()
        else:
            with (here.cache / path).open("wb") as file:
                file.truncate(3 << 30)
        here.ask(command)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr.json", "key/c.0", "crop/c.0.0.0"])
def test_a_pipe_in_the_place_of_a_shards_file(
    home: Path, origins: dict[str, Path], pictures: Path, name: str
) -> None:
    for command in ("info", "verify", "copy", "repair"):
        here = world(home, origins["zarr"], pictures)
        record = here.read("record")
        record["files"][name] = {"bytes": 0, "crc32c": "00000000"}
        here.forge("record", record)
        (here.cache / "shards/000001.zarr" / name).unlink()
        os.mkfifo(here.cache / "shards/000001.zarr" / name)
        ran = here.ask(command)
        assert ran.status == 1 or command == "repair"
