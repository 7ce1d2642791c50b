"""The part of a checkpoint that is the network is found, and the names in it are its own.

Programs put a network's tensors below a name (timm's and open_clip's `state_dict`, MAE's and DeiT's
`model`, DINO's `teacher` beside `student`), and wrappers put theirs before each name: `module.` of
data parallel training, `_orig_mod.` of torch.compile, `backbone.` of DINO's network with a head.
Those are taken off, in any order. Where a checkpoint holds the network twice, as with an average of
its weights (`state_dict_ema`, `model_ema`), the one that is taken is told, and how to take another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

# The averages of weights first, as timm's own loader takes them (timm.models.load_state_dict);
# open_clip's, timm's and DINO's own programs; MAE's and DeiT's; DINO's, of which the teacher is the
# one that is published and evaluated.
_AVERAGED = ("state_dict_ema", "model_ema")
WRAPPERS = (*_AVERAGED, "state_dict", "model", "teacher")
_CHOICES = {"ema": (*_AVERAGED, "ema"), "model": ("model", "state_dict")}
_TAKEN_OFF = "module."  # names without it stay
_HEADED = "backbone."  # what lies beside it is a head
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_SAME = 0.5  # of the names: so many make another part the same network


class NamedState(NamedTuple):
    """Hold the tensors of the network by their own names, and what else the file holds of it."""

    tensors: dict[str, Tensor]
    taken: str  # the part of the file that they are; empty for all of it
    others: tuple[str, ...]  # parts that are the same network again


def entry_of(state: Mapping[str, Tensor], entry: str) -> dict[str, Tensor]:
    """Return the tensors below a name of the file, without it; none where there is no such part."""
    start = entry.rstrip(".") + "."
    return {name.removeprefix(start): value for name, value in state.items() if _is(name, start)}


def chosen_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of a part, where `ema` and `model` stand for what timm's programs call the
    average of the weights and the weights; none where there is no such part."""
    names = _CHOICES.get(part, ())
    return next(filter(None, (entry_of(state, name) for name in (part, *names))), {})


def network_state(state: Mapping[str, Tensor]) -> NamedState:
    """Find the network among a file's tensors. ValueError where two of them get one name; a bare
    tensor has no name and is left out."""
    tensors = {name: value for name, value in state.items() if name}
    taken, others = "", tuple[str, ...]()
    while True:
        before = tensors.keys()
        tensors = _renamed(tensors)
        wrapper = next((w for w in WRAPPERS if any(_is(name, w + ".") for name in tensors)), None)
        if wrapper is not None:
            inner = entry_of(tensors, wrapper)
            others = others or _same_network(tensors, inner, wrapper)
            tensors, taken = inner, f"{taken}.{wrapper}".lstrip(".")
        tensors = entry_of(tensors, _HEADED) or tensors
        if tensors.keys() == before:
            return NamedState(tensors, taken, others)


def _is(name: str, start: str) -> bool:
    return name.startswith(start) and len(name) > len(start)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        own = _own_name(name)
        if own in found:
            raise ValueError(f"two tensors are named {own!r}, with and without a wrapper's prefix")
        found[own] = value
    return found


def _own_name(name: str) -> str:
    for marker in _ANYWHERE:
        name = name.replace(marker, "")
    return name.removeprefix(_TAKEN_OFF)


def _same_network(
    tensors: Mapping[str, Tensor], inner: Mapping[str, Tensor], wrapper: str
) -> tuple[str, ...]:
    """Return the parts beside `wrapper` that hold most of its names."""
    names = {_own_name(name) for name in inner}
    parts: dict[str, set[str]] = {}
    for name in tensors:
        part, _, rest = name.partition(".")
        parts.setdefault(part, set()).add(_own_name(rest))
    return tuple(
        part
        for part, there in sorted(parts.items())
        if part != wrapper and len(names & there) > _SAME * len(names)
    )
