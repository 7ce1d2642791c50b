"""Teachers by name. One file, one family; this file only finds them.

A family's module declares `NAMES` (what `featcache teachers` lists), optionally `PREFIX` for open-ended names
(`timm:...`), and `load(name, options, weights) -> Teacher`. A spec is `NAME` or `NAME,key=value,...`; the part after
the name goes to the family, typed. Adding a family touches no other file.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import pickle
import pkgutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.errors import UsageError, UserError, near
from featcache.manifest import REGISTERED

Option = int | float | bool | str


@dataclass(frozen=True)
class Row:
    """One line of `featcache teachers`: facts known without building the model."""

    source: str  # library and tag of the registered weights
    input_px: int
    patches: int
    width: int
    depth: int


class Teacher(Protocol):
    """A frozen network in eval mode. B batch, S = input_px, P patches, D width."""

    name: str
    weights: str  # what to give to `load` again: a path, a tag, random:SEED or REGISTERED
    input_px: int
    patches: int
    width: int
    depth: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __call__(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """uint8 images (B, 3, S, S) -> [y_k (B, 1 + P, D) for each 1-based level], attention (B, P) float32."""
        ...

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """gamma (D,), beta (D,), eps () of the final norm, and proj (D, E) where there is one."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def to(self, device: str) -> Any: ...


def modules() -> list[ModuleType]:
    """Every family in this folder."""
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


def rows() -> dict[str, Row]:
    """Name -> facts, for every registered teacher, families in the order of their file names."""
    return {name: row for module in modules() for name, row in module.NAMES.items()}


def parse_options(text: str) -> dict[str, Option]:
    """'img_size=32,drop=0.1,flag=true' -> typed values.

    >>> parse_options("img_size=32,drop=0.1,flag=true,act=gelu")
    {'img_size': 32, 'drop': 0.1, 'flag': True, 'act': 'gelu'}
    """
    options: dict[str, Option] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"option {part!r}: key=value is needed, several are parted by commas")
        options[key] = _typed(value)
    return options


def _typed(text: str) -> Option:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split(spec: str) -> tuple[str, dict[str, Option]]:
    """The name and the typed options of a spec.

    >>> split("timm:NAME,img_size=32"), split("synthetic:levels=5")
    (('timm:NAME', {'img_size': 32}), ('synthetic', {'levels': 5}))
    """
    name, _, options = spec.partition(",")
    head, colon, first = name.partition(":")
    if colon and "=" in first:  # PREFIX:key=value,... without a name
        return head, parse_options(spec.partition(":")[2])
    return name, parse_options(options)


def family(name: str) -> ModuleType:
    """The module that knows `name`; an unknown name is a UsageError that offers near ones."""
    for module in modules():
        if name in module.NAMES or (":" in name and name.partition(":")[0] == getattr(module, "PREFIX", None)):
            return module
    prefixes = [f"{p}:NAME" for module in modules() if (p := getattr(module, "PREFIX", None)) and p not in module.NAMES]
    raise UsageError(f"unknown teacher {name!r}: {near(name, [*rows(), *prefixes])}")


def load(spec: str, weights: str | None = None, device: str = "cpu") -> Teacher:
    """The teacher on `device`, frozen, in eval mode.

    `weights`: None for the registered ones, a file, a tag, or random:SEED.
    """
    name, options = split(spec)
    teacher: Teacher = family(name).load(name, options, None if weights == REGISTERED else weights)
    if isinstance(teacher, nn.Module):
        teacher.eval().requires_grad_(False)
    teacher.name = spec
    return teacher.to(device)


