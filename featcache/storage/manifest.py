"""What a cache is: its identity, its id, and graded answers to "are these two the same?".

`identity` holds all that the stored numbers depend on, `provenance` what is worth knowing but changes nothing. Every
JSON of a cache carries its own checksum and is replaced atomically; none holds a time, so the same work gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import IdentityError, UserError, raise_if_unreadable

FORMAT = 3
NAME = "manifest.json"
COPY = "manifest.copy.json"  # below shards/: what `repair` restores a damaged manifest from
CHECKSUM = "checksum"
REGISTERED = "registered"  # provenance.weights when none were asked for: those the teacher's name stands for

# The first prefix that fits a field's dotted name is its grade. `fatal`: other numbers; `lossy`: the same numbers, less
# exact; `layout`: the same numbers in other files; `cosmetic`: no effect. What is not listed is fatal.
GRADES = (
    ("identity.codec", "lossy"),
    ("identity.store", "layout"),
    ("identity.rows_per_shard", "layout"),
    ("identity.", "fatal"),
    ("provenance.", "cosmetic"),
)

# The options of `featcache extract` that a field comes from; the first prefix that fits.
OPTIONS = (
    ("identity.teacher.name", "--teacher"),
    ("identity.teacher.weight_hash", "--weights"),
    ("identity.pictures.", "--images"),
    ("identity.rows_per_shard", "--rows-per-shard"),
    *((f"identity.{name}", f"--{name}") for name in ("views", "levels", "order", "codec", "store", "tokens", "keep")),
    ("identity.pixels", "--pixels"),
    ("identity.pixel_path.decoder", "--decoder"),
    *((f"identity.policy.{name}", f"--{name}") for name in ("size", "scale", "ratio", "filter", "flip", "jitter")),
    ("identity.policy.seed", "--seed"),
)
_GIVEN_AS_IS = ("--weights", "--images")  # a field holds their hash, which nobody can type


class Mismatch(NamedTuple):
    field: str
    grade: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.field} ({self.grade}): {self.here!r} here, {self.there!r} there"

    @property
    def cure(self) -> str:
        """What to give `featcache extract` for the cache that is there; empty where no option sets the field.

        >>> Mismatch("identity.levels", "fatal", [12], [11, 12]).cure, Mismatch("identity.keep", "fatal", 58, None).cure
        ('--levels 11,12', 'no --keep')
        """
        option = next((option for prefix, option in OPTIONS if self.field.startswith(prefix)), "")
        if not option:
            return ""
        if option in _GIVEN_AS_IS:
            return f"another {option}"
        if self.there is None:
            return f"no {option}"
        return f"{option} {','.join(map(str, self.there)) if isinstance(self.there, list) else self.there}"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """BLAKE2b-128 of the canonical JSON."""
    return hashlib.blake2b(canonical(value), digest_size=16).hexdigest()


def content(manifest: Mapping[str, Any]) -> str:
    """What the numbers of a shard depend on, wherever it lies: the identity but for pictures, store and shard size."""
    apart = ("pictures", "store", "rows_per_shard")
    return digest({key: value for key, value in manifest["identity"].items() if key not in apart})


def keys_digest(keys: Iterable[str]) -> str:
    """BLAKE2b-128 of the keys in order, each ended by a newline."""
    hasher = hashlib.blake2b(digest_size=16)
    for key in keys:
        hasher.update(key.encode() + b"\n")
    return hasher.hexdigest()


def make(
    identity: dict[str, Any],
    provenance: dict[str, Any],
    arrays: dict[str, Any],
    shards: list[Any],
    files: Mapping[str, bytes],
) -> dict[str, Any]:
    """A manifest; its id is the digest of the identity alone. `files` lie beside it, and are noted with checksums."""
    return {
        "format": FORMAT,
        "id": digest(identity)[:16],
        "identity": identity,
        "provenance": provenance,
        "arrays": arrays,
        "shards": shards,
        "files": {name: {"bytes": len(data), "crc32c": f"{crc32c(data):08x}"} for name, data in files.items()},
    }


def read(cache: Path) -> dict[str, Any]:
    """The manifest of the cache at `cache`; one line says what is wrong when there is none or it is another format."""
    path = cache / NAME
    if not path.is_file() and (cache / "shards" / COPY).is_file():
        raise UserError(f"{str(path)!r} is missing, but its copy is there; run `featcache repair {cache}`")
    if not path.is_file():
        raise UserError(
            f"no cache at {str(cache)!r}: {NAME} is missing; give the folder that `featcache extract` wrote"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"cache {str(cache)!r} has format {manifest.get('format')!r}, this version reads format {FORMAT}; "
            "use the version of featcache that wrote it, or extract again"
        )
    parts = {"id", "identity", "provenance", "arrays", "shards", "files"}
    if not parts <= manifest.keys() or manifest["id"] != digest(manifest["identity"])[:16]:
        raise UserError(f"{str(path)!r} is no manifest as extraction writes it: its id is not that of its identity")
    return manifest


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write with a checksum of its own, under a temporary name, synced, then renamed into place."""
    write_file(path, _text(value))


