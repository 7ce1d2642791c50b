"""Where pictures come from, and the one way they are decoded.

A source is a folder of pictures, a set of webdataset tars, or an FFCV `.beton` (`beton`). It gives every picture a key
(its path below the source without the last suffix), bytes at random access, and labels where there are any. `decode` is
the first half of the pixel path: full decode with Pillow, no draft mode, no EXIF transpose (as torchvision's
ImageFolder), and a named conversion to RGB for every mode. A source that has another pixel path of its own (`replay`)
states it as `pixel_path` and decodes its pictures itself.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand
from PIL import Image

from featcache.errors import IdentityError, UsageError, UserError

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])
ALLOWED = (
    "a folder of pictures (" + " ".join(sorted(SUFFIXES)) + "), "
    "webdataset tars as a path, a glob or a brace pattern ('train-{000000..000009}.tar'), or an FFCV .beton"
)
DECODERS = ("pillow", "ffcv")

# Part of every cache's identity: change what a conversion does and this name must change with it.
PIXEL_PATH = {
    "decoder": "pillow",
    "draft": False,
    "exif_transpose": False,
    "to_rgb": "rgb-1",
    "order": "jitter,crop,resize,flip",
}


class PictureError(Exception):
    """One picture cannot be used; the text says why. Extraction quarantines it, training stops."""


class Source(Protocol):
    """Pictures by number: `keys` in source order, bytes on demand, labels (n,) int64 or None. Safe in threads."""

    @property
    def spec(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def classes(self) -> list[str] | None: ...


@dataclass(frozen=True)
class FolderSource:
    """Picture files below a folder, in the order of their paths; class folders are labels, as in ImageFolder."""

    spec: str
    root: Path
    files: list[str] = field(repr=False)
    keys: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()

    @cached_property
    def classes(self) -> list[str] | None:
        if not all("/" in key for key in self.keys):
            return None
        return sorted({key.split("/", 1)[0] for key in self.keys})

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if self.classes is None:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[key.split("/", 1)[0]] for key in self.keys], np.int64)


@dataclass(frozen=True)
class TarSource:
    """Picture members of webdataset tars, in tar order; a member `KEY.cls` holds the label as a decimal number."""

    spec: str
    tars: list[str]
    keys: list[str] = field(repr=False)
    places: npt.NDArray[np.int64] = field(repr=False)  # (n, 3): tar number, byte offset, bytes
    label_places: dict[str, tuple[int, int, int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        return self._bytes(*(int(x) for x in self.places[index]))

    def _bytes(self, tar: int, offset: int, size: int) -> bytes:
        # One open per read: no handle to share between threads or to lose over a fork, and 10 us beside a decode.
        fd = os.open(self.tars[tar], os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    @property
    def classes(self) -> list[str] | None:
        return None

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if not self.label_places:
            return None
        missing = [key for key in self.keys if key not in self.label_places]
        if missing:
            raise UserError(
                f"labels of {self.spec}: {len(missing)} of {len(self)} pictures have no .cls member, the first is "
                f"{missing[0]!r}; every picture needs one: pack the tars again with pipelines.pack_images"
            )
        return np.array([self._label(key) for key in self.keys], np.int64)

    def _label(self, key: str) -> int:
        text = self._bytes(*self.label_places[key]).decode(errors="replace").strip()
        if not text.isdecimal():
            raise UserError(f"label of {key!r} in {self.spec}: {text[:40]!r} is given, a decimal number is needed")
        return int(text)


class Picture(Protocol):
    """A decoded picture, Pillow's or of a source's own pixel path: what `views.render` takes."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def open_source(spec: str | os.PathLike[str], decoder: str = "pillow") -> Source:
    """The pictures at `spec`. Raises UserError when there are none, or when two pictures have one key."""
    text = os.fspath(spec)
    path = Path(text)
    if decoder != "pillow" and not _is_beton(text):
        raise UsageError(
            f"--decoder {decoder} decodes what FFCV wrote, a .beton; pictures {text!r} go through --decoder pillow: "
            "leave --decoder out, or pack them with pipelines.pack_images SRC OUT.beton"
        )
    if _is_beton(text):
        from featcache.pictures import beton

        source: Source = beton.open_beton(text)
    else:
        source = _open_folder(text, path) if path.is_dir() else _open_tars(text, _expand(text))
    _check_keys(source)
    return through(source, decoder)


def _is_beton(text: str) -> bool:
    return text.endswith(".beton") and not Path(text).is_dir()


# ------------------------------------------------------------ pixel paths


def pixel_path(source: Source) -> dict[str, Any]:
    """How the pixels of a source's views come about."""
    return dict(getattr(source, "pixel_path", PIXEL_PATH))


def picture(source: Source, index: int) -> Any:
    """A decoded `Picture`, by the source's pixel path. Raises PictureError with the decoder's own reason."""
    own = getattr(source, "picture", None)
    return decode(source.read(index)) if own is None else own(index)


def through(source: Source, decoder: str) -> Source:
    """The same pictures through a decoder that can decode them, else through the one they have."""
    from featcache.pictures import beton
    from featcache.views import ffcv_decoder as replay

    if decoder == "ffcv" and isinstance(source, beton.BetonSource):
        return replay.CompiledSource(source)
    return source.beton if decoder == "pillow" and isinstance(source, replay.CompiledSource) else source


