"""The end of a teacher, which a cache keeps beside its manifest, is read and checked.

D width, E width of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, command_line
from featcache.storage import codec_state, manifest

F32 = npt.NDArray[np.float32]


def read_tail(part: Path, about: Mapping[str, Any]) -> dict[str, F32]:
    """Read gamma (D,), beta (D,), rms_gamma (D,), eps (), identity () and proj (D, E), those that
    there are (`targets.derived`). Raises UserError where the file is not as it was written, or
    holds anything else."""
    if problems := manifest.check_files(part, about):
        raise UserError(
            f"cache file {problems[0]}; run `{command_line('featcache', 'repair', part)}`"
        )
    if not codec_state.tail_name(about):
        return {}
    path = part / codec_state.tail_name(about)
    tail = _load(path)
    width = about["identity"]["teacher"]["width"]
    for name, values in tail.items():
        if values.dtype != np.float32 or not _fits(name, values.shape, width):
            raise UserError(
                f"cache file {path}: {name!r} is {values.dtype} {values.shape}; the end of a "
                f"teacher of width {width} is gamma, beta, rms_gamma, eps, identity and proj, "
                "float32: extract again"
            )
        if not np.isfinite(values).all():
            raise UserError(f"cache file {path}: {name!r} is not finite; extract again")
        if name == "eps" and values < 0:
            raise UserError(f"cache file {path}: eps is {values:g}, below 0; extract again")
    return tail


def _load(path: Path) -> dict[str, F32]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (
        SafetensorError,
        AttributeError,  # of a number type that numpy lacks, such as float8
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise UserError(
            f"cache file {path} cannot be read as safetensors: {error}; extract again"
        ) from error


def _fits(name: str, shape: tuple[int, ...], width: int) -> bool:
    match name:
        case "gamma" | "beta" | "rms_gamma":
            return shape == (width,)
        case "eps" | "identity":
            return shape == ()
        case "proj":
            return len(shape) == 2 and shape[0] == width and shape[1] > 0
    return True  # of a user's own teacher; nothing reads it
