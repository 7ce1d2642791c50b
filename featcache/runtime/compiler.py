"""torch.compile needs a C++ compiler, and Triton on a GPU: asked for before any work is begun."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil

from featcache.errors import UsageError


def check_compiler(device: str) -> None:
    """Raise UsageError where `--compile` would find nothing to compile with on this device."""
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":
            raise UsageError(
                f"--compile: the environment variable {name}=1 turns it off; unset it, or leave "
                "--compile out"
            )
    cuda = device.startswith("cuda")
    if cuda and importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--compile: the package triton is not installed; run `pip install triton`, or leave "
            "--compile out"
        )
    name, others = ("CC", ("gcc", "clang", "cc")) if cuda else ("CXX", ("g++",))
    wanted = tuple(shlex.split(os.environ.get(name, ""))[:1]) or others
    if not any(shutil.which(each) for each in wanted):
        raise UsageError(
            f"--compile needs a compiler: {' or '.join(wanted)} is not on PATH; run `apt-get "
            f"install g++`, name one in the variable {name}, or leave --compile out"
        )


def failure(error: BaseException) -> str | None:
    """Return the line for an error of torch.compile, whose tools can fail at work too; None for any
    other."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    reason = " ".join(str(error).split())[:200]
    return (
        f"torch.compile fails on this machine: {reason}; it needs a working C++ compiler, and on a "
        "GPU triton, a C compiler and Python's headers: mend them, or leave --compile out"
    )
