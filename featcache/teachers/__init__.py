"""Teachers by name. One file, one family; this file only finds them.

A family's module declares `NAMES` (what `featcache teachers` lists), optionally `PREFIX` for open-ended names
(`timm:...`), and `load(name, options, weights) -> Teacher`. A spec is `NAME` or `NAME,key=value,...`; the part after
the name goes to the family, typed. Adding a family touches no other file. A family imports its library when it builds
a model, not when it is imported, so that finding a name costs nothing.

A spec may also be the path of a user's own file, `./mine.py[,key=value...]`: the same `load`, no other declaration.
Most families give features (`Teacher`); one that declares `TOKENIZER = True` gives a token id for each patch
(`Tokenizer`) and is loaded by `load_tokenizer`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.errors import UsageError, UserError, near
from featcache.models.weights import SUFFIXES, fetch, load_state, read_state
from featcache.storage.manifest import REGISTERED

__all__ = ["REGISTERED", "fetch", "load_state", "read_state"]  # what families use of other files, by one name

Option = int | float | bool | str


@dataclass(frozen=True)
class Row:
    """One line of `featcache teachers`: facts known without building the model."""

    source: str  # library and tag of the registered weights
    input_px: int
    patches: int
    width: int
    depth: int  # 0: a tokenizer
    params: int = 0  # of what runs, its end included, a text tower not
    gmac: float = 0.0  # multiply-accumulates of one picture's forward, 10^9
    licence: str = ""  # of the weights
    hub: str = ""  # their repository on the Hugging Face hub
    file: str = ""  # or their file in torch hub's folder

    @property
    def view_bytes(self) -> int:
        """What the last five levels of a view take in fp16; of a tokenizer, its uint16 ids."""
        return min(5, self.depth) * (self.patches + 1) * self.width * 2 if self.depth else 2 * self.patches


class Teacher(Protocol):
    """A frozen network in eval mode. B batch, S = input_px, P patches, D width.

    A model without a [CLS] token says `first_token = "mean"`: row 0 of its levels is then the mean of the patches, and
    its attention is that of its attention pool's query.
    """

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


class Tokenizer(Protocol):
    """A frozen network that gives each patch the number of a visual word. B batch, S = input_px, P patches.

    Its pixels are rendered from the view's own crop box at `input_px` with `pixel_filter`, whatever the policy's filter
    is; the ids fit uint16.
    """

    name: str
    weights: str
    input_px: int
    patches: int
    vocabulary: int  # ids are 0 to vocabulary - 1
    pixel_filter: str  # a filter of `views.render`

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> ids (B, P) int64, patches in raster order."""
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
    """The module that knows `name`, or the user's own file; an unknown name is a UsageError that offers near ones."""
    if name.endswith(".py"):
        return _from_file(Path(name))
    for module in modules():
        if name in module.NAMES or (":" in name and name.partition(":")[0] == getattr(module, "PREFIX", None)):
            return module
    prefixes = [f"{p}:NAME" for module in modules() if (p := getattr(module, "PREFIX", None)) and p not in module.NAMES]
    raise UsageError(f"unknown teacher {name!r}: {near(name, [*rows(), *prefixes])}; or your own file, ./mine.py")


def _from_file(path: Path) -> ModuleType:
    """Run a user's own file as a module; it stays in sys.modules, where dataclasses look up their annotations."""
    if not path.is_file():
        raise UsageError(f"cannot load teacher {str(path)!r}: no such file; give the path of a .py file with `load`")
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"featcache_teacher_{path.stem}_{digest}", path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"teacher {str(path)!r} fails as it is imported: {_reason(error)}; mend the file") from error
    if not callable(getattr(module, "load", None)):
        raise UsageError(
            f"cannot use teacher {str(path)!r}: it lacks load; load(name, options, weights) -> Teacher is needed, as "
            "featcache/teachers/synthetic.py has it"
        )
    return module