def like(source: Source, path: Mapping[str, Any]) -> Source:
    """The same pictures through the pixel path of a cache, where they can go through it."""
    return through(source, path["decoder"])


def check_path(source: Source, path: Mapping[str, Any], what: str) -> None:
    """IdentityError unless pictures go through the pixel path of `what`."""
    here = pixel_path(source)
    if differing := [name for name in {**path, **here} if path.get(name) != here.get(name)]:
        shown = ", ".join(f"{name} is {path.get(name)!r} there, {here.get(name)!r} here" for name in differing[:2])
        raise IdentityError(
            f"{what} has views of another pixel path than {source.spec!r} gives: {shown}; extract and train through "
            f"the same one (--decoder {path.get('decoder')}, on the pictures of the extraction), or extract again"
        )


# ------------------------------------------------------------ folders and tars


def _open_folder(spec: str, root: Path) -> Source:
    files = sorted(
        (Path(directory) / name).relative_to(root).as_posix()
        for directory, _, names in os.walk(root, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )
    tars = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))  # noqa: PTH118,PTH207 (the text is kept as given)
    if not files and tars:
        return _open_tars(spec, tars)
    if not files:
        raise UserError(f"no pictures found in the folder {spec!r}; allowed is {ALLOWED}")
    return FolderSource(spec, root, files, [file[: -len(Path(file).suffix)] for file in files])


def _expand(spec: str) -> list[str]:
    try:
        parts = list(braceexpand(spec))
    except ValueError as error:  # UnbalancedBracesError
        raise UserError(f"pictures {spec!r}: a brace is not closed; allowed is {ALLOWED}") from error
    tars = [path for part in parts for path in (sorted(glob.glob(part)) or [part])]  # noqa: PTH207
    missing = [path for path in tars if not Path(path).is_file()]
    if missing or not tars:
        raise UserError(f"no pictures found: {missing[0] if missing else spec!r} does not exist; allowed is {ALLOWED}")
    return tars


def _open_tars(spec: str, tars: list[str]) -> TarSource:
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: dict[str, tuple[int, int, int]] = {}
    for number, path in enumerate(tars):
        for key, suffix, offset, size in _tar_members(path):
            if f".{suffix.lower()}" in SUFFIXES:
                keys.append(key)
                places.append((number, offset, size))
            elif suffix == "cls":
                labels[key] = (number, offset, size)
    if not keys:
        raise UserError(f"no pictures found in {spec!r}: {len(tars)} tars hold none; allowed is {ALLOWED}")
    return TarSource(spec, tars, keys, np.array(places, np.int64), labels)


def _tar_members(path: str) -> list[tuple[str, str, int, int]]:
    """(key, suffix, offset, bytes) of each file; webdataset's rule: the key ends at the first dot of the file name."""
    members, end = [], 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = unescape(f"{folder}/{stem}" if folder else stem)
                    members.append((key, suffix, member.offset_data, member.size))
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"reading {path!r} as a tar failed: {error}; allowed is {ALLOWED}") from error
    if not _ends(path, end):
        raise UserError(f"{path!r} is cut off: it has no end mark after its last member; fetch or pack it again")
    return members


def _ends(path: str, end: int) -> bool:
    """Whether a block of zeros, a tar's end mark, stands where the last member ends."""
    with Path(path).open("rb") as file:
        file.seek(end)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def escape(key: str) -> str:
    """A key as a tar member's stem: dots of the file name would end the key for webdataset, so they are %2E there."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def unescape(stem: str) -> str:
    """The key back from a tar member's stem.

    >>> unescape(escape("n01/a.b")), escape("n01/a.b")
    ('n01/a.b', 'n01/a%2Eb')
    """
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.replace("%2E", ".").replace("%25", "%")


def _check_keys(source: Source) -> None:
    """Keys are unique UTF-8."""
    odd = next((key for key in source.keys if not _is_utf8(key)), None)
    if odd is not None:
        raise UserError(f"pictures {source.spec!r}: the name {odd!a} is not UTF-8; rename the file")
    if len(set(source.keys)) == len(source):
        return
    seen: set[str] = set()
    double = next(key for key in source.keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise UserError(
        f"pictures {source.spec!r}: the key {double!r} is used by two pictures; a key is the path without its last "
        "suffix and must be unique: rename one of them"
    )


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode(data: bytes) -> Image.Image:
    """The picture as 8-bit RGB, decoded in full. Raises PictureError with the decoder's own reason."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder raises on these bytes, the bytes are at fault
        reason = str(error).strip() or type(error).__name__
        raise PictureError("not a readable picture" if "cannot identify" in reason else reason) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Conversion `rgb-1`: grey is repeated, palettes are looked up, alpha is dropped, CMYK is multiplied out.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour (Pillow's own conversion would clip it to white).
    Raises PictureError for modes without a fixed range (32-bit float).
    """
    mode = picture.mode
    if mode.startswith("I"):
        grey = np.asarray(picture, np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise PictureError(f"integer pixels from {grey.min()} to {grey.max()}: 8 or 16 bit are allowed")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if mode in {"F", "LAB", "HSV"}:
        raise PictureError(f"colour mode {mode} has no fixed range: grey, palette, RGB, RGBA or CMYK are allowed")
    if mode in {"P", "PA"}:  # by way of RGBA: the palette's colours, whatever its transparency is expressed in
        picture = picture.convert("RGBA")
    return picture if mode == "RGB" else picture.convert("RGB")  # which would copy
