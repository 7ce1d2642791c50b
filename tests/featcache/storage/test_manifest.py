"""Manifests: identity and id, checksums that notice any change, graded answers to "are these two
the same?"."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import IdentityError, UserError
from featcache.storage import identity as storage_identity
from featcache.storage import json_file, manifest
from featcache.storage import owner as storage_owner

IDENTITY = {
    "teacher": {"name": "clip-b16", "weight_hash": "00ff", "patches": 196},
    "levels": [11, 12],
    "codec": "fp16",
    "pictures": {"count": 3, "keys_digest": "aa"},
    "views": 2,
    "store": "zarr",
}
PROVENANCE = {"weights": "registered", "source": "train/"}


def make(**changes: object) -> dict:
    identity, provenance = copy.deepcopy(IDENTITY), copy.deepcopy(PROVENANCE)
    for name, value in changes.items():
        *path, last = name.split("__")
        place: dict = identity if path[:1] != ["provenance"] else provenance
        for step in [p for p in path if p != "provenance"]:
            place = place[step]
        place[last] = value
    return manifest.make(identity, provenance, {}, [], {})


def test_id_is_the_digest_of_the_canonical_identity() -> None:
    text = json.dumps(IDENTITY, sort_keys=True, separators=(",", ":"))
    assert make()["id"] == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16]
    assert (
        manifest.keys_digest(["a", "ü/b"])
        == hashlib.blake2b("a\nü/b\n".encode(), digest_size=16).hexdigest()
    )


def test_names_with_newlines_give_lists_of_their_own() -> None:
    lists = [["a\nb"], ["a", "b"], ["a\n", "b"], ["a", "\nb"], ["a\nb\n"], ["a", "b", ""], [], [""]]
    assert len({manifest.keys_digest(keys) for keys in lists}) == len(lists)


_KEYS = st.lists(st.text(st.sampled_from("ab\n\xff\0/é"), max_size=4), max_size=4)


@pytest.mark.slow
@given(_KEYS, _KEYS)
def test_two_lists_of_pictures_never_share_a_digest(one: list[str], other: list[str]) -> None:
    assert (manifest.keys_digest(one) == manifest.keys_digest(other)) is (one == other)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))))
def test_a_digest_is_that_of_the_lines_where_no_name_has_a_newline(keys: list[str]) -> None:
    """What caches hold already stays true."""
    lines = "".join(f"{key}\n" for key in keys).encode()
    assert manifest.keys_digest(keys) == hashlib.blake2b(lines, digest_size=16).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"teacher__weight_hash": "00fe"},
        {"levels": [12]},
        {"codec": "q8"},
        {"views": 3},
        {"pictures__keys_digest": "ab"},
    ],
)
def test_id_changes_with_everything_the_numbers_depend_on(change: dict) -> None:
    assert make(**change)["id"] != make()["id"]


def test_id_does_not_change_with_where_things_were() -> None:
    assert make(provenance__source="elsewhere/", provenance__weights="w.pt")["id"] == make()["id"]


def test_written_json_comes_back_and_its_bytes_repeat(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        json_file.write_json(tmp_path / name, make())
    assert json_file.read_json(tmp_path / "a.json") == make()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    # nothing temporary stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Every position, every one of two bits: damage, or the same value written otherwise (a bit of
    white space)."""
    path = tmp_path / "manifest.json"
    json_file.write_json(path, make())
    data = path.read_bytes()
    for i in range(len(data)):
        for bit in (0, 6):
            path.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
            told = ""
            try:
                assert json_file.read_json(path) == make()
            except UserError as error:
                told = str(error)
            assert not told or ("manifest.json" in told and "damaged" in told)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '{"format": 1}', '{"checksum": 1}', "\x00\xff"]
)
def test_what_is_no_json_of_ours_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / manifest.NAME
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        json_file.read_json(path)
    with pytest.raises(UserError, match=r"manifest\.json"):
        manifest.read(tmp_path)


