"""JSON from an attacker: values, mutations, checksums made anew, and what a command may do with it.

    value = read(path)                                # without its checksum
    write(path, data.draw(mutations(value)))    # another value somewhere, a right checksum
    with unchanged(world, cache, dest):         # nothing else below `world` may change
        ran = run(cli, ["info", cache])
    assert_one_line(ran)                        # a line or success: no traceback, no hang

Checksums are made by the format's own words (canonical JSON, BLAKE2b-128), apart from the code that
is tested.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.errors import UserError

Where = tuple[str | int, ...]  # a place in nested JSON

DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]

# names that lead elsewhere, or collide with what a writer calls its own
NAMES = (
    "../trap",
    "../../trap",
    "../../../trap",
    "../../../../trap",
    "..",
    ".",
    "",
    "/",
    "//etc/passwd",
    "/tmp/featcache-trap",
    "a/../../../trap",
    "features/../../../../trap",
    "..\\trap",
    "C:\\trap",
    "C:trap",
    "a\0b",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\u202etxt.exe",
    "x" * 300,
    "/".join("a" * 40),
    "manifest.json",
    "manifest.copy",
    "record.json",
    "shards",
    "parts",
    "quarantine.json",
    ".hidden",
    "000000.lease",
    ".manifest.json.host-1-0x0.tmp",
    "a ",
    "a.",
    "~",
    "~root",
    "$HOME",
    "*",
    "evil.py",
    "./evil.py",
    "\ud800",
    "\udc80",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    1.5,
    1.0,
    -0.0,
    10**9,
    10**18,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    1e300,
    5e-324,
    [],
    {},
    [[]],
    {"": {}},
    [None],
    [1] * 5000,
    ["x"],
    [{}],
    {"a": None},
    {"bytes": -1, "crc32c": ""},
    "zarr",
    "webdataset",
    "fp16",
    "|O8",
    "<f2",
    "<U1000000",
    "V99999999999",
    "x" * 70_000,
    DEEP,
    *NAMES,
)
hostile = st.sampled_from(VALUES)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    return hashlib.blake2b(canonical(value), digest_size=16).hexdigest()


def read(path: Path) -> Any:
    """Return the object in a JSON of a cache, without its checksum."""
    value = json.loads(path.read_text())
    value.pop("checksum", None)
    return value


def as_file(value: Any) -> bytes:
    """A JSON as a cache has it, with a right checksum where it is an object."""
    if isinstance(value, dict):
        value = {**value, "checksum": digest(value)}
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def write(path: Path, value: Any) -> None:
    """Write a JSON as a cache has it."""
    path.write_bytes(as_file(value))


def make_valid(cache: Path, about: Any) -> None:
    """Write a changed manifest and its copy, its id and its records' digests made anew, so that
    nothing but the change is wrong."""
    if isinstance(about, dict) and "identity" in about:
        about["id"] = digest(about["identity"])[:16]
        if isinstance(about["identity"], dict):
            apart = ("pictures", "store", "rows_per_shard")
            content = digest({k: v for k, v in about["identity"].items() if k not in apart})
            for path in (cache / "shards").glob("[0-9]*.json"):
                write(path, {**read(path), "content": content})
    for path in (cache / "manifest.json", cache / "shards/manifest.copy.json"):
        write(path, about)


# ------------------------------------------------------------ mutations


def places(value: Any, here: Where = ()) -> Iterator[Where]:
    """Yield every place in nested JSON; the whole is ()."""
    yield here
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*here, key))


def changed(value: Any, where: Where, new: Any) -> Any:
    """Return a copy with another value at a place."""
    if not where:
        return new
    out = copy.deepcopy(value)
    _parent(out, where)[where[-1]] = new
    return out


def renamed(value: Any, where: Where, name: str) -> Any:
    """Return a copy in which a field has another name; an entry of a list comes twice instead."""
    out = copy.deepcopy(value)
    parent = _parent(out, where)
    if isinstance(parent, dict):
        parent[name] = parent.pop(where[-1])
    else:
        parent.append(parent[where[-1]])
    return out


def removed(value: Any, where: Where) -> Any:
    """Return a copy without what is at a place."""
    out = copy.deepcopy(value)
    del _parent(out, where)[where[-1]]
    return out


def _parent(value: Any, where: Where) -> Any:
    for step in where[:-1]:
        value = value[step]
    return value


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """Change nested JSON at one place, or at two: another value, another name, nothing."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        found = sorted(places(value), key=repr)
        # by depth first: a list of many shards would take nearly all the draws
        depth = draw(st.integers(0, max(map(len, found))))
        where = draw(st.sampled_from([each for each in found if len(each) >= depth]))
        what = draw(st.sampled_from(("value", "value", "value", "name", "nothing", "more")))
        if not where or what == "value":
            value = changed(value, where, draw(hostile))
        elif what == "name":
            value = renamed(value, where, draw(st.sampled_from(NAMES)))
        elif what == "nothing":
            value = removed(value, where)
        elif isinstance(parent := _parent(value, where), dict) and parent:
            name = draw(st.sampled_from((*NAMES, "more")))
            value = changed(value, (*where[:-1], name), draw(hostile))
    return value


