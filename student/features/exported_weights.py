"""The weights of a folder that `student export` wrote are read back, as a run's encoder has them.

    timm     config.json with architecture and model_args; the run's own names
    hf       config.json with model_type; transformers' names become timm's
    mae      config.json with embed_dim and pool; MAE's names, which are timm's
    vitdet   without [CLS] and final norm, so no encoder: refused
    onnx     a graph, no encoder's tensors: refused

Which it is, its files say. They are a stranger's: nothing is built of a config but a network
without memory, to look at its heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models import architecture, transformers_folder, weights
from featcache.runtime import strict_json
from student import checkpoint

CAN_BE = (
    f"the folder of a run, its {checkpoint.ENCODER}, or a folder of `student export --format "
    "timm`, `hf` or `mae`"
)
_WEIGHTS = "model.safetensors"
_ACTIVATIONS = ("GELU", "GELUTanh", "SiLU", "ReLU")
_HEADS = ("head.", "fc_norm.")  # of a classifier


@dataclass(frozen=True)
class Traits:
    """Hold what no shape of a tensor tells of a network."""

    heads: tuple[int, ...]  # numbers that occur
    eps: tuple[float, ...]  # of its norms
    activations: tuple[str, ...]


@dataclass(frozen=True)
class ExportedWeights:
    """Hold the tensors of an exported encoder by timm's names, the pixels a side that its positions
    are of, and what must be as in the encoder that takes them."""

    layout: str
    state: dict[str, Tensor]
    img_px: int
    traits: Traits


def traits_of(net: nn.Module) -> Traits:
    """Return what no shape of a tensor tells of a network."""
    parts: list[Any] = list(net.modules())
    acts = [part for part in parts if type(part).__name__.endswith(_ACTIVATIONS)]
    return Traits(
        tuple(sorted({int(part.num_heads) for part in parts if hasattr(part, "num_heads")})),
        tuple(sorted({float(part.eps) for part in parts if isinstance(part, nn.LayerNorm)})),
        tuple(sorted({transformers_folder.activation_of(part) for part in acts})),
    )


def is_run(folder: Path) -> bool:
    """Return whether a folder is to be read as a run: its config names a recipe, or it has
    checkpoints."""
    try:
        return "recipe" in _config(folder)
    except (OSError, ValueError):
        return (folder / checkpoint.FOLDER).is_dir()


def read(folder: Path) -> ExportedWeights:
    """Read an exported folder. UserError, which says what can be given, for any other, and for one
    that holds no whole encoder."""
    try:
        if (folder / "model.onnx").exists():
            raise ValueError("an ONNX file is a graph, from which no encoder is read back")
        config = _config(folder)
        layout = _layout(config)
        return _READERS[layout](folder, config)
    except (KeyError, OSError, TypeError, ValueError, UserError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--init {str(folder)!r} gives no encoder: {why[:300]}; give {CAN_BE}"
        ) from error


def _config(folder: Path) -> Mapping[str, Any]:
    return strict_json.as_object(strict_json.read_file(folder / checkpoint.CONFIG))


def _layout(config: Mapping[str, Any]) -> str:
    if "pretrain_img_size" in config:
        raise ValueError("the layout of ViTDet has no [CLS] and no final norm")
    for layout, keys in {
        "timm": {"architecture", "model_args"}, "hf": {"model_type"}, "mae": {"embed_dim", "pool"},
    }.items():  # fmt: skip
        if keys <= config.keys():
            return layout
    raise ValueError(f"its {checkpoint.CONFIG} is of no run and of no export")


def _timm(folder: Path, config: Mapping[str, Any]) -> ExportedWeights:
    name, arguments = config["architecture"], config["model_args"]
    if not isinstance(name, str) or not timm.is_model(name) or not isinstance(arguments, dict):
        raise ValueError(f"its architecture {str(name)[:80]!r} is none of timm's")
    architecture.check_keywords(
        f"architecture {name!r}", {k: v for k, v in arguments.items() if k != "num_classes"}
    )
    with torch.device("meta"):
        net = timm.create_model(name, **{**arguments, "num_classes": 0})
    return ExportedWeights("timm", _tensors(folder), _whole(arguments, "img_size"), traits_of(net))


def _hf(folder: Path, config: Mapping[str, Any]) -> ExportedWeights:
    found = transformers_folder.read_config(str(folder), "--init", clip=False)
    own = found.architecture
    state = transformers_folder.read_state(found, "--init")
    return ExportedWeights(
        "hf", state, found.image_px, Traits((own.heads,), (own.layer_norm_eps,), (own.activation,))
    )


def _mae(folder: Path, config: Mapping[str, Any]) -> ExportedWeights:
    own = Traits((_whole(config, "num_heads"),), (float(config["layer_norm_eps"]),), ("gelu",))
    return ExportedWeights("mae", _tensors(folder), _whole(config, "img_size"), own)


_READERS = {"timm": _timm, "hf": _hf, "mae": _mae}


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= architecture.MAX_PX:
        raise ValueError(f"its {key} is {str(value)[:80]!r}")
    return value


def _tensors(folder: Path) -> dict[str, Tensor]:
    state = weights.read_state(str(folder / _WEIGHTS), "--init")
    return {name: value for name, value in state.items() if not name.startswith(_HEADS)}
