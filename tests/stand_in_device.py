"""A stand-in for a GPU counts what the host would wait for.

Its tensors lie in the host's memory, and every operation on them passes through here. As on a GPU,
tensors of two devices do not mix; an operation whose result the host needs, or whose shape depends
on values, is a wait; so is a copy that blocks, or comes from memory that is not page-locked. A copy
to the host that does not block can be read once the host has waited for a mark behind it, and not
before. Streams and marks are stand-ins too: one queue each, in which nothing is ever late.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from featcache.runtime import device as devices
from student.targets import buffers

DEVICE = torch.device("cpu", 1)  # no tensor of the host has an index
ATEN = torch.ops.aten
# results that the host needs, and shapes that depend on values
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READS = {"numpy", "tolist", "__array__"}  # of a tensor's memory
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Queue:
    """Counts kernels, and what the host waited for."""

    kernels: int = 0
    syncs: list[str] = field(default_factory=list)  # for all that was queued
    # for a mark: who, and kernels that were queued behind it
    waits: list[tuple[str, int]] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=Counter)  # by stream, the last mark waited for
    pinned: list[Tensor] = field(default_factory=list)  # page-locked memory, kept

    def is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.data_ptr()
        return any(p.data_ptr() <= at < p.data_ptr() + max(p.nbytes, 1) for p in self.pinned)


class Stream:
    """One of the device's queues, by number."""

    def __init__(self, device: Any = None) -> None:
        self.number = next(_numbers)

    def wait_stream(self, other: Stream) -> None:
        """The device waits, not the host."""


_numbers = iter(range(1_000_000))
_current = [Stream()]  # the innermost is last
_queue = Queue()


class Event:
    """A mark in a stream's queue."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at, self.stream = -1, -1

    def record(self, stream: Stream) -> None:
        self.at, self.stream = _queue.kernels, stream.number

    def synchronize(self) -> None:
        _queue.waits.append((_caller(), _queue.kernels - self.at))
        _queue.reached[self.stream] = max(_queue.reached[self.stream], self.at)

    def elapsed_time(self, other: Event) -> float:
        for event in (self, other):
            assert event.at <= _queue.reached[event.stream], "a time that is not known yet"
        return float(other.at - self.at)


def _caller() -> str:
    """Return the function that waits, of the trainer or of a test."""
    frame: Any = sys._getframe(2)
    if frame.f_code.co_qualname == "LateNumbers.read":  # of whom is of interest
        frame = frame.f_back
    return frame.f_code.co_qualname


class OnDevice(Tensor):
    """A tensor on the device: `host` is its memory."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OnItsWay(Tensor):
    """A copy on the host that is there when a mark behind it has been waited for."""

    @staticmethod
    def __new__(cls, values: Tensor) -> OnItsWay:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined]
        made.values = values.clone()
        made.at, made.stream = _queue.kernels, _current[-1].number
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_arrived, args), **tree_map(_arrived, kwargs or {}))


def _arrived(x: Any) -> Any:
    if not isinstance(x, OnItsWay):
        return x
    assert x.at <= _queue.reached[x.stream], "read before the device came to the copy"
    return x.values


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host's memory and say on which device its results are."""
    wrappers: dict[int, OnDevice] = {}
    plain: list[Tensor] = []

    def unwrap(x: Any) -> Any:
        x = _arrived(x)
        if isinstance(x, OnDevice):
            wrappers[id(x.host)] = x
            return x.host
        if isinstance(x, Tensor):
            plain.append(x)
        return x

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else OnDevice(x)

    own = tree_map(unwrap, args)
    named = {key: tree_map(unwrap, value) for key, value in kwargs.items()}
    to = named.get("device")
    if not wrappers and to != DEVICE:
        return func(*own, **named)
    name = func.overloadpacket.__name__
    if name in ("_to_copy", "copy_"):
        arrives = _copy(name, args, named)
        if arrives is not None:
            return arrives
    elif any(each.ndim for each in plain):
        assert name in INDEXED, f"{func}: tensors of two devices"
        _queue.syncs.append("index from the host")
    _note(func, name, own)
    _queue.kernels += 1
    if to == DEVICE:
        named["device"] = torch.device("cpu")
    result = func(*own, **named)
    return result if to is not None and to != DEVICE else tree_map(wrap, result)


def _note(func: Any, name: str, own: Any) -> None:
    """Count an operation that the host waits for."""
    if name in INDEXED:
        indices = [each for each in own[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            _queue.syncs.append("boolean index")
    elif TAGS & set(func.tags):
        _queue.syncs.append(name)


def _copy(name: str, args: Any, named: dict[str, Any]) -> Tensor | None:
    """Count a copy between host and device that the host waits for; return one that it does not
    wait for on its way to the host."""
    if name == "copy_":
        target, source = args[:2]
        late = bool(named.get("non_blocking") or (len(args) > 2 and args[2]))
        arrives = isinstance(target, OnDevice)
    else:
        source, late = args[0], bool(named.get("non_blocking"))
        arrives = (named.get("device") or source.device) == DEVICE
    leaves = isinstance(source, OnDevice)
    if leaves and arrives:
        return None
    if not late:
        _queue.syncs.append("copy to the host" if leaves else "blocking copy")
    elif not leaves and not _queue.is_pinned(source):
        _queue.syncs.append("copy from pageable memory")
    elif leaves and name == "_to_copy":
        return OnItsWay(source.host.to(named.get("dtype") or source.dtype))
    return None


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what reaches no operation: reads of a tensor's memory, and tensors made of numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], OnDevice):
            _queue.syncs.append(name)
            return func(args[0].host.detach(), *args[1:], **kwargs)
        if name in READS:
            return func(_arrived(args[0]), *args[1:], **kwargs)
        device = kwargs.get("device")
        if name in ("tensor", "as_tensor") and device == DEVICE:
            if isinstance(args[0], OnDevice):
                return func(*args, **kwargs)
            _queue.syncs.append("tensor of numbers")
            return OnDevice(func(*args, **{**kwargs, "device": None}))
        return func(*args, **kwargs)


def _to(plain: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places = [a for a in args if isinstance(a, str | torch.device)]
        return (
            _put(module)
            if places and torch.device(places[0]) == DEVICE
            else plain(module, *args, **kwargs)
        )

    return to


def _put(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the device; those that are there stay."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value, OnDevice):
                moved = nn.Parameter(OnDevice(value.detach()), value.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, OnDevice):
                part._buffers[name] = OnDevice(buffer)
    return module


@contextlib.contextmanager
def installed() -> Iterator[Queue]:
    """Let the trainer find the stand-in where it looks for a GPU; yields its queue."""
    global _queue
    _queue = Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "is_gpu", lambda device: device == DEVICE)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _current[-1])
        patch.setattr(torch.cuda, "stream", _stream)
        # not torch.empty itself: torch remembers for good which functions make tensors
        patch.setattr(buffers, "_array", _array(buffers._array))
        patch.setattr(Tensor, "pin_memory", _pin_memory)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(nn.Module, "to", _to(nn.Module.to))
        with _Functions(), _Dispatch():
            yield _queue


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    _current.append(stream)
    try:
        yield
    finally:
        _current.pop()


def _array(plain: Callable[..., Any]) -> Callable[..., Any]:
    def array(shape: tuple[int, ...], dtype: Any, pin: bool) -> Any:
        made = plain(shape, dtype, False)
        if pin:
            _queue.pinned.append(torch.from_numpy(made.reshape(-1).view("u1")))
        return made

    return array


def _pin_memory(tensor: Tensor) -> Tensor:
    made = tensor.clone()
    _queue.pinned.append(made)
    return made
