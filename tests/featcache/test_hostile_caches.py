"""A cache or a ledger from an attacker: each command ends well or with one line, soon, and touches
nothing but its own folder.

Every JSON of a cache is changed at random places, with right checksums and without, and given to
every command that reads one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fastcrc.crc32 import iscsi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.storage.owner import writer_id
from tests import hostile_json as hostile
from tests.conftest import flip
from tests.hostile_cache import COMMANDS, KINDS, World, make_origins, make_pictures, set_up, world

CHECKS = list(HealthCheck)  # a fixture serves all examples, and some of them are slow


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


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=CHECKS)
@given(st.data())
def test_no_json_makes_a_command_fail_otherwise_than_in_a_line(
    home: Path, origins: dict[str, Path], pictures: Path, data: st.DataObject
) -> None:
    attack(data, home, origins, pictures)


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=CHECKS)
@given(st.data())
def test_no_json_makes_a_command_fail_otherwise_than_in_a_line_at_length(
    home: Path, origins: dict[str, Path], pictures: Path, data: st.DataObject
) -> None:
    attack(data, home, origins, pictures)


# ---------------------------------------------------------------- names


def outside_names(kind: str) -> list[str]:
    """Names that lead from a cache's folder, or from a shard's, to the trap beside them."""
    up = {"manifest": 1, "record": 3}[kind]
    return [
        "../" * up + "trap",
        "../" * (up + 1) + "trap",
        "a/" + "../" * (up + 1) + "trap",
        "../" * up + "new.safetensors",
        "sub/../" + "../" * up + "zarr.json",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["manifest", "record"])
@pytest.mark.parametrize("command", ["copy", "convert", "repair", "add", "extract", "verify"])
def test_a_name_that_leads_outside_is_refused(
    home: Path, origins: dict[str, Path], pictures: Path, kind: str, command: str
) -> None:
    """The file that it names is there, and its checksum is right."""
    for name in [*outside_names(kind), "/ABSOLUTE"]:
        here = world(home, origins["zarr"], pictures)
        value, folder = here.read(kind), here.cache
        if kind == "record":
            folder = here.cache / "shards/000001.zarr"
        name = name.replace("/ABSOLUTE", str(here.root / "trap"))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        target = Path(os.path.normpath(folder / name))
        if not target.exists():
            target.write_text("not yours")
        data = target.read_bytes()
        value["files"][name] = {"bytes": len(data), "crc32c": f"{iscsi(data):08x}"}
        here.forge(kind, value)
        ran = here.ask(command)
        assert target.read_bytes() == data
        assert ran.status == 1 or (kind, command) == ("record", "repair")


def test_a_cache_is_continued_only_with_the_shards_of_its_identity(
    home: Path, origins: dict[str, Path], pictures: Path
) -> None:
    """Shards of other names fit one another, and would be written beside those that are there."""
    here = world(home, origins["zarr"], pictures)
    about = here.read("manifest")
    for shard in about["shards"]:
        shard["name"] = f"{int(shard['name']) + 7:06d}"
    here.forge("manifest", about)
    assert "whose shards are not those of its identity" in here.ask("extract").line
    assert not list(here.cache.glob("shards/000007*"))


# ---------------------------------------------------------------- links


def move_behind_a_link(here: World, folder: Path) -> None:
    """Put a folder outside of the cache, and a link in its place."""
    outside = here.root / "outside" / folder.name
    outside.parent.mkdir(exist_ok=True)
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def lose_record(here: World) -> None:
    (here.cache / "shards/000001.json").unlink()
    (here.part / "shards/000001.json").unlink()


def lose_copy(here: World) -> None:
    (here.cache / "shards/manifest.copy.json").unlink()


def leave_record_inside(here: World) -> None:
    for part in (here.cache, here.part):
        (part / "shards/000000.json").rename(part / "shards/000000.zarr/record.json")


def flip_a_bit(here: World) -> None:
    for part in (here.cache, here.part):
        flip(part / "shards/000000.zarr/crop/c.0.0.0")


def leave_temporary_files(here: World) -> None:
    gone = writer_id().replace(f"-{os.getpid()}-", "-999999999-")
    for folder in (here.cache / "shards", here.part / "shards"):
        (folder / f"000000.zarr.{gone}.tmp").mkdir()
        (folder / f".000000.json.{gone}.tmp").touch()
        (folder / "000000.lease").write_text(gone)
        (folder / "000000.zarr.bad").mkdir()


State = Callable[[World], None]
STATES = (lose_record, lose_copy, leave_record_inside, flip_a_bit, leave_temporary_files)
LINKS = ("shards", "parts", "PART", "PART/shards", "shards/000000.zarr", "shards/000000.zarr/crop")
LIKELY = (  # what each command would write or remove
    (lose_record, "extract"),
    (lose_record, "add"),
    (lose_copy, "repair"),
    (leave_record_inside, "extract"),
    (leave_record_inside, "add"),
    (flip_a_bit, "repair"),
    (leave_temporary_files, "gc"),
    (leave_temporary_files, "rm"),
    (leave_temporary_files, "repair"),
)


def link_and_ask(here: World, link: str, state: State, command: str) -> None:
    state(here)
    part = here.part.relative_to(here.cache).as_posix()
    move_behind_a_link(here, here.cache / link.replace("PART", part))
    here.ask(command)  # which compares what lies outside


@pytest.mark.slow
@pytest.mark.parametrize("link", LINKS)
def test_nothing_behind_a_link_of_a_folder_is_changed(
    home: Path, origins: dict[str, Path], pictures: Path, link: str
) -> None:
    for state, command in LIKELY:
        link_and_ask(world(home, origins["zarr"], pictures), link, state, command)


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("link", LINKS)
def test_nothing_behind_a_link_of_a_folder_is_changed_by_any_command(
    home: Path, origins: dict[str, Path], pictures: Path, link: str, state: State
) -> None:
    """A third of the commands in each case: every one meets every link and every state."""
    first = (LINKS.index(link) + STATES.index(state)) % 3
    for command in list(COMMANDS)[first::3]:
        link_and_ask(world(home, origins["zarr"], pictures), link, state, command)


@pytest.mark.slow
def test_files_that_are_links_are_read_and_copied(
    home: Path, origins: dict[str, Path], pictures: Path
) -> None:
    """As the Hugging Face hub's snapshots and git-annex keep them; the cache itself may be a
    link."""
    here = world(home, origins["zarr"], pictures)
    store = here.root / "blobs"
    store.mkdir()
    for i, path in enumerate(path for path in sorted(here.cache.rglob("*")) if path.is_file()):
        path.rename(store / str(i))
        path.symlink_to(store / str(i))
    moved = here.root / "snapshot"
    here.cache.rename(moved)
    here.cache.symlink_to(moved)
    for command in ("info", "ls", "verify", "copy"):
        assert here.ask(command).status == 0
    assert not any(path.is_symlink() for path in here.dest.rglob("*"))


def test_a_folder_that_cannot_be_read_is_passed_over(
    home: Path, origins: dict[str, Path], pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop of links and a manifest that is a pipe: the sound cache is listed all the same."""
    here = world(home, origins["zarr"], pictures)
    (here.home / "loop").symlink_to("loop")
    (here.home / "pipe").mkdir()
    os.mkfifo(here.home / "pipe/manifest.json")
    ran = here.ask("ls")
    assert ran.status == 0
    assert "home/sound" in ran.out
    assert any("loop" in line for line in caplog.messages)
