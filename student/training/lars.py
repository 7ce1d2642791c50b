"""LARS trains the heads of probes, as MAE's released code has it.

    m <- 0.9 m + q g,  w <- w - lr m,  q = 0.001 |w| / |g| for a matrix and 1 for a bias

(facebookresearch/mae util/lars.py, without weight decay). A step thus moves a matrix by 0.001 * lr
of its own length, whatever the loss: too small a learning rate shows as a head that never left its
start.
"""

from __future__ import annotations

from timm.optim import Lars
from torch import nn

from student.training.probe import ProbeOptions

# lengths of the weight; below it 1,437 digits lose points, ImageNet's protocol has 60 to 250
TRAVEL_LEAST = 3.0


def lars(head: nn.Module) -> Lars:
    """Build LARS for a head: its matrices are scaled, its biases are not.

    timm scales a group only if it has weight decay or `always_adapt`; eps 0 because MAE's ratio has
    none (a zero norm gives q = 1 in both).
    """
    parameters = list(head.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "always_adapt": True},
        {"params": [each for each in parameters if each.ndim < 2], "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def travel(learning_rates: list[float]) -> float:
    """Return the most that a matrix can move, in its own lengths: 0.001 lr a step, ten times over
    by the momentum of 0.9."""
    return 0.01 * sum(learning_rates)


def travel_note(learning_rates: list[float], blr: float, options: ProbeOptions) -> str:
    """Return advice where the head cannot move far enough, else nothing."""
    moved = travel(learning_rates)
    if moved >= TRAVEL_LEAST:
        return ""
    wanted = float(f"{2 * TRAVEL_LEAST * blr / moved:.2g}")
    return (
        f"the head could move only {moved:.2g} of its own length: --blr {blr:g} over "
        f"{options.epochs} epochs is too small for {options.pictures} pictures; try --blr "
        f"{wanted:g} with --batch-size 256 or less, or more --epochs"
    )
