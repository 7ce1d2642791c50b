"""The state of a codec is a file beside the manifest, and a copy of it below shards/: without it no
level of the cache can be decoded.

It is made once, by whoever begins the cache, before there is a manifest; all others take it from
there. It names the cache that it was made for, so that one which was left behind is not taken for
another's. L levels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UserError, command_line
from featcache.storage import json_file
from featcache.storage.schema import LARGEST_SIDE_FILE
from featcache.storage.store import SHARDS
from featcache.targets import codec_names

if TYPE_CHECKING:
    from torch import Tensor

COPY = "state.copy.safetensors"  # below shards/
_LEVELS, _CACHE = "levels", "cache"


def needs_state(about: Mapping[str, Any]) -> bool:
    """Tell whether levels of a part are decoded by a state."""
    return bool(about["identity"]["codec"] != codec_names.LOSSLESS)


def ending(about: Mapping[str, Any]) -> str:
    """Return how the name of the state's file ends."""
    return f".{about['identity']['codec']}.safetensors"


def file_name(about: Mapping[str, Any]) -> str:
    """Return the name of the state's file; empty where there is none."""
    if not needs_state(about):
        return ""
    names = [name for name in about["files"] if name.endswith(ending(about))]
    return max(names, key=len, default="")


def tail_name(about: Mapping[str, Any]) -> str:
    """Return the name of the file with the teacher's end; empty where there is none."""
    state = file_name(about)
    return next((name for name in about["files"] if name != state), "")


def pack(state: Mapping[str, Tensor], levels: Sequence[int], cache_id: str) -> bytes:
    """Return the bytes of a state's file."""
    import torch
    from safetensors.torch import save

    numbers = torch.tensor(list(levels), dtype=torch.int32)
    return save({**state, _LEVELS: numbers}, {_CACHE: cache_id})


def unpack(data: bytes, about: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the state of a part's levels, in their order, from the bytes of a file. Raises
    UserError, which names `where`, unless every number is one that decoding may use."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from featcache.targets.codecs import get_codec

    identity = about["identity"]
    try:
        state = load(data)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{where} cannot be read as safetensors: {e}; extract again") from e
    levels = state.pop(_LEVELS, torch.zeros(0))
    if levels.dtype != torch.int32 or levels.ndim != 1 or not levels.numel():
        raise UserError(f"{where}: {_LEVELS!r} is no list of levels; extract again")
    codec, width = get_codec(identity["codec"]), identity["teacher"]["width"]
    if why := codec.state_problem(state, levels.numel(), width):
        raise UserError(f"{where} is no state of codec {identity['codec']}: {why}; extract again")
    at = {level: i for i, level in enumerate(levels.tolist())}
    if lacking := [level for level in identity["levels"] if level not in at]:
        raise UserError(f"{where} says nothing of level {lacking[0]}; extract again")
    rows = torch.tensor([at[level] for level in identity["levels"]])
    return {**state, "mean": state["mean"][rows]}


def cache_of(path: Path) -> str:
    """Return the id of the cache that a state's file was made for; empty where it says none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return str((file.metadata() or {}).get(_CACHE, ""))
    except (SafetensorError, OSError, ValueError, TypeError):
        return ""


def read_file(part: Path, about: Mapping[str, Any]) -> bytes:
    """Read the bytes of a part's state; nothing where its codec has none. Raises UserError where
    they are missing or not those that were written."""
    if not needs_state(about):
        return b""
    name = file_name(about)
    if not name:
        raise UserError(
            f"cache {str(part)!r} is stored in {about['identity']['codec']}, and its manifest "
            "lists no file of its state, without which nothing decodes; extract again"
        )
    path, facts = part / name, about["files"][name]
    if why := problem(path, facts):
        raise UserError(
            f"cache file {path}: {why}; without it nothing decodes: run "
            f"`{command_line('featcache', 'repair', part)}`"
        )
    if not facts["bytes"]:
        raise UserError(f"cache file {path} is empty, and no state of a codec; extract again")
    return path.read_bytes()


def problem(path: Path, facts: Mapping[str, Any]) -> str:
    """Say how a file differs from what the manifest says of it; empty where it does not."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{path.stat().st_size} bytes, {facts['bytes']} recorded"
    return "" if f"{crc32c(path.read_bytes()):08x}" == facts["crc32c"] else "checksum differs"


def read_state(part: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the state that decodes the levels of a part, in their order; empty where its codec has
    none."""
    if not needs_state(about):
        return {}
    data = read_file(part, about)
    return unpack(data, about, f"cache file {part / file_name(about)}")


def copy_of(about: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the copy that is kept of a state among `files`, by its path in the cache."""
    name = file_name(about)
    return {f"{SHARDS}/{COPY}": files[name]} if name in files else {}


def begin(out: Path, about: Mapping[str, Any], name: str, data: bytes) -> bytes:
    """Write the state of a cache that has no manifest yet, unless another process has done so in
    this moment; returns the bytes that are there, whose numbers may differ in their last bits.
    Raises UserError, and writes nothing, where they are no state that decodes."""
    path = out / name
    unpack(data, about, f"the state {name}")
    out.mkdir(parents=True, exist_ok=True)
    if json_file.create_file(path, data):
        return data
    if is_small(path) and cache_of(path) == about["id"]:
        there = path.read_bytes()
        unpack(there, about, str(path))
        return there
    raise UserError(
        f"{str(path)!r} is there, and is no state of the cache that is to be made; give an empty "
        "or new folder"
    )


def is_small(path: Path) -> bool:
    """Tell whether a path is a file no larger than those beside a manifest."""
    return path.is_file() and path.stat().st_size <= LARGEST_SIDE_FILE


class HasState(Protocol):
    """A `Part` as it is read here."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


def read_levels(root: Path, parts: Sequence[HasState], levels: Sequence[int]) -> dict[str, Tensor]:
    """Read the state that decodes these levels of a teacher's parts, in their order; empty where
    the codec has none."""
    import torch

    if not needs_state(parts[0].manifest):
        return {}
    states = [read_state(part.path, part.manifest) for part in parts]
    stored = [part.manifest["identity"]["levels"] for part in parts]
    shared, means = merge(states, stored, root)
    return {**shared, "mean": torch.stack([means[level] for level in levels])}


def merge(
    states: Sequence[Mapping[str, Tensor]], levels: Sequence[Sequence[int]], root: Path
) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Merge the states of one teacher's parts into (what is not of a level, mean of each level).
    Raises UserError where they cannot be of one cache."""
    shared = {name: values for name, values in states[0].items() if name != "mean"}
    means: dict[int, Tensor] = {}
    for state, numbers in zip(states, levels, strict=True):
        same = all(np.array_equal(state[name], values) for name, values in shared.items())
        for level, mean in zip(numbers, state["mean"], strict=True):
            same = same and np.array_equal(means.setdefault(level, mean), mean)
        if not same:
            raise UserError(
                f"cache {str(root)!r}: two of its parts were encoded with different states of one "
                "codec; move what was added last away"
            )
    return shared, means