def _text(value: Mapping[str, Any]) -> bytes:
    text = json.dumps({**value, CHECKSUM: digest(value)}, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def write_file(path: Path, data: bytes) -> None:
    """Durable or absent: a temporary name, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def owner() -> str:
    """Who writes a temporary file: HOST-PID-NONCE; the nonce begins with the process's start time, so that another
    process that gets the same number later is not taken for it."""
    return f"{_host()}-{os.getpid()}-{_started(os.getpid()) or 0:x}x{secrets.token_hex(4)}"


def is_own(name: str) -> bool:
    """Whether HOST-PID-NONCE is a name of this very process."""
    return name.rpartition("x")[0] == owner().rpartition("x")[0]


@lru_cache(1)
def _host() -> str:
    """This machine, or this container of it: process numbers mean the same only within one."""
    try:
        space = hashlib.blake2b(os.readlink("/proc/self/ns/pid").encode(), digest_size=2).hexdigest()  # noqa: PTH115
    except OSError:
        space = "0"
    return f"{socket.gethostname().replace('.', '_')}+{space}"


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it has ended (zombies have), or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def is_here(owner: str) -> bool:
    """Whether the writer HOST-PID-NONCE ran where we run."""
    return owner.rpartition("-")[0].rpartition("-")[0] == _host()


def alive(owner: str) -> bool:
    """Whether the writer HOST-PID-NONCE may still run: another host's is taken to be alive."""
    if not is_here(owner):
        return True
    rest, _, nonce = owner.rpartition("-")
    try:
        pid = int(rest.rpartition("-")[2])
        os.kill(pid, 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return f"{_started(pid) or 0:x}" == nonce.partition("x")[0]


def sweep(folder: Path) -> None:
    """Remove temporary files that dead writers left in a folder."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_file() and not alive(leftover.name.removesuffix(".tmp").rpartition(".")[2]):
            leftover.unlink(missing_ok=True)


def check_files(cache: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files beside the manifest."""
    problems = []
    for name, facts in manifest["files"].items():
        path = cache / name
        data = path.read_bytes() if path.is_file() else None
        if data is None:
            problems.append(f"{path}: missing")
        elif f"{crc32c(data):08x}" != facts["crc32c"]:
            problems.append(f"{path}: checksum differs")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON of a cache; a missing, cut or changed file is a UserError that says what mends it."""
    try:
        data = path.read_bytes()
        value = json.loads(data)
        given = value.pop(CHECKSUM)
        found, text = digest(value), _text(value)
    except FileNotFoundError as error:
        raise UserError(
            f"{str(path)!r} is missing; run `{_repair(path)}`, or the same `featcache extract` again"
        ) from error
    except OSError as error:
        raise_if_unreadable(path, error)
        raise UserError(f"{str(path)!r} is damaged: {error.strerror}; run `{_repair(path)}`") from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is damaged: no JSON object with a checksum; run `{_repair(path)}`") from error
    why = f"its checksum is {given}, its content has {found}" if found != given else ""
    if not why and text != data:  # the same content in other bytes is not ours either
        why = "its bytes are not those that were written"
    if why:
        raise UserError(f"{str(path)!r} is damaged: {why}; run `{_repair(path)}`")
    return value


def _repair(path: Path) -> str:
    return shlex.join(["featcache", "repair", str(cache_of(path))])


def cache_of(path: Path) -> Path:
    """The cache that a JSON lies in: beside the manifest or below shards/, of the cache or of what was added to it.

    >>> [str(cache_of(Path(name))) for name in ("c/manifest.json", "c/parts/dino/shards/000000.json")]
    ['c', 'c']
    """
    part = path.parent.parent if path.parent.name == "shards" else path.parent
    return part.parent.parent if part.parent.name == "parts" else part


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def compare(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Mismatch]:
    """Every differing field of identity and provenance, fatal ones first."""
    ours, theirs = (dict(flat({key: m[key] for key in ("identity", "provenance")})) for m in (here, there))
    found = [
        Mismatch(field, grade(field), ours.get(field), theirs.get(field))
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    ]
    return sorted(found, key=lambda mismatch: ("fatal", "lossy", "layout", "cosmetic").index(mismatch.grade))


def grade(field: str) -> str:
    return next((grade for prefix, grade in GRADES if field.startswith(prefix)), "fatal")


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested objects as dotted names.

    >>> dict(flat({"a": {"b": 1, "c": [2]}, "d": 3}))
    {'a.b': 1, 'a.c': [2], 'd': 3}
    """
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def refuse(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    what: str,
    todo: str,
    grades: Iterable[str],
    *,
    cures: bool = False,
) -> None:
    """Raise IdentityError when the two differ in a field of one of `grades`; the line names the fields and grades, and
    with `cures` the options of `featcache extract` that give what is there."""
    found = [mismatch for mismatch in compare(here, there) if mismatch.grade in set(grades)]
    if found:
        shown = "; ".join(f"{each}, give {each.cure}" if cures and each.cure else str(each) for each in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise IdentityError(f"{what}: {shown}{more}; {todo}")


def is_random(manifest: Mapping[str, Any]) -> bool:
    """Whether the teacher's weights were drawn, not trained; every command that shows the cache says so."""
    return str(manifest["provenance"]["weights"]).startswith("random:")


def title(manifest: Mapping[str, Any], rows: int | None = None, views: int | None = None) -> str:
    """One line for people: teacher, levels, pictures, views, and a warning when the weights are random. `rows` that are
    stored, where they are known, and `views` with those that were added."""
    identity = manifest["identity"]
    note = (
        f"  [RANDOM WEIGHTS {manifest['provenance']['weights']}: no meaning in these features]"
        if is_random(manifest)
        else ""
    )
    return (
        f"{identity['teacher']['name']}  levels {','.join(map(str, identity['levels']))}  "
        f"{counted(identity['pictures']['count'] if rows is None else rows, 'picture')} x "
        f"{counted(views or identity['views'], 'view')}  id {manifest['id']}{note}"
    )


def counted(number: int, noun: str) -> str:
    """'1 view', '2 views'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
