"""Environment variables that reach the arithmetic are written down beside its numbers; those of
featcache itself are known by name."""

from __future__ import annotations

import os
import re

# of PyTorch and its compilers, Accelerate, timm, the libraries of matrix products, and what
# processes reduce their gradients with
_NAMES = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|TIMM|XFORMERS"
    r"|CUBLAS|CUBLASLT|CUDNN|NVIDIA_TF32|NCCL|OMP|KMP|MKL|DNNL|ONEDNN|ATEN|OPENBLAS|NPY)_\w+"
)

OWN = ("FEATCACHE_HOME", "FEATCACHE_IMAGES", "FEATCACHE_LEDGERS")


def recorded() -> dict[str, str]:
    """Return those variables that are set, by name, in alphabetical order."""
    return {name: value for name, value in sorted(os.environ.items()) if _NAMES.fullmatch(name)}


def unknown() -> list[str]:
    """Return the names of variables that are set, begin as those of featcache do, and mean nothing
    to it."""
    return sorted(name for name in os.environ if name.startswith("FEATCACHE_") and name not in OWN)