def test_no_cache_and_another_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache at"):
        manifest.read(tmp_path / "nothing")
    json_file.write_json(tmp_path / manifest.NAME, {**make(), "format": 99})
    with pytest.raises(
        UserError, match=r"format 99, this version reads formats 3 and 4;.*--upgrade featcache$"
    ):
        manifest.read(tmp_path)


@pytest.mark.parametrize("given", [2, True, "4", 4.0, None, -1, [4]])
def test_what_is_no_later_format_is_not_to_be_waited_for(tmp_path: Path, given: object) -> None:
    json_file.write_json(tmp_path / manifest.NAME, {**make(), "format": given})
    with pytest.raises(UserError, match=r"has format .*formats 3 and 4; extract again"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        ({"featcache": "1.4.0"}, "'featcache>=1.4.0'"),
        ({"featcache": "1.4'; rm -r ~"}, "featcache"),
        ({"featcache": "1.4.0\n"}, "featcache"),
        ({"featcache": 1}, "featcache"),
        ("1.4.0", "featcache"),
    ],
)
def test_a_later_format_names_the_version_that_wrote_it(
    tmp_path: Path, versions: object, wanted: str
) -> None:
    """A text of the file goes onto the line only where it is a version."""
    later = {"format": 5, "provenance": {"versions": versions}, "unheard": "of"}
    json_file.write_json(tmp_path / manifest.NAME, later)
    with pytest.raises(UserError) as caught:
        manifest.read(tmp_path)
    assert str(caught.value).endswith(f"pip install --upgrade {wanted}")


def test_side_files_are_checked(tmp_path: Path) -> None:
    about = manifest.make(IDENTITY, PROVENANCE, {}, [], {"t.safetensors": b"abc", "u": b""})
    assert about["files"]["t.safetensors"] == {
        "bytes": 3,
        "crc32c": "364b3fb7",
    }  # crc32c of "abc", RFC 3720's polynomial
    (tmp_path / "t.safetensors").write_bytes(b"abd")
    problems = manifest.check_files(tmp_path, about)
    assert len(problems) == 2
    assert "t.safetensors: checksum differs" in problems[0]
    assert "u: missing" in problems[1]
    assert make(views=2)["id"] == about["id"]


def test_differences_are_graded_fatal_first() -> None:
    other = make(teacher__weight_hash="1", codec="q8", store="webdataset", provenance__source="x")
    found = storage_identity.compare(make(), other)
    assert [(m.field, m.grade) for m in found] == [
        ("identity.teacher.weight_hash", "fatal"),
        ("identity.codec", "lossy"),
        ("identity.store", "layout"),
        ("provenance.source", "cosmetic"),
    ]
    assert (found[0].here, found[0].there) == ("00ff", "1")
    assert storage_identity.compare(make(), make()) == []


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    other = make()
    other["identity"]["brand_new"] = 1
    assert [(m.field, m.grade, m.here) for m in storage_identity.compare(make(), other)] == [
        ("identity.brand_new", "fatal", None)
    ]


def test_refusal_names_field_grade_and_both_values() -> None:
    other = make(teacher__weight_hash="1", codec="q8", provenance__source="x")
    with pytest.raises(IdentityError) as caught:
        storage_identity.refuse_mismatch(
            make(), other, "the caches differ", "choose one", ("fatal",)
        )
    message = str(caught.value)
    assert "identity.teacher.weight_hash (fatal): '00ff' here, '1' there" in message
    assert message.startswith("the caches differ")
    assert message.endswith("choose one")
    assert "codec" not in message
    storage_identity.refuse_mismatch(
        make(), make(provenance__source="x"), "w", "t", ("fatal", "lossy")
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codec": "q8"}, "'q8' there, give --codec q8;"),
        ({"teacher__weight_hash": "1"}, "'1' there, give another --weights;"),
        ({"pixel_path": "b"}, "'b' there; todo"),  # no option sets it
    ],
    ids=str,
)
def test_a_refusal_names_the_option_that_cures_it(change: dict, told: str) -> None:
    with pytest.raises(IdentityError) as caught:
        storage_identity.refuse_mismatch(
            make(), make(**change), "w", "todo", ("fatal", "lossy", "layout"), show_fixes=True
        )
    assert told in str(caught.value)


