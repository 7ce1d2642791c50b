"""AdamW decays one of two groups of parameters, LARS trains the heads of probes, and MAE's learning
rate is a function of the step.

The schedule is a plain function rather than a scheduler object: resuming is arithmetic, and no
wrapper can step it twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lars, param_groups_weight_decay
from torch import nn

from student.config import TrainConfig

# 3-D in the MAE family, so the rule for 1-D parameters does not spare them; the released
# pre-training code decays them, probably unintended. We do not, unless decay_tokens asks for it.
TOKENS = ("cls_token", "mask_token", "pos_embed", "decoder_pos_embed")

# (step, steps of the whole run) -> learning rate
Schedule = Callable[[int, int], float]

# devices with torch's fused kernel of AdamW; on a CPU it takes a third of the time
FUSED = ("cpu", "cuda")


def param_groups(
    model: nn.Module, weight_decay: float, decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Return two groups of the trainable parameters, `decay` and `no_decay`, each in the model's
    own order.

    By timm's rule 1-D parameters, biases and the model's `no_weight_decay()` are not decayed; nor
    are tokens, unless `decay_tokens` asks for it.
    """
    spared = set(getattr(model, "no_weight_decay", set)())
    if not decay_tokens:
        names = [name for name, _ in model.named_parameters()]
        spared |= {name for name in names if name.rpartition(".")[2] in TOKENS}
    # At a decay of 0 timm makes one group of all; checkpoints number the parameters by two.
    split = param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=spared)
    decayed = {bool(group["weight_decay"]): group["params"] for group in split}
    groups = [
        {"name": "decay", "params": decayed.get(True), "weight_decay": weight_decay},
        {"name": "no_decay", "params": decayed.get(False), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, config: TrainConfig, lr: float) -> torch.optim.AdamW:
    """Build AdamW with the recipe's betas and decay, fused where the device has that kernel: move
    the model there first. A model may give groups of its own, with an `lr_scale` each."""
    own = getattr(model, "param_groups", None)
    groups = param_groups(model, config.weight_decay, config.decay_tokens) if own is None else own()
    fused = all(parameter.device.type in FUSED for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=fused)


def lars(head: nn.Module) -> Lars:
    """Build LARS for a head, as MAE's released code has it (facebookresearch/mae util/lars.py),
    without weight decay: m <- 0.9 m + q g, w <- w - lr m, q = 0.001 |w| / |g| for a matrix and 1
    for a bias.

    timm scales a group only if it has weight decay or `always_adapt`; eps 0 because MAE's ratio has
    none (a zero norm gives q = 1 in both).
    """
    parameters = list(head.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "always_adapt": True},
        {"params": [each for each in parameters if each.ndim < 2], "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def peak_lr(config: TrainConfig, global_batch: int) -> float:
    """Return `lr` where the user set it, else blr * global_batch / 256 (global: per process *
    accumulation * processes)."""
    return config.lr if config.lr is not None else config.blr * global_batch / 256


def schedule(config: TrainConfig, global_batch: int, steps_per_epoch: int) -> Schedule:
    """Return the learning rate of a recipe as a function of step and length of the run."""

    def rate(step: int, total: int) -> float:
        return warmup_cosine(
            step,
            total=total,
            warmup=round(config.warmup_epochs * steps_per_epoch),
            peak=peak_lr(config, global_batch),
            minimum=config.min_lr,
            repeat_peak=config.repeat_peak,
        )

    return rate


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step, times the scale of each group that has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def warmup_cosine(
    at: float,
    *,
    total: float,
    warmup: float,
    peak: float,
    minimum: float = 0.0,
    repeat_peak: bool = False,
) -> float:
    """Return the learning rate at a point of a run that is `total` long, both in steps or both in
    epochs: linear from 0 to the peak, then half a cosine down to the minimum.

    With `repeat_peak`, in steps, the warm-up reaches the peak at its last step, so that two steps
    have it; a warm-up of one step stays at 0 (Atten4Vis/CAE furnace/utils.py at 1016f85).

    >>> [warmup_cosine(at, total=6, warmup=2, peak=1.0) for at in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> [warmup_cosine(at, total=6, warmup=2, peak=1.0, repeat_peak=True) for at in (0, 1, 2, 4)]
    [0.0, 1.0, 1.0, 0.5]
    """
    if at < warmup:
        return peak * at / (max(warmup - 1, 1) if repeat_peak else warmup)
    if at >= total:
        return minimum
    done = (at - warmup) / (total - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * done))
