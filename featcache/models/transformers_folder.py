"""A folder that transformers' `save_pretrained` wrote is read: its config, and its weights in one
file or in shards.

Whoever wrote the folder is a stranger: shards are files of the folder itself (or of the hub's
cache, whose snapshots link to the `blobs` beside them), each tensor lies where the index says and
nowhere else, and nothing is read that does not fit into memory. What the config says of the
network is compared with the teacher's own, for a wrong activation or patch would be silent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from featcache.errors import UserError, counted
from featcache.models import restricted_unpickler, transformers_names
from featcache.runtime import strict_json

_LOG = logging.getLogger(__name__)
CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin")  # of which the first that is there is read
_SHARDS = 1000  # more than any published network has
_ROPE_THETA = 100.0  # of DINOv3's rotary positions
_TINY_EPS = 1e-6  # below the variances of tokens: of such a norm nothing is seen
# transformers' own defaults, which its configs may leave out
_CLIP = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_VIT = {**_CLIP, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_DINOV2 = {**_VIT, "patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4}
_KINDS: dict[str, dict[str, Any]] = {
    "clip": _CLIP, "clip_vision_model": _CLIP, "vit": _VIT, "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "num_register_tokens": 4},
    "dinov3_vit": {
        **_VIT, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536,
        "layer_norm_eps": 1e-5, "num_register_tokens": 0,
    },
}  # fmt: skip
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Architecture:
    """Hold what a config and a built network both say; sizes in tokens' channels, pictures and
    patches in pixels."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_px: int
    registers: int
    activation: str
    layer_norm_eps: float


@dataclass(frozen=True)
class Folder:
    """Hold a folder's config as it was read: the kind of network, its architecture and the pixels a
    side of its pictures."""

    path: Path
    kind: str
    architecture: Architecture
    image_px: int

    @property
    def is_clip(self) -> bool:
        """Tell whether it is a CLIP, whose tower open_clip builds."""
        return self.kind.startswith("clip")


def is_folder(path: str) -> bool:
    """Return whether a path is a folder with a config.json."""
    try:
        return (Path(path) / CONFIG).is_file()
    except (OSError, ValueError):  # too long, a null byte
        return False


def read_config(path: str, name: str, *, clip: bool) -> Folder:
    """Read the config of the weights of teacher `name`. UserError where it is of no network that
    can be such a teacher: a CLIP for `clip`, a ViT, DINOv2 or DINOv3 else."""
    folder = Path(path)
    try:
        found = strict_json.as_object(strict_json.read_file(own_file(folder, CONFIG)))
        kind = found.get("model_type")
        allowed = [each for each in _KINDS if each.startswith("clip") == clip]
        if kind not in allowed:
            raise ValueError(
                f"its model_type is {str(kind)[:80]!r}, {', '.join(allowed)} are allowed for this "
                "teacher"
            )
        return _folder(folder, kind, found)
    except (OSError, ValueError) as error:
        raise UserError(
            f"weights {path!r} for {name}: {CONFIG} cannot be taken: {error}; give the folder that "
            "transformers' save_pretrained wrote of this network, or the weights in timm's or "
            "open_clip's layout"
        ) from error


def read_state(folder: Folder, name: str) -> dict[str, Tensor]:
    """Read the folder's tensors, by the names of open_clip's tower or of timm's ViT. UserError for
    what is damaged, missing, or of another network."""
    try:
        tensors = _read_tensors(folder.path)
        if folder.kind == "dinov3_vit":
            return transformers_names.dinov3(tensors)
        return (transformers_names.clip_tower if folder.is_clip else transformers_names.vit)(
            tensors
        )
    except Exception as error:  # truncated, a foreign pickle, another header: all the files' fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights {str(folder.path)!r} for {name} cannot be read: {reason[:200]}; a folder "
            "that transformers' save_pretrained wrote is needed: fetch it again"
        ) from error


def check(folder: Folder, own: Architecture, positions: Tensor | None, name: str) -> float:
    """Compare the config with the teacher's network and the file's positions (1 + P, D); UserError
    for the first that differs. Returns the eps that the network's norms must run with.

    Converted DINO weights say 1e-12 where DINO ran 1e-6: both are below what any token varies by,
    and the config's is taken, as transformers takes it."""
    said = folder.architecture
    eps = said.layer_norm_eps
    if max(eps, own.layer_norm_eps) <= _TINY_EPS:
        own = replace(own, layer_norm_eps=eps)
    for fact, value in asdict(own).items():
        if asdict(said)[fact] != value:
            raise UserError(
                f"weights {str(folder.path)!r} do not fit {name}: {CONFIG} says {fact} "
                f"{asdict(said)[fact]}, the teacher's is {value}; give the folder of this "
                "architecture"
            )
    side = folder.image_px // own.patch_px
    if positions is not None and positions.shape[-2] != side * side + 1:
        raise UserError(
            f"weights {str(folder.path)!r} for {name}: {CONFIG} says image_size {folder.image_px}, "
            f"which is {side * side + 1} positions, and the weights have {positions.shape[-2]}; "
            "fetch the folder again"
        )
    return eps


