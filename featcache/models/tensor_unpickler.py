"""A pickle is read for its tensors, numbers, texts and plain containers; nothing in it is run.

Some functions of ours make a tensor, a parameter or a dict; every other name in a file becomes an
inert object, which keeps what it is given and does nothing. No module is ever imported. Python's
own Unpickler is taken in place of C's, since only there can an instruction be replaced: a key is
never a nest of tuples (to hash one takes time exponential in its depth), no instruction makes room
before it reads, and nothing but an inert object takes a state.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_DIMENSIONS = 64
# elements of a view that repeats those of its storage (stride 0), beyond the storage's own
_REPEATED = 1 << 24


class InertObject:
    """Stand for any class, function or object that a file names; being called or given a state, it
    only keeps what it got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: object = None


# --- instructions ---------------------------------------------------------------------------------


class TensorUnpickler(pickle._Unpickler):
    """Build tensors and plain containers, and InertObject for the rest. `storage` gives a flat
    tensor for a stored id."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # the parent's, of which the library's types say nothing
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], storage: Callable[..., Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return OrderedDict
        if module in ("torch._utils", "torch._tensor") and name in _FUNCTIONS:
            return _FUNCTIONS[name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(dtype := torch.__dict__.get(name), torch.dtype):
            return dtype
        return InertObject(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise ValueError("a stored object of unknown type")
        # the older form keeps a class with its source; only the class is asked for
        if pid[0] == "module":
            return pid[1]
        if pid[0] != "storage" or not isinstance(pid[1], torch.dtype) or len(pid) < 5:
            raise ValueError("a stored object of unknown type")
        dtype, key, _, count, *more = pid[1:]
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage without a name and a size")
        if any(more):  # the older form's view of a part of a storage
            raise ValueError("a view of a storage, which torch no longer writes")
        return self._storage(dtype, key, count)

    def _call(self, function: object, args: object) -> object:
        """Call what a file may call; anything else is an object that keeps nothing."""
        if not isinstance(args, tuple):
            raise ValueError("a call without arguments")
        if function is OrderedDict:
            return OrderedDict(_pairs(args))
        if any(function is known for known in _FUNCTIONS.values()):
            return function(*args)  # type: ignore[operator]
        return InertObject(function.name if isinstance(function, InertObject) else "")

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(self._call(function, args))

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(self._call(cls, args if cls is not OrderedDict else ()))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def _instantiate(self, cls: object, args: object) -> None:
        self.append(self._call(cls, tuple(args)))  # type: ignore[arg-type]

    def load_build(self) -> None:
        """Keep the state of an inert object; nothing else of ours has one to be changed."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, InertObject):
            value.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        made: dict[object, object] = {}
        _set_items(made, items)
        self.append(made)

    def load_append(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(_checked_key, values))

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(_checked_key, values)))

    def load_unknown(self) -> None:
        raise ValueError("an instruction that torch never writes")


_LOADERS = {
    pickle.REDUCE: TensorUnpickler.load_reduce, pickle.NEWOBJ: TensorUnpickler.load_newobj,
    pickle.NEWOBJ_EX: TensorUnpickler.load_newobj_ex, pickle.BUILD: TensorUnpickler.load_build,
    pickle.SETITEM: TensorUnpickler.load_setitem, pickle.SETITEMS: TensorUnpickler.load_setitems,
    pickle.DICT: TensorUnpickler.load_dict, pickle.APPEND: TensorUnpickler.load_append,
    pickle.APPENDS: TensorUnpickler.load_appends, pickle.ADDITEMS: TensorUnpickler.load_additems,
    pickle.FROZENSET: TensorUnpickler.load_frozenset,
    # make room for as many bytes as they say before they read one
    pickle.BYTEARRAY8: TensorUnpickler.load_unknown,
    pickle.NEXT_BUFFER: TensorUnpickler.load_unknown,
    pickle.READONLY_BUFFER: TensorUnpickler.load_unknown,
    # look into this process's own table of classes
    pickle.EXT1: TensorUnpickler.load_unknown, pickle.EXT2: TensorUnpickler.load_unknown,
    pickle.EXT4: TensorUnpickler.load_unknown,
}  # fmt: skip
TensorUnpickler.dispatch.update({code[0]: loader for code, loader in _LOADERS.items()})


def _checked_key(key: object) -> object:
    """Refuse a tuple of tuples as a key: its hash is computed anew for every way into it."""
    if isinstance(key, tuple | frozenset) and any(isinstance(k, tuple | frozenset) for k in key):
        raise ValueError("a key that is a nest of tuples")
    return key


def _pairs(args: tuple[object, ...]) -> list[tuple[object, object]]:
    """Return the items that a dict is made of."""
    items = args[0] if args else []
    if len(args) > 1 or not isinstance(items, list | tuple):
        raise ValueError("a dict of something else than its items")
    for item in items:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise ValueError("a dict of something else than its items")
    return [(_checked_key(key), value) for key, value in items]


def _set_items(target: object, items: list[Any]) -> None:
    if isinstance(target, InertObject):  # a dict of a class of its own, as defaultdict
        if not isinstance(target.state, dict):
            target.state = {}
        target = target.state
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items of something that is no dict")
    for i in range(0, len(items), 2):
        target[_checked_key(items[i])] = items[i + 1]


def _extend(target: object, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, InertObject):
        raise ValueError("items of something that is no list")


# --- tensors --------------------------------------------------------------------------------------


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """Return a view of a flat storage; torch refuses one that reaches beyond it."""
    if not isinstance(storage, Tensor):
        raise ValueError("a tensor without a storage")
    sizes, strides = _whole_numbers(size), _whole_numbers(stride)
    (start,) = _whole_numbers((offset,))
    if math.prod(sizes) > storage.numel() + _REPEATED:
        raise ValueError(f"a view of {math.prod(sizes)} numbers on a storage of {storage.numel()}")
    return storage.as_strided(sizes, strides, start)


def _whole_numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > _DIMENSIONS:
        raise ValueError("a tensor of no shape")
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError("a tensor whose sizes, strides or offset are no whole numbers from 0")
    return tuple(values)


def _tensor_of_dtype(
    storage: object, offset: object, size: object, stride: object,
    requires_grad: object, hooks: object, dtype: object, *_: object,
) -> Tensor:  # fmt: skip
    """Return a view of a storage of bytes as numbers of `dtype`."""
    if not isinstance(storage, Tensor) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a storage or a type")
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(value: object, *_: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError("a parameter that is no tensor")
    return value


def _of_type(function: object, kind: object, args: object, *_: object) -> object:
    """Return a tensor that has attributes of its own, without them."""
    known = any(function is each for each in (_tensor, _tensor_of_dtype, _parameter))
    if not known or not isinstance(args, tuple):
        return InertObject("torch._tensor._rebuild_from_type_v2")
    return function(*args)  # type: ignore[operator]


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "_rebuild_tensor": _tensor, "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_of_dtype, "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter, "_rebuild_from_type_v2": _of_type,
}  # fmt: skip
