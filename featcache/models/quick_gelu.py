"""The activation that CLIP weights were trained with is found, or asked for.

OpenAI's networks used QuickGELU, x * sigmoid(1.702 x); most later ones use GELU. The same tensors
load under both, and the wrong one is silent and costs points. What can be asked: open_clip's table
of tags, the config beside the weights, the classes that a scripted archive names, an architecture's
name, and the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from featcache.errors import UsageError, near
from featcache.models import open_clip_config, restricted_unpickler, transformers_folder

Statistics = tuple[float, float, float]


@dataclass(frozen=True)
class PretrainedTag:
    """Hold what open_clip's table says of one set of weights."""

    quick: bool
    mean: Statistics
    std: Statistics


def activation_name(quick: bool) -> str:
    """Return QuickGELU or GELU."""
    return "QuickGELU" if quick else "GELU"


def uses_quick_gelu(network: nn.Module) -> bool:
    """Return whether a built network runs QuickGELU."""
    return any(type(module).__name__ == "QuickGELU" for module in network.modules())


def model_config(arch: str) -> dict[str, Any]:
    """Return open_clip's config of an architecture by name."""
    import open_clip

    return dict(open_clip.get_model_config(arch) or {})


def from_architecture(arch: str) -> bool | None:
    """Return whether an architecture's name alone says QuickGELU; None where both forms of it
    exist."""
    import open_clip

    if arch.endswith("-quickgelu"):
        return True
    return (
        None
        if f"{arch}-quickgelu" in open_clip.list_models()
        else bool(model_config(arch).get("quick_gelu", False))
    )


def from_tag(name: str, arch: str, tag: str) -> PretrainedTag:
    """Return the facts of a tag; an unknown one is a UsageError that offers near ones. `name` is
    what the user gave."""
    import open_clip

    about = open_clip.get_pretrained_cfg(arch, tag)
    if not about:
        known = open_clip.list_pretrained_tags_by_model(arch)
        raise UsageError(
            f"unknown weights {tag!r} of {name}: {near(tag, known)}; or a file, or random:SEED"
        )
    quick = about.get("quick_gelu", model_config(arch).get("quick_gelu", False))
    return PretrainedTag(bool(quick), about["mean"], about["std"])


def resolve_activation(
    name: str, options: Mapping[str, object], known: bool | None, whose: str
) -> bool:
    """Return whether QuickGELU runs, by what is known and the option `quick_gelu`, which must not
    disagree; GELU where neither says."""
    asked = options.get("quick_gelu")
    if asked is not None and not isinstance(asked, bool):
        raise UsageError(f"teacher {name!r}: quick_gelu={asked!r}; true or false is allowed")
    if asked is not None and known is not None and asked != known:
        raise UsageError(
            f"teacher {name!r}: quick_gelu={str(asked).lower()}, but {whose} says "
            f"{activation_name(known)}, and the other would be silently wrong; leave the option out"
        )
    return bool(known if asked is None else asked)


def from_file(
    name: str,
    by_name: bool | None,
    options: Mapping[str, object],
    path: str,
    fallback: bool | None = None,
) -> tuple[bool, str]:
    """Return whether QuickGELU runs, and a note for the user, mostly empty.

    The file says it, the config in its folder, or the teacher's name (`by_name`). Where none does
    and no option is given, the `fallback` with a note that tells of it; without one, the option is
    asked for.
    """
    says = {**_said_by_file(path, name), "the name": by_name}
    known = {whose: quick for whose, quick in says.items() if quick is not None}
    if len(set(known.values())) > 1:
        each = ", ".join(f"{whose} says {activation_name(quick)}" for whose, quick in known.items())
        raise UsageError(
            f"teacher {name!r}, weights {path!r}: {each}; give the architecture of these weights"
        )
    if not known and "quick_gelu" not in options and fallback is not None:
        other = f"{name},quick_gelu={str(not fallback).lower()}"
        return fallback, (
            f"{path} does not say its activation; {name} runs "
            f"{activation_name(fallback)}, as the "
            f"weights it is named for: give {other} if these are others"
        )
    if not known and "quick_gelu" not in options:
        raise UsageError(
            f"weights {path!r} do not say their activation, and the wrong one would be silent: "
            f"give {name},quick_gelu=true (OpenAI's, MetaCLIP's, DFN's) or {name},quick_gelu=false "
            "(LAION's, DataComp's)"
        )
    whose, quick = next(iter(known.items()), ("", None))
    return resolve_activation(name, options, quick, whose), ""


def _said_by_file(path: str, name: str) -> dict[str, bool | None]:
    """Return what a file, the config beside it, or a transformers' folder says."""
    if transformers_folder.is_folder(path):
        folder = transformers_folder.read_config(path, name, clip=True)
        return {f"its {transformers_folder.CONFIG}": folder.architecture.activation == "quick_gelu"}
    return {
        "the archive": _archive_activation(path),
        f"{open_clip_config.NAME} beside the file": _folder_activation(path),
    }


def _archive_activation(path: str) -> bool | None:
    """Return whether a TorchScript archive names the class QuickGELU; False for GELU, None for
    neither."""
    try:
        classes = {
            name.rpartition(".")[2]
            for name in restricted_unpickler.referenced_names(path)
            if name.startswith("__torch__.")
        }
    except (
        Exception
    ):  # no zip archive of torch's: it says nothing, and reading it will tell what it is
        return None
    return True if "QuickGELU" in classes else False if "GELU" in classes else None


def _folder_activation(path: str) -> bool | None:
    beside = Path(path).with_name(open_clip_config.NAME)
    return (
        bool(open_clip_config.read_config(beside, path)["model_cfg"].get("quick_gelu", False))
        if beside.is_file()
        else None
    )
