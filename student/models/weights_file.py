"""A safetensors file holds weights alone, with facts about them as JSON in its metadata; it is
written whole or not at all, and read as a stranger's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featcache.runtime import strict_json
from featcache.runtime.meter import meter
from featcache.storage import json_file

ABOUT = "about"


def write(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write named tensors and what is said of them, durable before an older file goes."""
    own = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    with json_file.replaced(path) as temporary:
        save_file(own, str(temporary), metadata={ABOUT: json.dumps(about)})
        meter.count("bytes_written", temporary.stat().st_size)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return facts and tensors. Raises ValueError with one line for whatever is no such file, or
    holds values that no weights have; OSError where it cannot be read."""
    if path.is_symlink() or not path.is_file():  # a pipe would be waited for
        raise ValueError("no plain file")
    try:
        with safe_open(str(path), "pt") as content:
            about = strict_json.parse_object((content.metadata() or {}).get(ABOUT, ""))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no dictionary
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, value in tensors.items():
        # of quantised ones torch cannot say whether they are finite
        if value.is_complex() or (value.is_floating_point() and value.element_size() < 2):
            raise ValueError(f"{name[:80]!r} is {value.dtype}, which no weights are")
        if not bool(value.isfinite().all()):
            raise ValueError("it holds values that are not finite")
    return about, tensors
