"""Fine-tuning gives each layer its own learning rate: that of the head times a power of the layer
decay.

    stem ... block 1 ... block n ... head
    d^(n+1)  d^n         d^1         1

The stem is all before the blocks of tokens: patch embedding, [CLS], positions, and the convolution
stages of ConvMAE. What is neither stem nor block, such as a head, the norms beside it and a table
of positions that all blocks share, learns at the full rate (facebookresearch/mae
util/lr_decay.py:15-73; Alpha-VL/ConvMAE util/lr_decay.py; Atten4Vis/CAE furnace/optim_factory.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

# 3-D, so that the rule for 1-D parameters does not spare them; tables of relative positions decay
SPARED = ("cls_token", "pos_embed", "reg_token", "dist_token")
_STEM = re.compile(
    r"(cls_token|reg_token|dist_token|pos_embed|patch_embed\d?|norm_pre|blocks[12])(\.|$)"
)
_BLOCK = re.compile(r"blocks3?\.(\d+)\.")


def layer_of(name: str) -> tuple[float, ...]:
    """Return what orders a parameter among the layers.

    >>> [layer_of(name) for name in ("pos_embed", "blocks1.1.norm1.bias", "blocks.3.ls1.gamma")]
    [(0,), (0,), (1, 3)]
    >>> layer_of("head.weight"), layer_of("rel_pos_bias.relative_position_bias_table")
    ((inf,), (inf,))
    """
    if _STEM.match(name):
        return (0,)
    block = _BLOCK.match(name)
    return (1, int(block[1])) if block else (math.inf,)


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters, each with its `lr_scale` and `weight_decay`.

    Decay is zero for 1-D parameters, [CLS] and positions; tables of relative positions have two
    dimensions and decay, as the released codes have it.
    """
    network: Any = model
    network.group_matcher = _matcher
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        network,
        weight_decay=weight_decay,
        no_weight_decay_list=SPARED,
        layer_decay=layer_decay,
    )
    return groups


def _matcher(coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
    """Stand in for timm's matcher of a model, which puts the last norm into the last block and a
    shared table into the stem."""
    return layer_of