def _reason(error: BaseException) -> str:
    """Kind and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def is_tokenizer(spec: str) -> bool:
    """Whether a spec names a tokenizer, which `load_tokenizer` loads, and not a teacher of features."""
    return bool(getattr(family(split(spec)[0]), "TOKENIZER", False))


def load(spec: str, weights: str | None = None, device: str = "cpu") -> Teacher:
    """The teacher on `device`, frozen, in eval mode.

    `weights`: None for the registered ones, a file, a tag, or random:SEED.
    """
    if is_tokenizer(spec):
        raise UsageError(
            f"teacher {spec!r} gives token ids, not features; a teacher of features is needed here, such as clip-b16"
        )
    teacher: Teacher = _load(spec, weights, device, Teacher)
    return teacher


def load_tokenizer(spec: str, weights: str | None = None, device: str = "cpu") -> Tokenizer:
    """The tokenizer on `device`, frozen, in eval mode; `weights` as for `load`."""
    if not is_tokenizer(spec):
        raise UsageError(f"teacher {spec!r} gives features, not token ids; a tokenizer is needed here: dvae")
    tokenizer: Tokenizer = _load(spec, weights, device, Tokenizer)
    return tokenizer


def _load(spec: str, weights: str | None, device: str, contract: type) -> Any:
    name, options = split(spec)
    module = family(name)
    given = None if weights == REGISTERED else weights
    if name.endswith(".py"):
        loaded = _load_own(module, name, options, given, contract)
    else:
        loaded = module.load(name, options, given)
    if isinstance(loaded, nn.Module):
        loaded.eval().requires_grad_(False)
    loaded.name = spec
    return loaded.to(device)


def _load_own(module: ModuleType, name: str, options: dict[str, Option], weights: str | None, contract: type) -> Any:
    """A user's `load`, its mistakes told in one line, its result checked against the contract."""
    try:
        loaded = module.load(name, options, weights)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"teacher {name!r}: its load(...) fails: {_reason(error)}; mend the file") from error
    facts = [fact for fact in contract.__annotations__ if fact != "name"]  # the name is given by the spec
    methods = [part for part in ("__call__", "tail", "state_dict", "to") if hasattr(contract, part)]
    missing = [part for part in (*facts, *methods) if not hasattr(loaded, part)]
    if missing:
        raise UserError(
            f"teacher {name!r}: what its load(...) returns lacks {', '.join(missing)}; needed: "
            f"{', '.join((*facts, *methods))}; see featcache.teachers.{contract.__name__}"
        )
    loaded.code = ast.unparse(ast.parse(Path(name).read_text()))  # comments and layout left out
    return loaded


class Tap:
    """Hooks that read y_k (B, T, D) after every block of a running ViT.

    The library's own forward runs unchanged; blocks must be batch-first. One Tap, one forward at a time.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._levels: dict[int, Tensor] = {}
        for k, block in enumerate(blocks, 1):
            block.register_forward_hook(lambda _, __, y, k=k: self._levels.__setitem__(k, y))

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


def weight_hash(teacher: Teacher | Tokenizer) -> str:
    """BLAKE2b-128 over names, dtypes, shapes and bytes of the loaded module's state, taken from what really runs.

    The kinds of activation go in too: the same weights under QuickGELU and GELU are two teachers. So does the code of a
    user's own file.
    """
    digest = hashlib.blake2b(" ".join(_activations(teacher)).encode(), digest_size=16)
    digest.update(getattr(teacher, "code", "").encode())
    for name, value in sorted(teacher.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _activations(teacher: Teacher | Tokenizer) -> list[str]:
    modules = teacher.modules() if isinstance(teacher, nn.Module) else []
    names = {type(module).__name__ for module in modules}
    return sorted(name for name in names if name.endswith(("GELU", "GELUTanh", "SiLU", "ReLU", "SwiGLU")))


def file_weights(weights: str | None) -> str | None:
    """The path when `weights` names a file that exists; a path that does not exist is a UserError."""
    if weights is None or is_random(weights):
        return None
    if Path(weights).is_file():
        return weights
    if "/" in weights or weights.endswith(SUFFIXES):
        raise UserError(f"weights {weights!r}: no such file; give an existing file, a registered tag or random:SEED")
    return None
