"""Activation checkpointing keeps nothing inside a block for the backward pass, which computes it
again.

timm's models ask for it by a switch that their own `forward` looks at; recipes call blocks one by
one, so each block is given a `forward` of its own that does the same (torch.utils.checkpoint, not
reentrant, drop path drawn alike again). What counts as a block: the members of a ModuleList or
Sequential named `blocks`, `..._blocks` or `blocks3`, as in timm, MAE's and ConvMAE's code.
"""

from __future__ import annotations

import re
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from featcache.errors import UsageError


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks of a model, by their names in it."""
    return {
        f"{name}.{number}": block
        for name, parent in model.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        and re.fullmatch(r"(.*_)?blocks\d*", name.rpartition(".")[2])
        for number, block in parent.named_children()
    }


def apply(model: nn.Module) -> None:
    """Checkpoint every block of a model; no name of a parameter changes."""
    found = blocks(model)
    if not found:
        raise UsageError(
            "--checkpoint-activations: the recipe's model has no blocks; a ModuleList named "
            "`blocks` or `..._blocks` is looked for; leave the option out"
        )
    for block in found.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
