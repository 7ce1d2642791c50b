"""A torch file is read without running anything in it.

`torch.load(weights_only=True)` refuses whole modules (the DALL-E encoder), TorchScript archives
(OpenAI's CLIP) and training checkpoints with an argparse namespace in them; those are read here
too, by `models.tensor_unpickler`. Nor can a file keep this process busy or fill its memory: its
numbers are checked against its size, and parts that are shared are counted as often as they are
met.

Forms: a zip archive (torch.save since 1.6, torch.jit.save) and the older row of pickles followed by
raw storages.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from featcache.models.tensor_unpickler import InertObject, TensorUnpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file written before torch 1.6
_PICKLE_BYTES = 32 << 20  # of instructions; a network of a thousand tensors has 100 KiB
_DEPTH, _PARTS, _NAME = 64, 1_000_000, 1000  # levels, parts and letters of a name that are walked


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read everything in the file that is a tensor, by its dotted name; a module's own parameters
    come without a prefix.

    Raises ValueError, with a reason, when the file is of neither form.
    """
    return named_tensors(load(path))


def load(path: str | Path) -> Any:
    """Read the object in the file: tensors, numbers, texts and plain containers of them, and
    `InertObject` in the place of anything else.

    Raises ValueError, with a reason, when the file is of neither form, or would be read into more
    memory than a few times its size.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive, path.stat().st_size)
        with path.open("rb") as file:
            return _read_legacy(file, path.stat().st_size)
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # a damaged pickle raises whatever it likes: EOFError, KeyError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def named_tensors(root: object) -> dict[str, Tensor]:
    """Return dotted name -> tensor of nested dicts and modules that were read already."""
    found: dict[str, Tensor] = {}
    for count, (name, value) in enumerate(_parts(root, "", 0)):
        if count > _PARTS:
            raise ValueError(f"it unfolds into more than {_PARTS} parts")
        if isinstance(value, Tensor):
            if name in found:
                raise ValueError(f"two tensors are named {name!r}")
            found[name] = value
    return found


def referenced_names(path: str | Path) -> set[str]:
    """Return the classes and functions that a zip archive's pickle names, as `module.name`; nothing
    is built."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(_pickle_member(archive))
    found, strings = set(), [""]
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def _parts(value: object, prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    """Walk modules (`_parameters`, `_buffers`, `_modules` add no name), scripted modules and dicts:
    yield each part met, tensors among them, with its name."""
    yield prefix, value
    if depth > _DEPTH:
        raise ValueError(f"it is nested {_DEPTH} deep, or a container that contains itself")
    if isinstance(value, InertObject):
        if value.name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
            raise ValueError(
                f"{prefix!r} is a tensor of another kind ({value.name.rpartition('.')[2]}: sparse, "
                "quantised or of a class of its own)"
            )
        value = value.state
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        if not isinstance(key, str | int):
            continue
        own = (
            prefix
            if key in ("_parameters", "_buffers", "_modules")
            else f"{prefix}.{key}".lstrip(".")
        )
        if len(own) > _NAME:
            raise ValueError(f"a name of more than {_NAME} letters")
        yield from _parts(part, own, depth + 1)


def _pickle_member(archive: zipfile.ZipFile) -> str:
    members = [
        name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(members) != 1:
        raise ValueError("a zip archive without a data.pkl")
    folder = members[0].removesuffix("data.pkl")
    read = [
        info
        for info in archive.infolist()
        if info.filename.startswith((folder + "data/", folder + "byteorder", members[0]))
    ]
    # one that unfolds into more than memory
    if any(info.compress_type != zipfile.ZIP_STORED for info in read):
        raise ValueError("a zip archive with compressed tensors, which torch never writes")
    if archive.getinfo(members[0]).file_size > _PICKLE_BYTES:
        raise ValueError(f"its data.pkl has more than {_PICKLE_BYTES >> 20} MiB")
    return members[0]


def _read_zip(archive: zipfile.ZipFile, size: int) -> object:
    member = _pickle_member(archive)
    if sum(info.compress_size for info in archive.infolist()) > size:
        raise ValueError("a zip archive whose parts overlap")
    folder = member.removesuffix("data.pkl")
    if (
        folder + "byteorder" in archive.namelist()
        and archive.read(folder + "byteorder") != b"little"
    ):
        raise ValueError("numbers in big-endian order")
    read: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in read:
            data = bytearray(archive.read(f"{folder}data/{key}"))
            read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if read[key].dtype != dtype or read[key].numel() != count:
            raise ValueError("a storage of another size or type than is said")
        return read[key]

    return TensorUnpickler(io.BytesIO(archive.read(member)), storage).load()


class _Instructions:
    """Read a file for an unpickler, which gets no more bytes than a pickle may have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, _PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"its pickles have more than {_PICKLE_BYTES >> 20} MiB")
        return data


def _read_legacy(file: IO[bytes], size: int) -> object:
    """Read four pickles (magic number, protocol, machine, the object), one of the storages' keys,
    then count and bytes of each storage."""
    waiting: dict[str, Tensor] = {}
    left = size

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        nonlocal left
        if key not in waiting:
            left -= count * dtype.itemsize
            if left < 0:
                raise ValueError("a storage larger than the file")
            waiting[key] = torch.empty(count, dtype=dtype)
        if waiting[key].dtype != dtype or waiting[key].numel() != count:
            raise ValueError("a storage of another size or type than is said")
        return waiting[key]

    instructions: Any = _Instructions(file)
    if TensorUnpickler(instructions, storage).load() != _LEGACY_MAGIC:
        raise ValueError("no torch file")
    TensorUnpickler(instructions, storage).load()
    TensorUnpickler(instructions, storage).load()
    root = TensorUnpickler(instructions, storage).load()
    keys = TensorUnpickler(instructions, storage).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(waiting):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        flat = waiting[key]
        if count != flat.numel():
            raise ValueError("a storage is cut off")
        data = bytearray(file.read(count * flat.dtype.itemsize))
        if len(data) != count * flat.dtype.itemsize:
            raise ValueError("a storage is cut off")
        if count:
            flat.copy_(torch.frombuffer(data, dtype=flat.dtype))
    return root
