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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from featcache.errors import UsageError, near
from featcache.models.contract import Teacher
from featcache.models.tokenizer import network_of

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
    if compiled:
        _compile(teacher)
    teacher.running = ExecutionConfig(precision, compiled)  # type: ignore[attr-defined]
    return teacher


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
    switches: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        with torch.autocast(
            device_of(teacher).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST
        ):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