def test_every_option_of_a_field_exists() -> None:
    from featcache.commands.extract import command

    known = {name for param in command.params for name in param.opts}
    assert {option for _, option in storage_identity.FIELD_OPTIONS} <= known


def test_title_counts_what_is_stored() -> None:
    about = make(pictures={"count": 12}, views=1)
    assert "  12 pictures x 1 view  id " in manifest.title(about)
    assert "  11 pictures x 3 views  id " in manifest.title(about, 11, 3)


@pytest.mark.parametrize(
    "name", ["manifest.json", "shards/000000.json", "quarantine.json", "parts/p/shards/0.json"]
)
@pytest.mark.parametrize("damage", ["{", "{}", "bits"])
def test_a_damaged_json_names_the_repair_of_its_cache(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = tmp_path / "my cache" / name
    path.parent.mkdir(parents=True)
    json_file.write_json(path, {"a": 1})
    path.write_bytes(
        path.read_bytes().replace(b"1", b"2", 1) if damage == "bits" else damage.encode()
    )
    with pytest.raises(
        UserError, match=rf"is damaged: .*; run `featcache repair '{tmp_path}/my cache'`$"
    ):
        json_file.read_json(path)


def test_random_weights_are_said() -> None:
    drawn = make(provenance__weights="random:3")
    assert manifest.is_random(drawn)
    assert "RANDOM WEIGHTS random:3" in manifest.title(drawn)
    assert not manifest.is_random(make())
    assert "RANDOM" not in manifest.title(make())


@pytest.mark.parametrize(
    ("field", "grade"),
    [
        ("identity.rows_per_shard", "layout"),
        ("identity.store", "layout"),
        ("identity.codec", "lossy"),
        ("identity.tokens", "fatal"),
        ("identity.keep", "fatal"),
        ("identity.policy.seed", "fatal"),
        ("provenance.batch_size", "cosmetic"),
        ("something.new", "fatal"),
    ],
)
def test_every_field_has_a_grade(field: str, grade: str) -> None:
    assert storage_identity.grade(field) == grade


# ---------------------------------------------------------------- who writes


def test_an_owner_is_host_pid_and_nonce() -> None:
    owners = [storage_owner.writer_id() for _ in range(5)]
    assert len(set(owners)) == 5
    for owner in owners:
        host, pid, nonce = owner.rsplit("-", 2)
        assert host.startswith(socket.gethostname().replace(".", "_") + "+")
        assert int(pid) == os.getpid()
        started, _, random = nonce.partition("x")
        assert int(started, 16) == int(
            Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        )
        assert len(random) == 8
        assert storage_owner.is_here(owner)
        assert storage_owner.is_alive(owner)


def test_another_process_with_the_same_number_is_not_taken_for_the_writer() -> None:
    host, pid, nonce = storage_owner.writer_id().rsplit("-", 2)
    started, _, random = nonce.partition("x")
    assert not storage_owner.is_alive(f"{host}-{pid}-{int(started, 16) + 1:x}x{random}")
    assert not storage_owner.is_alive(f"{host}-{pid}-{random}")
    assert storage_owner.is_alive(f"{host}-{pid}-{started}x00000000")


def test_where_the_system_does_not_tell_the_start_a_dead_writer_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where /proc/stat is hidden, as in some sandboxes."""

    def hidden() -> float:
        raise RuntimeError("line 'btime' not found in /proc/stat")

    host, pid, _ = storage_owner.writer_id().rsplit("-", 2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(psutil, "boot_time", hidden)
    assert not storage_owner.is_alive(f"{host}-{ended.pid}-1x00000000")
    assert storage_owner.is_alive(f"{host}-{pid}-1x00000000")
    for number in (0, 10**30):
        assert not storage_owner.is_alive(f"{host}-{number}-1x00000000")


def test_a_writer_that_was_not_told_its_start_is_alive_while_its_process_is() -> None:
    host, pid, _ = storage_owner.writer_id().rsplit("-", 2)
    assert storage_owner.is_alive(f"{host}-{pid}-0x00000000")


@pytest.mark.parametrize("seconds", [-86400.0, 1.0, 0.25])
def test_a_clock_that_is_set_does_not_end_a_writer(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The time of boot moves with it, and psutil's time of a start with that."""
    owner, boot = storage_owner.writer_id(), psutil.boot_time()
    host, pid, nonce = owner.rsplit("-", 2)
    other = f"{host}-{pid}-{int(nonce.partition('x')[0], 16) + 1:x}x00000000"
    started = psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + seconds)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: started + seconds)
    assert storage_owner.is_alive(owner)
    assert not storage_owner.is_alive(other)


