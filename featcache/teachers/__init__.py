"""Teachers are found by name and loaded. One file is one family.

A family's module declares `NAMES` (what `featcache teachers` lists), optionally `PREFIX` for
open-ended names (`timm:...`), and `load(name, options, weights) -> Teacher`. A spec is `NAME` or
`NAME,key=value,...`; the part after the name goes to the family, typed. Adding a family touches no
other file. A family imports its library when it builds a model, not when it is imported, so that
finding a name costs nothing.

A spec may also be the path of a user's own file, `./mine.py[,key=value...]`: the same `load`, no
other declaration; or begin with the prefix of a family that another package announces
(`featcache.models.announced`), as `run:RUN` does, one's own training run, which `student` gives.
Most families give features (`Teacher`); one that declares `TOKENIZER = True` gives a token id for
each patch (`Tokenizer`) and is loaded by `load_tokenizer`.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from featcache.errors import UsageError, UserError, near
from featcache.models import announced
from featcache.models.contract import (
    REGISTERED,
    ModelCard,
    Option,
    Teacher,
    Tokenizer,
    required_members,
)
from featcache.models.hooks import BlockOutputs, normalise_pixels
from featcache.models.spec import parse_options, split_spec
from featcache.models.tokenizer import TokenizerTeacher
from featcache.models.weights import (  # fmt: skip
    build_seeded,
    fetch_pretrained,
    is_random,
    load_state,
    read_state,
    weight_hash,
    weights_file,
)
from featcache.runtime.user_file import load_module, reason

if TYPE_CHECKING:
    from featcache.models.open_clip_text import TextTower

# What a family of one's own is written with, by one name.
__all__ = [
    "REGISTERED",
    "BlockOutputs",
    "ModelCard",
    "Option",
    "Teacher",
    "Tokenizer",
    "build_seeded",
    "family",
    "fetch_pretrained",
    "is_random",
    "is_registered",
    "is_tokenizer",
    "load",
    "load_state",
    "load_text",
    "load_tokenizer",
    "model_cards",
    "modules",
    "normalise_pixels",
    "parse_options",
    "read_state",
    "recorded_spec",
    "split_spec",
    "weight_hash",
    "weights_file",
]  # fmt: skip

# NAME, PREFIX:NAME or PREFIX:NAME/TAG: no second colon (hf-hub:, local-dir:, a URL), no path
_REGISTERED = re.compile(r"\w[\w.-]*(:\w[\w.-]*(/\w[\w.-]*)?)?", re.ASCII)
_NEEDS = {"load": "load(name, options, weights) -> Teacher"}


def modules() -> list[ModuleType]:
    """Return the modules of every family in this folder."""
    return [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    ]


def model_cards() -> dict[str, ModelCard]:
    """Return name -> card of every registered teacher, families in the order of their file
    names."""
    return {name: card for module in modules() for name, card in module.NAMES.items()}


def family(name: str) -> ModuleType:
    """Return the module that knows `name`, of this folder or of a package that announces its
    prefix, or the user's own file; an unknown name is a UsageError that offers near ones."""
    if name.endswith(".py"):
        return load_module(Path(name), "teacher", _NEEDS, "featcache/teachers/synthetic.py")
    prefix = _prefix(name)
    for module in modules():
        if name in module.NAMES or (prefix and prefix == _own_prefix(module)):
            return module
    if prefix and (found := announced.find(prefix)) is not None:
        return found
    own = [p for module in modules() if (p := _own_prefix(module)) and p not in module.NAMES]
    prefixes = [f"{prefix}:NAME" for prefix in (*own, *announced.prefixes())]
    # by its look: no library is imported to refuse a name
    of_timm = f"if it is one of timm's, timm:{name}; " if "_patch" in name and not prefix else ""
    raise UsageError(
        f"unknown teacher {name!r}: {of_timm}{near(name, [*model_cards(), *prefixes])}; or your "
        "own file, ./mine.py"
    )


def _prefix(name: str) -> str:
    """Return what stands before the first colon of a name; empty where there is none."""
    return name.partition(":")[0] if ":" in name else ""


def _own_prefix(module: ModuleType) -> str:
    return getattr(module, "PREFIX", None) or ""


def is_tokenizer(spec: str) -> bool:
    """Return whether a spec names a tokenizer, which `load_tokenizer` loads, and not a teacher of
    features."""
    return bool(getattr(family(split_spec(spec)[0]), "TOKENIZER", False))


