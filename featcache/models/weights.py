"""Weights of a library's model are loaded: from a file, from the library's hub, or from this
machine.

A file is .safetensors, a torch state dict (bare, or a part of a checkpoint: `models.state_names`),
a whole pickled module or a TorchScript archive; nothing in it is ever executed. What does not fit a
model is told in one line.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, hub, nn

from featcache.errors import UsageError, UserError
from featcache.models import foreign_layouts, restricted_unpickler, transformers_folder
from featcache.models.contract import Teacher, Tokenizer
from featcache.models.state_names import chosen_part, network_state
from featcache.models.tokenizer import network_of
from featcache.runtime.numbers import is_whole

Got = TypeVar("Got")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".pkl")
_LOG = logging.getLogger(__name__)
_HUB_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


class FilePart(NamedTuple):
    """Hold the tensors of a network that were read of a file, and what names them again: its path,
    with the part where the file holds the network twice."""

    tensors: dict[str, Tensor]
    weights: str


def read_state(path: str, what: str) -> dict[str, Tensor]:
    """Read name -> tensor of a weights file, or of one part of it, FILE#PART; else as
    `read_part`."""
    return read_part(path, what).tensors


def read_part(path: str, what: str) -> FilePart:
    """Read the network in a weights file, or in one part of it, FILE#PART; a file that holds none
    is a UserError. Where the file holds the network twice, a note tells which is taken."""
    file, part = split_part(path)
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            foreign_layouts.check_form(file)
            state = restricted_unpickler.load_tensors(file)
        found = network_state(chosen_part(state, part) if part else state)
    except (
        Exception
    ) as error:  # truncated, text, a foreign pickle, another header: all are the file's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights {path!r} for {what} cannot be read: {reason[:160]}; a .safetensors file or a "
            "torch file of tensors is allowed (nothing in a file is ever executed): save the state "
            "dict as .safetensors"
        ) from error
    if not found.tensors:
        raise UserError(
            f"weights {path!r} for {what}: there is no named tensor in it (nothing in a file is "
            "ever executed); a state dict (name -> tensor) is needed: save it as .safetensors"
        )
    if found.others:
        others = " and ".join(map(repr, found.others))
        _LOG.warning(
            f"weights {path!r} hold the network twice, as {found.taken!r} and as {others}: "
            f"{found.taken!r} is taken; --weights {file}#{found.others[0]} takes the other"
        )
    twice = bool(found.others) and not part and bool(chosen_part(state, found.taken))
    return FilePart(found.tensors, f"{file}#{found.taken}" if twice else path)


def split_part(path: str) -> tuple[str, str]:
    """Return the file and the part that FILE#PART, or FILE:PART, names; the part is empty for a
    file alone.

    >>> split_part("nowhere.pt:model_ema")
    ('nowhere.pt:model_ema', '')
    """
    for mark in "#:":
        file, _, part = path.rpartition(mark)
        if file and part and not is_file(path) and is_file(file):
            return file, part
    return path, ""


def is_file(path: str) -> bool:
    """Return whether the path is that of a regular file; what cannot be a path is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, a null byte
        return False


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str, what: str) -> None:
    """Load a state dict strictly; every difference of names or shapes is one line."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if not (missing or extra or shapes):
        _check_numbers(own, state, path, what)
        model.load_state_dict(state)
        return
    parts = [
        f"{len(missing)} tensors are missing ({missing[0]} ...)" if missing else "",
        f"{len(extra)} are unknown ({extra[0][:100]} ...)" if extra else "",
        *(
            f"{name} is {tuple(state[name].shape)}, {tuple(own[name].shape)} is needed"
            for name in sorted(shapes)[:1]
        ),
    ]
    remedy = foreign_layouts.describe(extra) or "give the file of this architecture"
    raise UserError(
        f"weights {path!r} do not fit {what}: {', '.join(filter(None, parts))}; {remedy}"
    )


def _check_numbers(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str, what: str
) -> None:
    """Raise UserError for what would be cast or run without a word: integers, or floats of a byte,
    in the place of weights are quantised ones whose scales lie elsewhere."""
    for name, value in state.items():
        if not own[name].is_floating_point():
            continue
        if not value.is_floating_point() or value.element_size() < 2:
            raise UserError(
                f"weights {path!r} for {what}: {name} is {str(value.dtype).removeprefix('torch.')},"
                " which is no weight but a code of one, whose scale is not known here; give the "
                "file before it was quantised"
            )
        if not bool(value.isfinite().all()):
            raise UserError(
                f"weights {path!r} for {what}: {name} has values that are not finite; give another "
                "file"
            )


def fetch_pretrained(get: Callable[[], Got], what: str, tag: str) -> Got:
    """Let a library fetch registered weights; that they cannot be had is one line with the two ways
    on."""
    logging.disable(logging.CRITICAL)  # the clients' own reports of every retry
    try:
        with _offline_when_unreachable():
            return get()
    except Exception as error:  # hubs raise whatever their clients raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"pretrained weights {tag!r} of {what} cannot be had: they are neither on this machine "
            f"nor could they be fetched, or what is here is damaged ({reason[:90]}...); give a "
            "local file with --weights FILE, or try the program without them with --weights "
            "random:SEED"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Keep the hub's client to its cache where the hub's name does not resolve and no proxy is set:
    it would otherwise try each of many file names for a minute."""
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


