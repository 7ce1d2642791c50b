"""Fine-tuning's learning rates at single steps are MAE's, for the head and for layers below it:
plain numbers.

ViT-B: base 5e-4 at 1024 pictures is a peak of 2e-3, 5 of 100 epochs of warm-up from 0, half a
cosine to 1e-6; ten steps an epoch, so 50 of 1000 steps warm up. A group's lr_scale multiplies all
of it, the minimum too. (facebookresearch/mae util/lr_sched.py:9-21, FINETUNE.md.)
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from student.training import optim

# Where the cosine is known: fifths of a half turn have cosines (sqrt 5 +- 1) / 4, the middle 0; one
# step beside an end is sin^2(pi / 1900) away from it.
# step -> rate of the head, of block 11 (x 0.65), of the stem (x 0.65^13)
RATES = [
    (0, 0.0, 0.0, 0.0),
    (1, 4e-5, 2.6e-5, 1.478882356407485e-7),
    (25, 1e-3, 6.5e-4, 3.697205891018713e-6),
    (49, 1.96e-3, 1.274e-3, 7.246523546396678e-6),
    (50, 2e-3, 1.3e-3, 7.394411782037427e-6),  # the peak, once
    (51, 1.999994534814067e-3, 1.299996447629143e-3, 7.394391576119800e-6),
    (240, 1.809112485877760e-3, 1.175923115820544e-3, 6.688661340302763e-6),
    (430, 1.309362485877760e-3, 8.510856158205440e-4, 4.840982696266161e-6),
    (525, 1.0005e-3, 6.50325e-4, 3.699054493964223e-6),
    (620, 6.916375141222401e-4, 4.495643841794561e-4, 2.557126291662284e-6),
    (810, 1.918875141222400e-4, 1.247268841794560e-4, 7.094476476256825e-7),
    (999, 1.005465185932971e-6, 6.535523708564314e-7, 3.717411808645608e-9),  # the last step
]
SCALES = (1.0, 0.65, 0.00369720589101871337890625)
rates = pytest.mark.parametrize(("step", "head", "block", "stem"), RATES)


def at(step: float) -> float:
    return optim.warmup_cosine(step, total=1000, warmup=50, peak=2e-3, minimum=1e-6)


def groups() -> torch.optim.AdamW:
    """Build an optimiser of three groups with the scales above, and one without a scale."""
    scaled = [{"params": [nn.Parameter(torch.ones(1))], "lr_scale": scale} for scale in SCALES]
    return torch.optim.AdamW([*scaled, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.7)


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Apply the trainer's rule; the one place to change where it bears another name."""
    optim.set_lr(optimizer, lr)


@rates
def test_rate_of_the_head(step: int, head: float, block: float, stem: float) -> None:
    assert at(step) == pytest.approx(head, rel=1e-12, abs=0)


@rates
def test_epochs_and_steps_agree(step: int, head: float, block: float, stem: float) -> None:
    """MAE counts epochs and parts of them."""
    got = optim.warmup_cosine(step / 10, total=100, warmup=5, peak=2e-3, minimum=1e-6)
    assert got == pytest.approx(head, rel=1e-9, abs=0)


@rates
def test_groups_follow_at_their_scale(step: int, head: float, block: float, stem: float) -> None:
    optimizer = groups()
    set_rates(optimizer, at(step))
    got = [group["lr"] for group in optimizer.param_groups]
    assert got == pytest.approx([head, block, stem, head], rel=1e-12, abs=0)


def test_scales_do_not_add_up() -> None:
    """A rate is set anew each step: the scale is applied to the schedule, not to the last rate."""
    optimizer = groups()
    for step in (50, 50, 50):
        set_rates(optimizer, at(step))
    got = [group["lr"] for group in optimizer.param_groups]
    assert got == pytest.approx([2e-3, 1.3e-3, 7.394411782037427e-6, 2e-3], rel=1e-12)


def test_the_first_step_changes_nothing_but_moments() -> None:
    """Warm-up begins at 0, so AdamW's first step leaves weights alone, decay included."""
    optimizer = groups()
    set_rates(optimizer, at(0))
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(1)
    optimizer.step()
    assert all(group["params"][0].item() == 1.0 for group in optimizer.param_groups)
