"""States of codecs, manifests of derived caches and stored numbers from an attacker: each command
ends well or with one line, and what is no state decodes nothing.

Checksums and ids are right throughout: nothing but the one change is wrong.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastcrc.crc32 import iscsi
from safetensors.torch import load, save

import featcache
from featcache.cli import cli
from featcache.errors import UserError
from featcache.maintenance import transfer, transfer_plan
from featcache.reading.cache import Cache
from featcache.storage import json_file
from tests import hostile_json as hostile
from tests.conftest import make_photos

TEACHER = "synthetic:levels=3,tokens=4,width=64,size=28"
EXTRACT = ("--teacher", TEACHER, "--views", "2", "--size", "28", "--rows-per-shard", "6")


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures, their cache in fp16, and t4 derived of it; none is changed."""
    root = tmp_path_factory.mktemp("hostile_codecs")
    pictures = make_photos(root / "pictures")
    made = hostile.run(
        cli,
        ("extract", *EXTRACT, "--levels", "1,3", "--images", pictures, "--out", root / "fp16"),
        120,
    )
    assert made.status == 0, made
    derived = hostile.run(cli, ("derive", root / "fp16", root / "t4", "--codec", "t4"), 120)
    assert derived.status == 0, derived
    return root


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def t4(home: Path, origins: Path) -> Path:
    """A copy to be attacked."""
    return Path(shutil.copytree(origins / "t4", home / "odd"))


def ask(*args: object) -> hostile.Outcome:
    """Run a command, which ends well or with one line."""
    ran = hostile.run(cli, args, 60)
    hostile.assert_one_line(ran)
    return ran


def forge(cache: Path, change: Callable[[Any], object]) -> None:
    about = hostile.read(cache / "manifest.json")
    change(about)
    hostile.make_valid(cache, about)


def state_of(cache: Path) -> Path:
    return next(cache.glob("*.t4.safetensors"))


def put_state(cache: Path, data: bytes) -> None:
    """Put other bytes in the place of the state and of its copy."""
    path = state_of(cache)
    for each in (path, cache / "shards/state.copy.safetensors"):
        each.write_bytes(data)
    facts = {"bytes": len(data), "crc32c": f"{iscsi(data):08x}"}
    forge(cache, lambda about: about["files"].update({path.name: facts}))


def everything(cache: Path, dest: Path, pictures: Path) -> Iterator[tuple[str, hostile.Outcome]]:
    """Ask every command that reads a cache of a codec."""
    commands: tuple[tuple[object, ...], ...] = (
        ("info", cache),
        ("info", cache, "--json"),
        ("ls",),
        ("verify", cache),
        ("copy", cache, dest),
        ("copy", cache, dest, "--views", "1"),
        ("convert", cache, dest, "--store", "webdataset"),
        ("derive", cache, dest, "--tokens", "ranked"),
        ("derive", cache, dest, "--codec", "q8"),
        ("repair", cache, "--images", pictures),
        ("gc",),
        ("rm", cache, "--yes"),
    )
    for words in commands:
        shutil.rmtree(dest, ignore_errors=True)
        yield str(words[0]), ask(*words)


# ---------------------------------------------------------------- states