class Tap:
    """Hooks that read a running ViT: y_k after every block, and the last block's input for the attention.

    The library's own forward runs unchanged; blocks must be batch-first. One Tap, one forward at a time.
    """

    def __init__(self, blocks: Sequence[nn.Module], see_last: Callable[[nn.Module, Tensor], None]) -> None:
        self._levels: dict[int, Tensor] = {}
        for k, block in enumerate(blocks, 1):
            block.register_forward_hook(lambda _, __, y, k=k: self._levels.__setitem__(k, y))
        blocks[-1].register_forward_pre_hook(lambda block, inputs: see_last(block, inputs[0]))

    def take(self, levels: Sequence[int]) -> list[Tensor]:
        """y_k (B, T, D) of the 1-based levels; nothing is kept afterwards."""
        out = [self._levels[k] for k in levels]
        self._levels.clear()
        return out


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, S, S) -> float32, normalised by the teacher's own statistics."""
    channel: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    return (images.float() / 255 - torch.tensor(mean, **channel).view(3, 1, 1)) / torch.tensor(std, **channel).view(
        3, 1, 1
    )


def is_random(weights: str) -> bool:
    return weights.startswith("random:")


def build(make: Callable[[], nn.Module], weights: str | None) -> nn.Module:
    """Run a library's constructor under `random:SEED`'s seed (0 otherwise), leaving the global generator as it was."""
    seed = 0
    if weights is not None and is_random(weights):
        text = weights.partition(":")[2]
        if not text.isdecimal():
            raise UsageError(f"--weights {weights!r}: random:SEED needs a whole number, as in random:0")
        seed = int(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def read_state(path: str, what: str) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file without running anything in it (weights only)."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, text, a pickle with code, a TorchScript archive: all are the file's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in reason:
            reason = "it is not a torch file of plain tensors"
        raise UserError(
            f"weights {path!r} for {what} cannot be read: {reason[:160]}; a .safetensors file or a plain torch "
            "state dict is allowed (nothing in a file is ever executed): save the state dict as .safetensors"
        ) from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(
            f"weights {path!r} for {what}: a state dict (name -> tensor) is needed, another object is given"
        )
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str, what: str) -> None:
    """Load strictly; every difference of names or shapes is one line."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if not (missing or extra or shapes):
        model.load_state_dict(state)
        return
    parts = [
        f"{len(missing)} tensors are missing ({missing[0]} ...)" if missing else "",
        f"{len(extra)} are unknown ({extra[0]} ...)" if extra else "",
        *(f"{name} is {tuple(state[name].shape)}, {tuple(own[name].shape)} is needed" for name in sorted(shapes)[:1]),
    ]
    raise UserError(
        f"weights {path!r} do not fit {what}: {', '.join(filter(None, parts))}; give the file of this architecture"
    )


def fetch(get: Callable[[], nn.Module], what: str, tag: str) -> nn.Module:
    """Let a library fetch registered weights; that they cannot be had is one line with the two ways on."""
    logging.disable(logging.CRITICAL)  # the clients' own reports of every retry
    try:
        with _offline_when_unreachable():
            return get()
    except Exception as error:  # hubs raise whatever their clients raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"pretrained weights {tag!r} of {what} are not on this machine and could not be fetched "
            f"({reason[:90]}...); give a local file with --weights FILE, or try the program without them "
            "with --weights random:SEED"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Where the hub's name does not resolve and no proxy is set, let its client use its cache only: it would otherwise
    try each of many file names for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = before or not getproxies()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def weight_hash(teacher: Teacher) -> str:
    """BLAKE2b-128 over names, dtypes, shapes and bytes of the loaded module's state, taken from what really runs.

    The kinds of activation go in too: the same weights under QuickGELU and GELU are two teachers.
    """
    digest = hashlib.blake2b(" ".join(_activations(teacher)).encode(), digest_size=16)
    for name, value in sorted(teacher.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _activations(teacher: Teacher) -> list[str]:
    modules = teacher.modules() if isinstance(teacher, nn.Module) else []
    names = {type(module).__name__ for module in modules}
    return sorted(name for name in names if name.endswith(("GELU", "GELUTanh", "SiLU", "ReLU", "SwiGLU")))


def file_weights(weights: str | None) -> str | None:
    """The path when `weights` names a file that exists; a path that does not exist is a UserError."""
    if weights is None or is_random(weights):
        return None
    if Path(weights).is_file():
        return weights
    if "/" in weights or weights.endswith((".safetensors", ".pt", ".pth", ".bin")):
        raise UserError(f"weights {weights!r}: no such file; give an existing file, a registered tag or random:SEED")
    return None
