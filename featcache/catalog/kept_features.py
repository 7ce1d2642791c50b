"""Features that evaluations keep below `$FEATCACHE_HOME/features` are named, listed and checked.

    features/ID/about.json     what they are of: encoder, pictures, crop; shape, bytes, checksum
    features/ID/features.npy   (n, ...) in numpy's format, rows in the order of the pictures

ID is a digest of what about.json says they are of, so that another weight, picture or crop has
another folder. They can be made again at any time: whoever wants the room removes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from featcache.catalog import home
from featcache.errors import UserError, command_line, counted
from featcache.storage import json_file
from featcache.storage.schema import check

FOLDER = "features"
ABOUT = "about.json"
DATA = "features.npy"
KIND = "kept features"
MOST_BYTES = 16 << 20  # of about.json: it has hundreds, and a dozen for each picture skipped
_LATEST_S = 253402300799.0  # of the year 9999; a file's time may be any number

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]


class About(BaseModel):
    """Holds what about.json says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["kept features"]
    of: dict[str, Any]  # encoder, pictures, rendering, what is kept: ID is its digest
    encoder: Text
    pictures: Text
    count: Count  # pictures
    shape: Annotated[list[Count], Field(min_length=1, max_length=8)]
    dtype: Literal["<f2", "<f4"]
    skipped: list[Count]  # rows of pictures that could not be decoded; zeros
    bytes: Count
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]


def folder() -> Path:
    """Return the folder of all kept features."""
    return home.home() / FOLDER


def items() -> Iterator[Path]:
    """Yield the folders of kept features below home, by name; others are passed over."""
    top = folder()
    if top.is_symlink() or not top.is_dir():
        return
    for path in sorted(top.iterdir()):
        if not path.name.startswith(".") and not path.is_symlink() and _holds_about(path):
            yield path


def _holds_about(path: Path) -> bool:
    try:
        return (path / ABOUT).is_file()
    except OSError as error:  # somebody else's folder
        home.note_passed_over(path, str(error.strerror))
        return False


def read(path: Path) -> About:
    """Read about.json. Raises UserError where it is damaged, or of something else."""
    advice = f"run `{command_line('featcache', 'rm', path)}`: features are made again"
    if (path / ABOUT).is_symlink():
        raise UserError(f"{str(path / ABOUT)!r} is a link; {advice}")
    try:
        found = json_file.read_json(path / ABOUT, MOST_BYTES)
    except UserError as error:
        raise UserError(f"{str(path / ABOUT)!r} is damaged; {advice}") from error
    # the checksum is json_file's, and read_json has taken it out
    check(About, found, path / ABOUT, advice)
    about = About.model_validate(found)
    if json_file.digest(about.of) != path.name:
        raise UserError(
            f"{str(path / ABOUT)!r} is of other features than its folder's name says; {advice}"
        )
    if about.shape[0] != about.count:
        raise UserError(
            f"{str(path / ABOUT)!r} has {counted(about.shape[0], 'row')} for "
            f"{counted(about.count, 'picture')}; {advice}"
        )
    return about


def foreign(path: Path) -> list[Path]:
    """List what lies in a folder of kept features and is none of its files."""
    own = {ABOUT, DATA}
    return sorted(
        each
        for each in path.iterdir()
        if each.name not in own or each.is_symlink() or not each.is_file()
    )


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of kept features as plain data; damaged ones are {path, damaged: why}."""
    try:
        about, used = read(path), (path / ABOUT).stat().st_mtime
    except UserError as error:
        return {"path": str(path), "damaged": str(error)}
    except OSError as error:
        return {"path": str(path), "damaged": f"{error.filename}: {error.strerror}"}
    return {
        "path": str(path),
        "encoder": about.encoder,
        "pictures": about.pictures,
        "count": about.count,
        "what": str(about.of.get("what", ""))[:80],
        "crop": _crop(about.of.get("rendering")),
        "shape": about.shape,
        "bytes": about.bytes,
        "last_used": min(max(used, 0.0), _LATEST_S),
    }


def _crop(rendering: Any) -> str:
    """Say which part of the pictures was looked at; empty for what none of ours says."""
    if not isinstance(rendering, dict):
        return ""
    if rendering.get("crop") == "centre":
        return f"centre {rendering.get('crop_pct')}"[:80]
    return f"view {rendering.get('view')}"[:80]
