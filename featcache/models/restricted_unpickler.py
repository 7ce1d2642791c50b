"""A torch file is read without running anything in it.

`torch.load(weights_only=True)` refuses whole modules (the DALL-E encoder), TorchScript archives
(OpenAI's CLIP) and training checkpoints with an argparse namespace in them. Here the pickle is read
by an unpickler that knows three functions of its own (make a tensor, make a parameter, make a
dict); every other name in the file becomes an empty class of ours, which keeps what it is given and
does nothing. No module is ever imported.

Forms: a zip archive (torch.save since 1.6, torch.jit.save) and the older row of pickles followed by
raw storages.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file written before torch 1.6


class InertObject:
    """Stand for any class or function that a file names; being called or given a state, it only
    keeps what it got."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __call__(self, *args: object) -> InertObject:
        return InertObject(*args)

    def __setstate__(self, state: object) -> None:
        self.state = state


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read everything in the file that is a tensor, by its dotted name; a module's own parameters
    come without a prefix.

    Raises ValueError, with a reason, when the file is of neither form.
    """
    return named_tensors(_unpickle(Path(path)))


def named_tensors(root: object) -> dict[str, Tensor]:
    """Return dotted name -> tensor of nested dicts and modules that were read already."""
    try:
        return dict(_tensors(root, ""))
    except RecursionError as error:
        raise ValueError("a container that contains itself") from error


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


def _unpickle(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with path.open("rb") as file:
            return _read_legacy(file, path.stat().st_size)
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # a damaged pickle raises whatever it likes: EOFError, KeyError, struct.error, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _tensors(value: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Walk modules (`_parameters`, `_buffers`, `_modules` add no name), scripted modules and
    dicts."""
    if isinstance(value, Tensor):
        yield prefix, value
        return
    if isinstance(value, InertObject):
        value = getattr(value, "state", None)
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        own = (
            prefix
            if key in ("_parameters", "_buffers", "_modules")
            else f"{prefix}.{key}".lstrip(".")
        )
        yield from _tensors(part, own)


class _Unpickler(pickle.Unpickler):
    """Build tensors and plain containers, and InertObject for the rest. `storage` gives a flat
    tensor for a stored id."""

    def __init__(self, file: IO[bytes], storage: Any) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _tensor
        if module == "torch._utils" and name in (
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        ):
            return _parameter
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return type(name, (InertObject,), {})

    def persistent_load(self, pid: Any) -> Any:
        # the older form keeps a class with its source; only the class is asked for
        if pid[0] == "module":
            return pid[1]
        if pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise ValueError(f"a stored {pid[0]!r} of unknown type")
        return self._storage(*pid[1:])


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """Return a view of a flat storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(value: Tensor, *_: object) -> Tensor:
    return value


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
        if info.filename.startswith((folder + "data/", members[0]))
    ]
    # one that unfolds into more than memory
    if any(info.compress_type != zipfile.ZIP_STORED for info in read):
        raise ValueError("a zip archive with compressed tensors, which torch never writes")
    return members[0]


def _read_zip(archive: zipfile.ZipFile) -> object:
    member = _pickle_member(archive)
    folder = member.removesuffix("data.pkl")
    if (
        folder + "byteorder" in archive.namelist()
        and archive.read(folder + "byteorder") != b"little"
    ):
        raise ValueError("numbers in big-endian order")
    read: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, device: str, count: int, *_: object) -> Tensor:
        if key not in read:
            data = bytearray(archive.read(f"{folder}data/{key}"))
            read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return read[key]

    return _Unpickler(io.BytesIO(archive.read(member)), storage).load()


def _read_legacy(file: IO[bytes], size: int) -> object:
    """Read four pickles (magic number, protocol, machine, the object), one of the storages' keys,
    then count and bytes of each storage."""
    waiting: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, device: str, count: int, *_: object) -> Tensor:
        if count * dtype.itemsize > size:
            raise ValueError("a storage larger than the file")
        return waiting.setdefault(key, torch.empty(count, dtype=dtype))

    if _Unpickler(file, storage).load() != _LEGACY_MAGIC:
        raise ValueError("no torch file")
    _Unpickler(file, storage).load()
    _Unpickler(file, storage).load()
    root = _Unpickler(file, storage).load()
    for key in _Unpickler(file, storage).load():
        count = int.from_bytes(file.read(8), "little")
        flat = waiting[key]
        data = bytearray(file.read(count * flat.dtype.itemsize))
        if count != flat.numel() or len(data) != math.prod((count, flat.dtype.itemsize)):
            raise ValueError("a storage is cut off")
        if count:
            flat.copy_(torch.frombuffer(data, dtype=flat.dtype))
    return root