def find_local(repository: str, file: str = "") -> Path | None:
    """Find registered weights that lie here already: below the Hugging Face hub's cache, or `file`
    below torch hub's. No network is asked."""
    if file:
        path = torch_hub_file(file)
        return path if path.is_file() else None
    if not repository:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in _HUB_FILES)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def torch_hub_file(name: str) -> Path:
    """Return the path at which torch hub keeps a downloaded file."""
    return Path(hub.get_dir()) / "checkpoints" / name


def download(url: str, file: str) -> Path:
    """Return a file of torch hub's cache, fetched if it is not there: under another name first, so
    never a part of it."""
    path = torch_hub_file(file)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            hub.download_url_to_file(url, str(part), progress=False)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def is_random(weights: str) -> bool:
    """Return whether `weights` is random:SEED."""
    return weights.startswith("random:")


def build_seeded(make: Callable[[], nn.Module], weights: str | None) -> nn.Module:
    """Run a library's constructor under `random:SEED`'s seed (0 otherwise), leaving the global
    generator as it was."""
    seed = 0
    if weights is not None and is_random(weights):
        text = weights.partition(":")[2]
        if not is_whole(text):
            raise UsageError(
                f"--weights {weights!r}: random:SEED needs a whole number below 10**18, as in "
                "random:0"
            )
        seed = int(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def weight_hash(teacher: Teacher | Tokenizer) -> str:
    """Return BLAKE2b-128 over names, dtypes, shapes and bytes of the loaded module's state, taken
    from what really runs.

    The kinds of activation go in too: the same weights under QuickGELU and GELU are two teachers.
    So does the code of a user's own file.
    """
    digest = hashlib.blake2b(" ".join(_activation_names(teacher)).encode(), digest_size=16)
    digest.update(getattr(teacher, "code", "").encode())
    for name, value in sorted(teacher.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _activation_names(teacher: Teacher | Tokenizer) -> list[str]:
    network = network_of(teacher)
    modules = network.modules() if isinstance(network, nn.Module) else []
    names = {type(module).__name__ for module in modules}
    return sorted(
        name for name in names if name.endswith(("GELU", "GELUTanh", "SiLU", "ReLU", "SwiGLU"))
    )


def weights_file(weights: str | None) -> str | None:
    """Return the path where `weights` names a file that exists, or a folder of transformers'; a
    path that does not exist is a UserError."""
    if weights is None or is_random(weights):
        return None
    if is_file(split_part(weights)[0]) or transformers_folder.is_folder(weights):
        return weights
    if "/" in weights and Path(weights).is_dir():
        raise UserError(
            f"weights {weights!r}: no such file, but a folder without "
            f"{transformers_folder.CONFIG}; give a file, or "
            "the folder that transformers' save_pretrained wrote"
        )
    if "/" in weights or weights.endswith(SUFFIXES):
        raise UserError(
            f"weights {weights!r}: no such file; give an existing file, a registered tag or "
            "random:SEED"
        )
    return None
