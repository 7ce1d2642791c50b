"""Activation checkpointing: what happens inside a block is not kept for the backward pass but computed again there.

timm's models ask for it by a switch that their own `forward` looks at; recipes call blocks one by one, so each block is
given a `forward` of its own that does the same (torch.utils.checkpoint, not reentrant, drop path drawn alike again).
What counts as a block: the members of a ModuleList or Sequential whose name is `blocks` or ends with `_blocks`, as in
timm and in MAE's code.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from featcache.errors import UsageError


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model, by their names in it."""
    return {
        f"{name}.{number}": block
        for name, parent in model.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential) and f"_{name.rpartition('.')[2]}".endswith("_blocks")
        for number, block in parent.named_children()
    }


def apply(model: nn.Module) -> None:
    """Checkpoint every block of a model; no name of a parameter changes."""
    found = blocks(model)
    if not found:
        raise UsageError(
            "--checkpoint-activations: the recipe's model has no blocks; a ModuleList named `blocks` or `..._blocks` "
            "is looked for; leave the option out"
        )
    for block in found.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