def raw(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def full(like: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full_like(like, value)


def with_first(order: torch.Tensor, value: int) -> torch.Tensor:
    order = order.clone()
    order[:, 0] = value
    return order


Tensors = dict[str, torch.Tensor]
STATES: dict[str, Callable[[Tensors], Tensors]] = {
    "a mean that is not a number": lambda s: {"mean": full(s["mean"], np.nan)},
    "a mean without end": lambda s: {"mean": full(s["mean"], -np.inf)},
    "a mean beyond all levels": lambda s: {"mean": full(s["mean"], 3e38)},
    "a mean in bfloat16": lambda s: {"mean": s["mean"].bfloat16()},
    "a mean in float8": lambda s: {"mean": s["mean"].to(torch.float8_e4m3fn)},
    "means of other widths": lambda s: {"mean": s["mean"][:, :32].contiguous()},
    "no mean, of a huge width": lambda s: {"mean": torch.zeros(0, 2**40)},
    "an order before memory": lambda s: {"order": with_first(s["order"], -1)},
    "an order beyond memory": lambda s: {"order": with_first(s["order"], 10**9)},
    "an order in int64": lambda s: {"order": s["order"].long()},
    "an order of a channel twice": lambda s: {"order": with_first(s["order"], 3)},
    "more turns": lambda s: {"order": s["order"].repeat(2, 1), "signs": s["signs"].repeat(2, 1)},
    "signs of bool": lambda s: {"signs": s["signs"] > 0},
    "signs without a positive": lambda s: {"signs": full(s["signs"], -128)},
    "another table": lambda s: {"table": s["table"].flip(0)},
    "a number": lambda s: {"levels": torch.tensor(3, dtype=torch.int32)},
    "no levels": lambda s: {"levels": torch.zeros(0, dtype=torch.int32)},
    "a level twice, another not": lambda s: {"levels": torch.tensor([3, 3], dtype=torch.int32)},
    "huge levels": lambda s: {"levels": torch.tensor([3, 2**31 - 1], dtype=torch.int32)},
    "a name that a terminal obeys": lambda s: {"\x1b[31m\n": torch.zeros(1)},
}
BYTES = {
    "nothing": b"",
    "half": b"x" * 100,
    "no tensors": raw(b"{}"),
    "a header without end": (2**63).to_bytes(8, "little") + b"{}",
    "a deep header": raw(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "numbers that torch lacks": raw(b'{"mean":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}')
    + b"1",
    "sizes that overflow": raw(
        b'{"mean":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}'
    ),
    "other metadata": raw(b'{"__metadata__":{"a":1}}'),
}


def assert_decodes_nothing(cache: Path, home: Path) -> None:
    with featcache.open(cache) as opened, pytest.raises(UserError, match=r"t4\.safetensors"):
        opened.derive("h", [0], level=3)
    for words in (
        ("verify", cache),
        ("repair", cache, "--images", "nowhere"),
        ("copy", cache, home / "dest", "--views", "1"),
        ("derive", cache, home / "dest", "--tokens", "ranked"),
    ):
        assert ask(*words).status == 1, words
        assert not (home / "dest").exists()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("what", STATES)
def test_a_state_whose_numbers_no_codec_wrote_decodes_nothing(
    t4: Path, home: Path, what: str
) -> None:
    state = load(state_of(t4).read_bytes())
    put_state(t4, save({**state, **STATES[what](state)}))
    assert_decodes_nothing(t4, home)


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_are_no_state_decode_nothing(t4: Path, home: Path, what: str) -> None:
    put_state(t4, BYTES[what])
    assert_decodes_nothing(t4, home)


# ---------------------------------------------------------------- manifests

MEASURED = {"views": 16, "cosine": [1.0] * 2, "mse": [0.1] * 2, "worst": [0.1] * 2,
            "added_loss": [0.1] * 2}  # fmt: skip


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in MEASURED.items() if key != name}


@pytest.mark.parametrize(
    "facts",
    [
        *map(without, MEASURED),
        {**MEASURED, "mse": [0.1]},
        {**MEASURED, "mse": []},
        {**MEASURED, "mse": ["a", "b"]},
        {**MEASURED, "mse": [[0.1], [0.2]]},
        {**MEASURED, "views": -1},
        {"batch_mse": [0.1, 0.1]},
        {"precision": "bf16"},
        {"precision_mse": [0.1, 0.1], "precision_added_loss": [0.1, 0.1]},
        [],
        None,
    ],
    ids=lambda facts: str(facts)[:40],
)
def test_a_part_of_a_measurement_is_no_measurement(t4: Path, facts: Any) -> None:
    forge(t4, lambda about: about["provenance"].update(distortion=facts))
    assert "provenance.distortion" in ask("info", t4).line


@pytest.mark.slow
@pytest.mark.parametrize(
    "facts",
    [{}, MEASURED, {**MEASURED, "mse": [1e300, 1e300], "cosine": [-1e300] * 2},
     {**MEASURED, "batch_mse": [0.1] * 2, "batch_added_loss": [-1.0] * 2}],
)  # fmt: skip
def test_any_whole_measurement_is_told(
    t4: Path, home: Path, origins: Path, facts: dict[str, Any]
) -> None:
    forge(t4, lambda about: about["provenance"].update(distortion=facts))
    for words, ran in everything(t4, home / "dest", origins / "pictures"):
        assert ran.status == 0 or words in ("derive", "repair"), (words, ran)


def files(change: Callable[[str, str, Any], Any]) -> Callable[[Any], None]:
    """Change the list of files, given the state's name, the tail's, and what is noted of each."""

    def forged(about: Any) -> None:
        listed = about["files"]
        state = next(name for name in listed if ".t4." in name)
        tail = next(name for name in listed if name != state)
        about["files"] = change(state, tail, listed)

    return forged


def array(**facts: Any) -> Callable[[Any], None]:
    return lambda about: about["arrays"]["features"].update(facts)


MISFITS: dict[str, Callable[[Any], object]] = {
    "fp16 with a state": lambda m: m["identity"].update(codec="fp16"),
    "q8 of t4's bytes": lambda m: m["identity"].update(codec="q8"),
    "a width without blocks": lambda m: m["identity"]["teacher"].update(width=60),
    "the largest width": lambda m: m["identity"]["teacher"].update(width=1 << 16),
    "fewer bytes of a token": array(item=[2, 5, 10]),
    "no bytes of a token": array(item=[2, 5, 0]),
    "signed bytes": array(dtype="|i1"),
    "no dimension of bytes": array(item=[2, 5], dimensions=["row", "view", "level", "token"]),
    "two states": files(lambda state, tail, f: {**f, "a.t4.safetensors": f[state]}),
    "64 states": files(lambda state, tail, f: {f"{i}.t4.safetensors": f[state] for i in range(64)}),
    "another's state": files(lambda state, tail, f: {tail: f[tail], "$(a).t4.safetensors":
                             f[state]}),
    "two ends of a teacher": files(lambda state, tail, f: {**f, "a.safetensors": f[tail]}),
    "a state that fills the memory": files(
        lambda state, tail, f: {**f, state: {"bytes": 1 << 40, "crc32c": "00000000"}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_a_manifest_that_does_not_fit_its_codec_is_none(t4: Path, what: str) -> None:
    forge(t4, MISFITS[what])
    for command in ("info", "verify", "copy", "derive", "repair", "rm"):
        to = [t4.parent / "dest"] * (command in ("copy", "derive"))
        ran = ask(command, t4, *to)
        assert ran.status == 1
        assert "no manifest as extraction writes it" in ran.line
    assert not (t4.parent / "dest").exists()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("change", [
    lambda m: m["identity"].update(codec="later"),
    files(lambda state, tail, f: {tail: f[tail]}),
    files(lambda state, tail, f: {state: f[state]}),
    files(lambda state, tail, f: {}),
])  # fmt: skip
def test_an_unknown_codec_and_missing_files_are_told_in_a_line(
    t4: Path, home: Path, origins: Path, change: Callable[[Any], object]
) -> None:
    forge(t4, change)
    told = [ran.status for _, ran in everything(t4, home / "dest", origins / "pictures")]
    assert 1 in told


# ---------------------------------------------------------------- parents


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("path", ["--help", "-rf", "x", ".", "~root", "~nobody-here/x", "s3://b/x",
                                  "/a\0b", "/a\n$(b)", "/\x1b[31m", "/'\"$(touch x)`touch x`",
                                  "/\udc80", "/" + "x" * 300, "/x" * 30_000,
                                  "/dev/zero", "FIFO", "ITSELF", "PICTURES"])  # fmt: skip
def test_a_parent_at_a_path_of_any_kind_is_told_or_left_out(
    t4: Path, home: Path, origins: Path, path: str
) -> None:
    """A line that is pasted into a shell names an absolute path, or none."""
    os.mkfifo(home / "fifo")
    places = {"FIFO": home / "fifo", "ITSELF": t4, "PICTURES": origins / "pictures"}
    path = str(places.get(path, path))
    forge(t4, lambda about: about["provenance"].update(derived_from=path))
    (t4 / "shards/000001.json").unlink()
    made_by = json.loads(ask("info", t4, "--json").out)["made_by"]
    if "\0" not in path and len(path) < 300:
        words = bash(made_by)
        assert words[:2] == ["featcache", "derive"]
        assert words[2] == (path if path.startswith("/") else "PARENT")
    ran = ask("repair", t4)
    assert ran.status == 1
    assert hostile.read(t4 / "manifest.json")["identity"]["parent"] in ran.line


def bash(line: str) -> list[str]:
    """The words that a shell makes of a line."""
    ran = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, timeout=20
    )
    return [os.fsdecode(word) for word in ran.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("kind", ["missing", "fifo", "other", "huge"])
def test_a_teachers_end_is_restored_from_that_of_the_parent_alone(
    t4: Path, home: Path, origins: Path, kind: str
) -> None:
    parent = Path(shutil.copytree(origins / "fp16", home / "parent"))
    tail = next(parent.glob("*.safetensors"))
    data = (t4 / tail.name).read_bytes()
    (t4 / tail.name).unlink()
    tail.unlink()
    match kind:
        case "fifo":
            os.mkfifo(tail)
        case "other":
            tail.write_bytes(bytes(len(data)))
        case "huge":
            with tail.open("wb") as file:
                file.truncate(10 << 30)
    assert f"run `featcache repair {parent}` first" in ask("repair", t4, "--parent", parent).line
    assert not (t4 / tail.name).exists()
    tail.unlink(missing_ok=True)
    tail.write_bytes(data)
    assert ask("repair", t4, "--parent", parent).status == 0
    assert (t4 / tail.name).read_bytes() == data


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("which", ["state", "copy"])
@pytest.mark.parametrize("kind", ["fifo", "huge", "link", "folder"])
def test_what_stands_in_the_place_of_a_state_is_no_state(
    t4: Path, home: Path, origins: Path, which: str, kind: str
) -> None:
    path = state_of(t4) if which == "state" else t4 / "shards/state.copy.safetensors"
    data = path.read_bytes()
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "huge":
            with path.open("wb") as file:
                file.truncate(10 << 30)
        case "link":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
            (path / "mine").write_text("mine")
    assert ask("verify", t4).status == 1
    assert ask("derive", t4, home / "dest", "--tokens", "ranked").status == (which == "state")
    ran = ask("repair", t4)
    if kind == "folder":
        assert "is a folder where a file is to be" in ran.line
        assert "holds what featcache did not write" in ask("rm", t4, "--yes").line
        assert (path / "mine").read_text() == "mine"
    else:
        assert ran.status == 0
        assert path.read_bytes() == data
        assert not path.is_symlink()
        assert ask("rm", t4, "--yes").status == 0
        assert not t4.exists()


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Forgery:
    """Changes rows on their way; their checksums are made of what comes out."""

    change: Callable[[dict[str, Any]], None]
    new_state: Any = None

    def apply(self, items: dict[str, Any]) -> dict[str, Any]:
        items = {name: values.copy() for name, values in items.items()}
        self.change(items)
        return items


def rewritten(cache: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    with Cache(cache) as source:
        jobs, _ = transfer_plan.whole_cache_jobs(source, out, transfer_plan.target_like(source))
        forged = [replace(job, as_files=False, change=Forgery(change)) for job in jobs]
        transfer.run(forged, transfer.TransferProgress())
    return out


def put_number(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda items: items["features"].__setitem__((0, 0, 1, 3), value)


def put_scale(value: float) -> Callable[[dict[str, Any]], None]:
    scale = np.frombuffer(np.float32(value).tobytes(), np.uint8)
    return lambda items: items["features"].__setitem__((0, 0, 1, slice(4)), scale)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["fp16", "t4"])
def test_levels_that_are_not_finite_are_told_where_numbers_are_made_of_them(
    home: Path, origins: Path, codec: str, value: float
) -> None:
    change = put_scale(value) if codec == "t4" else put_number(value)
    cache = rewritten(origins / codec, home / "odd", change)
    key = featcache.open(cache).keys[0]
    told = 0
    for command, ran in everything(cache, home / "dest", origins / "pictures"):
        if command in ("copy", "derive") and ran.status and "keeps its levels" not in ran.line:
            assert f"features of {key!r} are not finite" in ran.line
            assert not list((home / "dest").glob("*.q8.safetensors"))
            told += 1
    assert told == {"fp16": 3, "t4": 2}[codec]  # of t4 no other codec is made


@pytest.mark.slow
@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-42, 3e38])
def test_any_finite_scale_is_read(home: Path, origins: Path, value: float) -> None:
    cache = rewritten(origins / "t4", home / "odd", put_scale(value))
    h = featcache.open(cache).derive("h", [0], level=1)
    assert np.isfinite(h[0, 1:]).all() or value == 3e38
    assert all(everything(cache, home / "dest", origins / "pictures"))


def test_other_numbers_that_are_not_finite_are_told(home: Path, origins: Path) -> None:
    def change(items: dict[str, Any]) -> None:
        items["area"][0] = np.nan

    cache = rewritten(origins / "fp16", home / "odd", change)
    assert "area of" in ask("copy", cache, home / "dest", "--views", "1").line


# ---------------------------------------------------------------- in the midst of it


def at_the_second_shard(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> pytest.MonkeyPatch:
    """Do something to the folders when the first of two shards is complete."""
    calls, original = [], transfer.rewrite_shard

    def rewrite(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            act()
        original(*args)

    monkeypatch.setattr(transfer, "rewrite_shard", rewrite)
    return monkeypatch


def test_a_folder_that_is_removed_meanwhile_is_told(
    home: Path, origins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = home / "dest"
    with monkeypatch.context() as patched:
        at_the_second_shard(patched, lambda: shutil.rmtree(dest))
        ran = ask("derive", origins / "fp16", dest, "--codec", "t4")
    assert ran.status == 1
    assert "was moved or removed while it was written to" in ran.line


def test_shards_that_are_removed_meanwhile_are_told(
    home: Path, origins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = home / "dest"
    with monkeypatch.context() as patched:
        at_the_second_shard(patched, (dest / "shards/000000.json").unlink)
        ran = ask("derive", origins / "fp16", dest, "--codec", "t4")
    assert (ran.status, "1 of 2 shards are no longer there" in ran.line) == (1, True)
    assert ask("derive", origins / "fp16", dest, "--codec", "t4").status == 0
    assert ask("verify", dest).status == 0


def test_a_parent_that_changes_meanwhile_is_told(
    home: Path, origins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Path(shutil.copytree(origins / "fp16", home / "parent"))

    def change() -> None:
        for path in parent.glob("shards/000001.zarr/features/c*"):
            with path.open("r+b") as file:  # as it stands, and not another file of its name
                file.write(bytes(path.stat().st_size))

    with monkeypatch.context() as patched:
        at_the_second_shard(patched, change)
        ran = ask("derive", parent, home / "dest", "--codec", "t4")
    assert (ran.status, "checksum differs" in ran.line) == (1, True)
    assert not (home / "dest/shards/000001.json").exists()


def test_no_room_for_a_state_is_a_full_disk(
    home: Path, origins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ("extract", *EXTRACT, "--levels", "1,3", "--codec", "t4",
             "--images", origins / "pictures", "--out", home / "dest")  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(json_file, "create_file", full)
        ran = ask(*words)
    assert ran.status == 1
    assert "0 of 2 shards are complete and kept; make room" in ran.line
    assert ask(*words).status == 0