@st.composite
def raw_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that are no JSON of ours: cut, changed, something else, without a right checksum."""
    other = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"checksum": 1}', b"1e999")
    cut = draw(st.integers(0, len(data)))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    flipped = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return draw(st.sampled_from((data[:cut], flipped, data + data, *other)))


# ------------------------------------------------------------ what a command may do


class HangError(BaseException):
    """A command took too long; no handler of errors takes it for one."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: the line of its error, else empty; `fault` is a traceback or a hang."""

    status: int
    line: str
    out: str
    fault: BaseException | None


def run(command: click.Command, args: Sequence[object], timeout_s: float = 20.0) -> Outcome:
    """Run a command in this process, and stop it when it takes too long."""
    # in a thread no signal arrives, and pytest runs none
    before = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        result = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=True)
    except HangError as hang:
        return Outcome(-1, "", "", hang)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    error = result.exception
    match error:
        case UserError():
            return Outcome(error.exit_status, str(error), result.stdout, None)
        case None | SystemExit():
            return Outcome(result.exit_code, "", result.output, None)
        case OSError() if error.errno is not None:  # the machine's, which `entry` makes a line of
            return Outcome(1, f"{error.filename}: {error.strerror}", result.stdout, None)
    return Outcome(-1, "", result.output, error)


def _hang(number: int, frame: FrameType | None) -> None:
    raise HangError


def assert_one_line(ran: Outcome) -> None:
    """A command ended well, or with one line that a terminal may show."""
    if ran.fault is not None:
        raise AssertionError(f"traceback: {ran.fault!r}") from ran.fault
    assert "\n" not in ran.line
    assert ran.status in (0, 1, 2, 75)
    assert ran.status == 0 or ran.line or ran.out


def tree(folder: Path, *apart: Path) -> dict[str, tuple[Any, ...]]:
    """Every file, folder and link below a folder but for what lies at `apart`, with its content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        if any(path == each or each in path.parents for each in apart):
            continue
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[str(path)] = ("link", os.readlink(path))  # noqa: PTH115
        elif stat.S_ISREG(status.st_mode):
            found[str(path)] = ("file", hashlib.blake2b(path.read_bytes()).hexdigest())
        else:
            found[str(path)] = ("folder", stat.S_IFMT(status.st_mode))
    return found


@contextlib.contextmanager
def unchanged(world: Path, *apart: Path) -> Iterator[None]:
    """Assert that nothing below `world` changes, but for what lies at `apart`."""
    before = tree(world, *apart)
    yield
    after = tree(world, *apart)
    assert after == before, _difference(before, after)


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return f"changed outside: {names}"


def attack_file(
    path: Path, drawn: st.SearchStrategy[bytes], attack: Callable[[], object], examples: int
) -> None:
    """Attack with drawn bytes in a file's place; the file is put back, whatever happens."""
    before = path.read_bytes()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(drawn)
    def attacked(content: bytes) -> None:
        path.write_bytes(content)
        attack()

    try:
        attacked()
    finally:
        path.write_bytes(before)
