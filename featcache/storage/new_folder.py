"""A folder of results is written beside its place and renamed there when it is whole: nothing of
anybody's is overwritten, and nothing half-written is left."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import UserError
from featcache.storage import json_file
from featcache.storage.owner import writer_id


def check_new(out: Path) -> None:
    """Raise UserError unless a folder is absent or empty: nothing of anybody's is overwritten."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {str(out)!r} is no folder of its own; give an empty or new folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {str(out)!r} is not empty; give an empty or new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`, for files alone; it is renamed to `out` at the end, and gone
    after an error."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{writer_id()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(out)  # which fails where another has written there meanwhile
        json_file.sync_folder(out.parent)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(out.parent):
            raise  # of what is read, not written
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(
        f"--out {str(out)!r} cannot be written: {error.strerror or error}; give another folder"
    )


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