def test_a_clock_that_is_set_meanwhile_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two times that are compared."""
    owner, boot, asked = storage_owner.writer_id(), psutil.boot_time(), itertools.count()

    def moved() -> float:
        return boot if next(asked) == 0 else boot + 3600

    started = psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", moved)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: started + 3600)
    assert storage_owner.is_alive(owner)
    assert next(asked) > 3


def test_a_process_whose_start_is_hidden_may_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> float:
        raise PermissionError("/proc/stat")

    owner = storage_owner.writer_id()
    monkeypatch.setattr(psutil, "boot_time", hidden)
    assert storage_owner.is_alive(owner)


def test_a_fork_has_a_start_of_its_own() -> None:
    """The parent's was asked for before, and is kept."""
    storage_owner.writer_id()
    time.sleep(0.03)  # ticks are hundredths of a second
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, storage_owner.writer_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    _, pid, nonce = os.read(read, 1000).decode().rsplit("-", 2)
    os.close(read)
    os.close(write)
    assert int(pid) == child
    own = storage_owner.writer_id().rsplit("-", 1)[1]
    assert int(nonce.partition("x")[0], 16) > int(own.partition("x")[0], 16)


@pytest.mark.parametrize("pid", ["0", "99999999", "x", "", "9" * 30])
def test_no_process_is_no_writer(pid: str) -> None:
    assert not storage_owner.is_alive(f"{storage_owner.writer_id().rsplit('-', 2)[0]}-{pid}-1x2")


@pytest.mark.parametrize(
    "owner", ["other+1234-1-1x2", "host.example+1234-99999999-1x2", "nobody", ""]
)
def test_a_writer_elsewhere_may_be_alive(owner: str) -> None:
    assert not storage_owner.is_here(owner)
    assert storage_owner.is_alive(owner)


def test_dots_and_dashes_of_a_host_do_not_confuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names of temporary files are parted by dots, owners by dashes."""
    storage_owner._host.cache_clear()
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7.rack-1.example.org")
    try:
        owner = storage_owner.writer_id()
        assert "." not in owner
        assert storage_owner.is_alive(owner)
        dead = owner.replace(f"-{os.getpid()}-", "-99999999-")
        for name in (owner, dead):
            (tmp_path / f".manifest.json.{name}.tmp").write_text("half")
        json_file.sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".manifest.json.{owner}.tmp"]
    finally:
        monkeypatch.undo()
        storage_owner._host.cache_clear()


def test_a_zombie_is_no_writer() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    started = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
    owner = f"{storage_owner._host()}-{child}-{started:x}x00000000"
    assert storage_owner.is_alive(owner)
    os.write(write, b"!")
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    try:
        assert not storage_owner.is_alive(owner)
    finally:
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_missing_last_byte_is_noticed(tmp_path: Path, cut: int) -> None:
    """The value is still there, the file is not what was written."""
    json_file.write_json(tmp_path / "a.json", make())
    (tmp_path / "a.json").write_bytes((tmp_path / "a.json").read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"a\.json.*damaged"):
        json_file.read_json(tmp_path / "a.json")
