"""Accelerate is set up for this process and its device, which decides the precisions that are
allowed; a lack of memory becomes one line.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)

from featcache.errors import UsageError, UserError, counted, one_line
from featcache.runtime.device import pick_device
from student.training import launch_variables

DEVICES = ("cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
STATES: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
_ONE = threading.Lock()


def accelerator(precision: str, device: str | None = None) -> Accelerator:
    """Set up Accelerate for this process; `auto` is bf16 where the GPU has it and fp32
    elsewhere."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: {', '.join(PRECISIONS)} are allowed")
    if device is not None:
        kind = torch.device(pick_device(device)).type
        if kind not in DEVICES:
            raise UsageError(f"--device {device!r}: training runs on {' and '.join(DEVICES)}:N")
        if kind == "cuda":
            torch.cuda.set_device(device)
    cuda = torch.cuda.is_available() and device != "cpu"
    if precision == "fp16" and not cuda:
        raise UsageError(
            "--precision fp16 needs a GPU, this device is a CPU; fp32 and bf16 are allowed here"
        )
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UsageError(
            f"--precision bf16 is not in the hardware of {name}; fp32 and fp16 are allowed here"
        )
    if precision == "auto":
        precision = (
            "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    launch_variables.check(os.environ, precision, on_cpu=not cuda)
    acc = _accelerator("no" if precision == "fp32" else precision, cpu=not cuda)
    sharded = acc.distributed_type == DistributedType.FSDP
    launch_variables.check_processes(os.environ, acc.num_processes, sharded)
    if acc.distributed_type == DistributedType.FSDP:
        if not acc.is_fsdp2:
            raise UsageError(
                "FSDP version 1 is not used here: set fsdp_version: 2 in the Accelerate "
                "configuration"
            )
        # Autocast alone, as without FSDP: its own policy would turn the weights that a recipe reads
        # in fp32 into bf16.
        acc.state.fsdp_plugin.mixed_precision_policy = None
    return acc


def _accelerator(mixed_precision: str, cpu: bool) -> Accelerator:
    """Build Accelerate's own by arguments alone, so that no variable decides in their place."""
    try:
        return Accelerator(
            mixed_precision=mixed_precision,
            cpu=cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
        )
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot join the processes of this run: {one_line(str(error))}; `accelerate launch` "
            "and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: start by "
            "one of them, or unset these variables"
        ) from error


def where(acc: Accelerator) -> str:
    """Say on how many processes and machines a run computes, and on what device this process."""
    device = str(acc.device)
    if acc.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(acc.device)})"
    told = os.environ.get("LOCAL_WORLD_SIZE", "")  # of torchrun and `accelerate launch`
    machines = acc.num_processes // max(int(told), 1) if told.isdecimal() else 1
    many = counted(acc.num_processes, "process", "processes")
    return f"{many} on {f'{machines} machines, ' if machines > 1 else ''}{device}"


def make_deterministic() -> None:
    """Make a GPU give the same bits for the same command from here on, at the price of slower
    kernels; torch refuses an operation that has no such kernel."""
    name, allowed = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
    given = os.environ.setdefault(name, allowed[0])  # before the first call of cuBLAS
    if given not in allowed:
        raise UsageError(
            f"--deterministic: the environment variable {name}={given!r}; {' and '.join(allowed)} "
            "give the same bits again: unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def kernels(*, deterministic: bool) -> Iterator[None]:
    """Make kernels deterministic inside the block, if that is asked for; torch's flags are
    afterwards as they were."""
    asked, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if deterministic:
            make_deterministic()
        yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(asked, warn_only=warns)
            torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Give a run an Accelerate of its own, and a program its own back.

    Accelerate keeps one state a process, which every object of it shares, and refuses another
    precision or device than the first. Its objects of before keep theirs; processes that were
    joined stay joined. Raises UserError where another run of this process is not over: they would
    share torch's generator, and its flags.
    """
    if not _ONE.acquire(blocking=False):
        raise UserError(
            "another training runs in this process, and one at a time is allowed; wait for its "
            "end, or start a process of its own for each"
        )
    before = [kind._shared_state for kind in STATES]
    try:
        for kind in STATES:
            kind._shared_state = type(kind._shared_state)()
        yield
    finally:
        for kind, state in zip(STATES, before, strict=True):
            kind._shared_state = state
        _ONE.release()


@contextlib.contextmanager
def out_of_memory_told(batch_size: int) -> Iterator[None]:
    """Turn a lack of memory, of the GPU or of the host, into one line for the user."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with --batch-size {batch_size}: {_first_line(error)}; give a "
            "smaller --batch-size with --accumulate, --checkpoint-activations, or --precision bf16"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_host_memory(error):
            raise
        raise UserError(
            f"out of host memory with --batch-size {batch_size}; give a smaller --batch-size with "
            "--accumulate, or fewer --workers"
        ) from error


def _is_host_memory(error: BaseException) -> bool:
    """Return whether the host had no memory left."""
    # torch raises a bare RuntimeError for it; only the text tells it from a defect of ours
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(
        error
    )


def _first_line(error: BaseException) -> str:
    """Return the first sentences of torch's message, which says what was asked for and goes on for
    a page."""
    return (
        ". ".join(str(error).splitlines()[0].split(". ")[:2]).rstrip(".")
        if str(error)
        else "no more is known"
    )