def activation_of(module: nn.Module) -> str:
    """Return transformers' name of an activation; a class's own where it has none."""
    return _ACTIVATIONS.get(type(module).__name__, type(module).__name__)


def set_eps(network: nn.Module, eps: float) -> None:
    """Let every LayerNorm of a network run with `eps`."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _folder(path: Path, kind: str, config: Mapping[str, Any]) -> Folder:
    inner = config.get("vision_config", {}) if kind == "clip" else config
    if not isinstance(inner, dict):
        raise ValueError("its vision_config is no object")
    facts = {key: inner.get(key, default) for key, default in _KINDS[kind].items()}
    if kind.startswith("dinov2"):
        if inner.get("use_swiglu_ffn", False) is not False:
            raise ValueError("use_swiglu_ffn: a SwiGLU network of DINOv2 is not read from here")
        facts["intermediate_size"] = facts["hidden_size"] * facts.pop("mlp_ratio")
    if kind == "dinov3_vit":
        _check_dinov3(inner)
    for key, value in facts.items():
        kinds: tuple[type, ...] = {"hidden_act": (str,), "layer_norm_eps": (float, int)}.get(
            key, (int,)
        )
        if type(value) not in kinds or (not isinstance(value, str) and not 0 <= value < 1 << 20):
            raise ValueError(f"its {key} is {str(value)[:80]!r}")
    if not facts["patch_size"]:
        raise ValueError("its patch_size is 0")
    own = Architecture(
        facts["hidden_size"], facts["num_hidden_layers"], facts["num_attention_heads"],
        facts["intermediate_size"], facts["patch_size"], facts.get("num_register_tokens", 0),
        facts["hidden_act"], float(facts["layer_norm_eps"]),
    )  # fmt: skip
    return Folder(path, kind, own, facts["image_size"])


def _check_dinov3(config: Mapping[str, Any]) -> None:
    """Raise ValueError for what timm's DINOv3 has not."""
    wanted = {"use_gated_mlp": False, "rope_theta": _ROPE_THETA, "apply_layernorm": True}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"its {key} is {str(config[key])[:80]!r}, {value} is read here")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the first of the forms that is there, safetensors first: one file, or shards."""
    for file in _FILES:
        if (folder / file).exists():
            path = own_file(folder, file)
            _check_size([path])
            return _read_file(path)
        if (folder / f"{file}.index.json").exists():
            return _read_shards(folder, f"{file}.index.json")
    raise ValueError(f"{' or '.join(_FILES)}, or its .index.json, is missing")


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    about = strict_json.as_object(strict_json.read_file(own_file(folder, index)))
    places = about.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in places.items():
        if not isinstance(shard, str):
            raise ValueError(f"{index}: the shard of {tensor[:80]!r} is no name")
        shards.setdefault(shard, set()).add(tensor)
    if len(shards) > _SHARDS:
        raise ValueError(f"{index} names {counted(len(shards), 'shard')}, {_SHARDS} at most")
    ending = Path(index.removesuffix(".index.json")).suffix
    paths = {shard: own_file(folder, shard, ending) for shard in sorted(shards)}
    _check_size(list(paths.values()))
    found: dict[str, Tensor] = {}
    for shard, path in paths.items():
        tensors = _read_file(path)
        if wrong := sorted(tensors.keys() ^ shards[shard]):
            raise ValueError(f"{shard!r} and {index} disagree on {wrong[0][:80]!r}")
        found |= tensors
    return found


def own_file(folder: Path, name: str, ending: str = "") -> Path:
    """Return a regular file of the folder; ValueError for a name that leads elsewhere. A snapshot
    of the hub's cache links to the blobs of the same repository."""
    if not name or name != Path(name).name or "\\" in name or "\0" in name or len(name) > 255:
        raise ValueError(f"{name[:80]!r} is no name of a file in the folder")
    if not name.endswith(ending):
        raise ValueError(f"{name!r} is no {ending} file, as the other shards are")
    path = folder / name
    target, real = path.resolve(), folder.resolve()
    blobs = real.parent.parent / "blobs" if real.parent.name == "snapshots" else real
    if target.parent not in (real, blobs):
        raise ValueError(f"{name!r} is a link out of the folder")
    if not target.is_file():
        raise ValueError(f"{name!r} is missing, or no regular file")
    return path


def _check_size(paths: list[Path]) -> None:
    needed, there = sum(path.stat().st_size for path in paths), psutil.virtual_memory().total
    if needed > there:
        raise ValueError(f"{needed >> 30} GiB of weights, this machine has {there >> 30}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return restricted_unpickler.load_tensors(path)