def load(spec: str, weights: str | None = None, device: str = "cpu") -> Teacher:
    """Load the teacher on `device`, frozen, in eval mode.

    `weights`: None for the registered ones, a file, a tag, or random:SEED.
    """
    if is_tokenizer(spec):
        raise UsageError(
            f"teacher {spec!r} gives token ids, not features; a teacher of features is needed "
            "here, such as clip-b16"
        )
    teacher: Teacher = _load(spec, weights, device, Teacher)
    return teacher


def load_text(spec: str, weights: str | None = None) -> TextTower:
    """Load the text tower of a CLIP, whose picture tower `load` gives; `weights` as there, of the
    whole CLIP. UserError for a teacher without one."""
    name, options = split_spec(spec)
    make = getattr(family(name), "load_text", None)
    if make is None:
        raise UserError(
            f"teacher {spec!r} has no text tower; a CLIP is needed here, such as clip-b16"
        )
    tower: TextTower = make(name, options, None if weights == REGISTERED else weights)
    return tower


def load_tokenizer(spec: str, weights: str | None = None, device: str = "cpu") -> Tokenizer:
    """Load the tokenizer on `device`, frozen, in eval mode; `weights` as for `load`."""
    if not is_tokenizer(spec):
        raise UsageError(
            f"teacher {spec!r} gives features, not token ids; a tokenizer is needed here: dvae"
        )
    tokenizer: Tokenizer = _load(spec, weights, device, Tokenizer)
    return tokenizer


def _load(spec: str, weights: str | None, device: str, contract: type) -> Any:
    name, options = split_spec(spec)
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


def _load_own(
    module: ModuleType, name: str, options: dict[str, Option], weights: str | None, contract: type
) -> Any:
    """Run a user's `load`, tell its mistakes in one line, and check its result against the
    contract."""
    try:
        loaded = module.load(name, options, weights)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"teacher {name!r}: its load(...) fails: {reason(error)}; fix the file"
        ) from error
    needed = required_members(contract)
    if missing := [part for part in needed if not hasattr(loaded, part)]:
        raise UserError(
            f"teacher {name!r}: what its load(...) returns lacks {', '.join(missing)}; needed: "
            f"{', '.join(needed)}; see featcache.teachers.{contract.__name__}"
        )
    loaded.code = ast.unparse(ast.parse(Path(name).read_text()))  # comments and layout left out
    return loaded


def is_registered(spec: str) -> bool:
    """Return whether a spec names a network of a library's own list, and so neither code, nor a
    file, nor an address that whoever wrote the spec chose. What follows a prefix of another package
    may be any of these, as the folder of `run:RUN` is.

    >>> [is_registered(spec) for spec in ("clip-b16", "timm:vit_tiny_patch16_224,depth=2")]
    [True, True]
    >>> [is_registered(spec) for spec in ("./mine.py", "open_clip:local-dir:x", "timm:hf-hub:a/b")]
    [False, False, False]
    >>> is_registered("run:runs/mralign-s0")
    False
    """
    name, _ = split_spec(spec)
    if not _REGISTERED.fullmatch(name) or name.lower().endswith((".py", ".json")):
        return False
    prefix = _prefix(name)
    return not prefix or prefix in map(_own_prefix, modules())


def recorded_spec(recorded: str, named: Sequence[str], where: str, option: str) -> str:
    """Return the spec to load for the teacher that a cache or another file records.

    A file from elsewhere chooses no code, file or address here: a recorded spec that is not
    `is_registered` is loaded only where the command line names it (`named`, by `option`): by the
    same spec, or by the only one given, as where the user's file lies elsewhere now. UserError
    where it does not; `where` is the file that records it.
    """
    if recorded in named or is_registered(recorded):
        return recorded
    if len(named) == 1:
        return named[0]
    raise UserError(
        f"{where} names the teacher {recorded!r}: code and files are taken only from your own "
        f"command line, never from what a file says; if it is a teacher of your own, name it with "
        f"{option} SPEC, as --teacher named it when the cache was made"
    )


def load_any(spec: str, weights: str | None, device: str) -> Teacher:
    """Load a teacher, or a tokenizer in place of one, on a device; `weights` as for `load`."""
    if is_tokenizer(spec):
        return TokenizerTeacher(load_tokenizer(spec, weights, device))
    return load(spec, weights, device)


# Former names, which families written with them still import.
Row, Tap, build, pixels, split = (
    ModelCard, BlockOutputs, build_seeded, normalise_pixels, split_spec,
)  # fmt: skip
fetch, file_weights, rows = fetch_pretrained, weights_file, model_cards
