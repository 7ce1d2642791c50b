"""JSON files carry a checksum of their own and are replaced atomically.

None holds a time, so the same work gives the same bytes. `replaced` replaces any other file in the
same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UserError, command_line, raise_if_unreadable, short
from featcache.storage.files import files_of
from featcache.storage.owner import is_abandoned, split_temporary, writer_id

CHECKSUM = "checksum"
# a manifest of ImageNet has 150 kB; a million shards would have 100 MB
LARGEST_BYTES = 256 << 20


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return BLAKE2b-128 of the canonical JSON."""
    return hashlib.blake2b(canonical(value), digest_size=16).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write with a checksum of its own, under a temporary name, synced, then renamed into place."""
    write_file(path, _text(value))


def _text(value: Mapping[str, Any]) -> bytes:
    text = json.dumps({**value, CHECKSUM: digest(value)}, sort_keys=True, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is durable or absent."""
    with replaced(path) as temporary:
        temporary.write_bytes(data)
    files_of(path).changed(path)


def create_file(path: Path, data: bytes) -> bool:
    """Write a file where there is none, so that it is durable or absent; returns whether it was
    absent. Of several who do so at once, one is told that it was."""
    absent = files_of(path).create(path, data)
    if absent is not None:
        return absent
    temporary = path.with_name(f".{path.name}.{writer_id()}.tmp")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        if not link_or_create(temporary, path):
            return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def link_or_create(source: Path, path: Path) -> bool:
    """Create `path` with the bytes of `source` by a hard link, which is atomic on shared file
    systems too; where there are none, by exclusive creation. Returns whether it was absent."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            with path.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file at; when the block ends, the file is
    synced and renamed to `path`, and the folder is synced. After an error `path` is as it was and
    nothing is left behind. A disk that takes no more is an OSError, whatever the writer raised.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replaced(path) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> path.read_text(), [each.name for each in path.parent.iterdir()]
    ('whole', ['a.txt'])
    """
    temporary = path.with_name(f".{path.name}.{writer_id()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except Exception as error:
        if number := _disk_fault(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _disk_fault(error: Exception) -> int:
    """Return the number of the system's error that torch.save (RuntimeError) and safetensors hide
    in errors of their own; 0 where there is none."""
    if isinstance(error, OSError | UserError):
        return 0
    inner = error.__context__
    if isinstance(error, RuntimeError) and isinstance(inner, OSError):
        return inner.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def sweep(folder: Path) -> None:
    """Remove temporary files that dead writers left in a folder."""
    for leftover in folder.glob(".*.tmp"):
        if (
            split_temporary(leftover.name)
            and leftover.is_file()
            and not leftover.is_symlink()
            and is_abandoned(leftover)
        ):
            leftover.unlink(missing_ok=True)


def read_json(path: Path, most_bytes: int = LARGEST_BYTES) -> dict[str, Any]:
    """Read the object in a JSON of a cache; a missing, cut or changed file is a UserError that says
    what fixes it."""
    return read_json_crc(path, most_bytes)[0]


def read_json_crc(path: Path, most_bytes: int = LARGEST_BYTES) -> tuple[dict[str, Any], int]:
    """Do the same, and return the crc32c of the file's bytes beside it."""
    try:
        data = _bytes(path, most_bytes)
        value = json.loads(data)
        given = value.pop(CHECKSUM)
        found, as_written = digest(value), _is_as_written(data, value, given)
    except FileNotFoundError as error:
        raise UserError(
            f"{str(path)!r} is missing; run `{_repair(path)}`, or the same `featcache extract` "
            "again"
        ) from error
    except OSError as error:
        raise_if_unreadable(path, error)
        raise UserError(
            f"{str(path)!r} is damaged: {error.strerror}; run `{_repair(path)}`"
        ) from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is damaged: no JSON object with a checksum; run `{_repair(path)}`"
        ) from error
    why = f"its checksum is {short(given)}, its content has {found}" if found != given else ""
    if not why and not as_written:  # the same content in other bytes is not ours either
        why = "its bytes are not those that were written"
    if why:
        raise UserError(f"{str(path)!r} is damaged: {why}; run `{_repair(path)}`")
    return value, crc32c(data)


def _is_as_written(data: bytes, value: Mapping[str, Any], checksum: Any) -> bool:
    """Whether bytes are those of `_text`, but for how far their lines are indented. Lines are
    joined and compared with what the encoder in C gives: the one that indents is in Python, and
    takes most of the time of opening a cache."""
    joined = b"".join([line.lstrip(b" ") for line in data.split(b"\n")])
    whole = {**value, CHECKSUM: checksum}
    text = json.dumps(whole, sort_keys=True, separators=(",", ": "), allow_nan=False)
    return joined == text.encode() and data.endswith(b"}\n")


def _bytes(path: Path, most_bytes: int) -> bytes:
    """Read a regular file that is not larger than any of ours; a pipe would be waited for."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, {most_bytes} are allowed")
    return path.read_bytes()


def advice(path: Path) -> str:
    """Say what fixes a JSON that is none of ours."""
    return f"run `{_repair(path)}`"


def _repair(path: Path) -> str:
    return command_line("featcache", "repair", cache_of(path))


def cache_of(path: Path) -> Path:
    """Return the cache that a JSON lies in: beside the manifest or below shards/, of the cache or
    of what was added to it.

    >>> names = ("c/manifest.json", "c/parts/dino/shards/000000.json")
    >>> [str(cache_of(Path(name))) for name in names]
    ['c', 'c']
    """
    part = path.parent.parent if path.parent.name == "shards" else path.parent
    return part.parent.parent if part.parent.name == "parts" else part


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
