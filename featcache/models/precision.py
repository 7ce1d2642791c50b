"""A teacher runs at a chosen precision of its arithmetic, compiled or as it is.

The precision is part of what a cache is, so it travels with the teacher: from the command to the
manifest, and back when rows are recomputed or repaired. `fp32` is IEEE arithmetic, TF32 switched
off in products and convolutions alike (PyTorch leaves it on in cuDNN); who wants it says `tf32`.
`bf16` and `fp16` are autocast; levels are normalised in fp32 whatever they were computed in.
Attention runs through scaled_dot_product_attention: timm and open_clip call it.

Compiling changes no more than the last bits, as another batch size does, so it is noted and not
part of the identity.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from featcache.errors import UsageError, near
from featcache.models.contract import Teacher
from featcache.models.tokenizer import network_of
from featcache.runtime import variables

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "tf32", *_AUTOCAST)
TF32_CAPABILITY = (8, 0)  # Ampere
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

# How far the same pixels may fall from the stored row when they are computed again in a batch of
# another size: per-token relative L2 of features, and largest difference of attention over the
# largest weight. Mantissas have 23, 10, 10 and 7 bits, and some kernels round in another order at
# another batch size.
BOUNDS = {"fp32": (1e-3, 1e-4), "tf32": (1e-2, 1e-2), "fp16": (1e-2, 1e-2), "bf16": (5e-2, 5e-2)}


@dataclass(frozen=True)
class ExecutionConfig:
    """Hold the precision of a teacher's arithmetic and whether it is compiled."""

    precision: str = "fp32"
    compiled: bool = False


def execution_config(teacher: Teacher) -> ExecutionConfig:
    """Return how a teacher is run; fp32 and not compiled where nobody said otherwise."""
    running: ExecutionConfig = getattr(teacher, "running", ExecutionConfig())
    return running


def configure(teacher: Teacher, precision: str = "fp32", compiled: bool = False) -> Teacher:
    """Return the same teacher, which runs so from now on; what cannot be done on its device is a
    UsageError."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: {near(precision, PRECISIONS)}")
    device = device_of(teacher)
    if precision == "tf32" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
    ):
        raise UsageError(
            f"--precision tf32: {device} has no TF32 units; CUDA devices of compute capability 8.0 "
            "or more have them: give --precision fp32"
        )
    if precision != "fp32" and not isinstance(network_of(teacher), nn.Module):
        raise UsageError(
            f"--precision {precision}: teacher {teacher.name!r} is no network; only fp32 is allowed"
        )
    if precision == "fp32" and isinstance(network_of(teacher), nn.Module):
        check_fp32(device)
    if compiled:
        _compile(teacher)
    teacher.running = ExecutionConfig(precision, compiled)  # type: ignore[attr-defined]
    return teacher


def check_fp32(device: torch.device) -> None:
    """Raise UsageError where products or convolutions lose bits of fp32 on this device although
    nobody asked for it: libraries let their own variables overrule what a program sets."""
    value = 1 + 2**-12  # TF32 keeps 10 bits after the point, bf16 7
    with fp32_products("ieee"):
        x = torch.full((64, 64), value, device=device)
        identity = torch.eye(64, device=device)
        product = x @ identity
        convolved = F.conv2d(x[:, :, None, None], identity[:, :, None, None])
    if not bool((product.float() == value).all() & (convolved.float() == value).all()):
        found = ", ".join(f"{name}={text!r}" for name, text in variables.recorded().items())
        raise UsageError(
            f"--precision fp32 cannot be had on {device}: {value} times 1 is not {value} there; a "
            "variable such as NVIDIA_TF32_OVERRIDE overrules what this program sets (set are: "
            f"{found or 'none known'}); unset it, or ask for --precision tf32 or bf16"
        )


def configure_like(teacher: Teacher, identity: Mapping[str, Any]) -> Teacher:
    """Return the teacher, which runs as a cache's identity says it was run."""
    return configure(teacher, identity["teacher"].get("precision", "fp32"))


def _compile(teacher: Teacher) -> None:
    """Compile in place, so that names, weights and their hash stay as they are."""
    network = network_of(teacher)
    if not isinstance(network, nn.Module):
        raise UsageError(f"--compile: teacher {teacher.name!r} is no network; leave it out")
    network.compile()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next batch, for the life of this process.

    It would hand every large block back to the kernel and ask for it again: a ViT-B/16 on a CPU
    spends a sixth of its time on those pages (4.9 s a batch of 32, 4.0 s with them kept). What a
    process holds stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def device_of(teacher: Teacher) -> torch.device:
    """Return the device of a teacher's weights; asked at every batch, and the state_dict of a
    network costs a millisecond."""
    network = network_of(teacher)
    if isinstance(network, nn.Module):
        return next(chain(network.parameters(), network.buffers())).device
    return next(iter(teacher.state_dict().values())).device


@contextmanager
def autocast_for(teacher: Teacher) -> Iterator[None]:
    """Set a teacher's precision while it runs, and afterwards what was set before."""
    precision = execution_config(teacher).precision
    with (
        fp32_products("tf32" if precision == "tf32" else "ieee"),
        torch.autocast(
            device_of(teacher).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST
        ),
    ):
        yield


@contextmanager
def run_as(teacher: Teacher, precision: str) -> Iterator[None]:
    """Let a teacher that is a network run in another precision for a while."""
    before = execution_config(teacher)
    teacher.running = ExecutionConfig(precision, before.compiled)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        teacher.running = before  # type: ignore[attr-defined]


class _Switches:
    """The arithmetic of fp32 products is one state of the process, which threads that run teachers
    share: the last one that leaves sets what was before the first one came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[tuple[object, str]] = []
        self._before: list[str] = []

    @contextmanager
    def set_to(self, arithmetic: str) -> Iterator[None]:
        mine = (object(), arithmetic)
        with self._lock:
            if not self._inside:
                self._before = [switch.fp32_precision for switch in self._all()]
            self._inside.append(mine)
            self._set([arithmetic] * len(self._before))
        try:
            yield
        finally:
            with self._lock:
                self._inside.remove(mine)
                left = self._inside[-1:]
                self._set([left[0][1]] * len(self._before) if left else self._before)

    def _set(self, values: Sequence[str]) -> None:
        for switch, value in zip(self._all(), values, strict=True):
            switch.fp32_precision = value

    @staticmethod
    def _all() -> tuple[Any, ...]:
        return (
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,  # type: ignore[attr-defined]
            torch.backends.cudnn.rnn,
        )


_SWITCHES = _Switches()


def fp32_products(arithmetic: str) -> AbstractContextManager[None]:
    """Let a GPU multiply and convolve fp32 numbers in `ieee` or `tf32` arithmetic, and afterwards
    as it did before."""
    return _SWITCHES.set_to(arithmetic)
