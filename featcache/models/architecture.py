"""The keywords of a timm constructor that describe an architecture are listed with their values.

Names of networks come from run folders and caches as well, which others wrote. timm hands every
keyword on: `checkpoint_path=`, `pretrained_cfg=` and `cache_dir=` open files, and layers may be
named as classes. So only what is listed here is passed, and a network that this machine's memory
could not hold is refused before it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import psutil
import torch
from torch import nn

from featcache.errors import UsageError, near
from featcache.models.contract import Option


class Range(NamedTuple):
    """Hold the least and the largest value, both included, of a keyword of `kind`."""

    kind: type
    least: float
    largest: float

    def __contains__(self, value: object) -> bool:
        allowed = (int, float) if self.kind is float else (int,)
        return type(value) in allowed and self.least <= value <= self.largest  # type: ignore[operator]

    def __str__(self) -> str:
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} from {self.least:g} to {self.largest:g}"


class Choice(tuple[Option, ...]):
    """Hold the values of a keyword by name."""

    __slots__ = ()

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(each) and value == each for each in self)

    def __str__(self) -> str:
        return " or ".join(str(each).lower() for each in self)


MAX_WIDTH, MAX_DEPTH, MAX_PX = 16_384, 256, 4096  # several times those of any published network
_FLAG = Choice((True, False))
_SHARE = Range(float, 0, 1)
KEYWORDS: dict[str, Range | Choice] = {
    "img_size": Range(int, 1, MAX_PX), "patch_size": Range(int, 1, 1024),
    "embed_dim": Range(int, 1, MAX_WIDTH), "depth": Range(int, 0, MAX_DEPTH),
    "num_heads": Range(int, 1, 1024), "num_kv_heads": Range(int, 1, 1024),
    "mlp_ratio": Range(float, 1 / 64, 64), "init_values": Range(float, 0, 100),
    "in_chans": Range(int, 1, 16),
    "reg_tokens": Range(int, 0, 1024), "num_reg_tokens": Range(int, 0, 1024),
    "rope_temperature": Range(float, 1, 1e9), "rope_grid_offset": Range(float, -1024, 1024),
    "global_pool": Choice(("", "avg", "avgmax", "max", "token", "map")),
    "pos_embed": Choice(("", "none", "learn")),
    "rope_type": Choice(("cat", "axial", "mixed", "dinov3", "none")),
    "rope_grid_indexing": Choice(("ij", "xy")),
    "act_layer": Choice(("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")),
    "norm_layer": Choice(("layernorm", "rmsnorm")),
    **dict.fromkeys(
        (
            "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
            "drop_path_rate",
        ),
        _SHARE,
    ),
    **dict.fromkeys(
        (
            "qkv_bias", "qkv_fused", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias",
            "class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm",
            "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "strict_img_size",
            "swiglu_mlp", "scale_mlp", "scale_attn_inner", "attn_only_layer_scale",
            "use_abs_pos_emb", "use_rot_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias",
            "rope_rotate_half", "use_post_norm", "use_pre_transformer_norm",
            "use_post_transformer_norm", "use_fc_norm",
        ),
        _FLAG,
    ),
}  # fmt: skip


def check_keywords(what: str, options: Mapping[str, Option]) -> None:
    """Raise UsageError for a keyword that is not listed, or a value out of its range; `what` has
    them, such as "encoder 'tiny,depth=2'"."""
    for key, value in options.items():
        allowed = KEYWORDS.get(key)
        if allowed is None:
            close = near(key, KEYWORDS).partition("known:")[0]
            raise UsageError(
                f"{what}: {key!r} is no keyword of an architecture; {close}known: "
                f"{', '.join(list(KEYWORDS)[:8])} and {len(KEYWORDS) - 8} more; weights are given "
                "with --weights FILE"
            )
        if value not in allowed:
            raise UsageError(f"{what}: {key}={value!r}; {allowed} is needed")


def check_memory(build: Callable[[], nn.Module], what: str) -> None:
    """Raise UsageError where the weights of `what`, in the precision it is built in, are larger
    than the memory of this machine. `build` is run without memory (torch's meta device)."""
    with torch.device("meta"):
        values = build().state_dict().values()
    needed = sum(value.numel() * value.element_size() for value in values)
    there = psutil.virtual_memory().total
    if needed > there:
        raise UsageError(
            f"{what}: its weights would take {needed / 2**30:.0f} GiB, this machine has "
            f"{there / 2**30:.0f}; give smaller sizes"
        )
