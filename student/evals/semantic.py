"""Train a linear probe on the patches that the teacher attends to.

Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation" (arXiv
2208.06049), the semantic-aware probe, by zejiangh/MILAN models_probe.py: the [CLS] row of the
attention of the teacher's last block, mean over heads, orders a picture's patches; the first
int(0.7 P) of them and [CLS] are all that the encoder sees, for training and test pictures alike.
Then MAE's linear protocol, as `linear` has it, at blr 0.05 (ViT-L: 0.02) over 100 epochs.

    student eval semantic runs/milan --images LABELLED --keep-share 0.5

The paper keeps half of the patches, the released code 70 % (mask_ratio 0.3); the default is the
code's. The teacher is that of the run and must have the weights that the run learned from:
registered ones, or those of --teacher-weights. It sees the very crop that the student sees,
rendered at its own size where that differs. A run without a teacher (mae) takes the one that
--teacher-name names.

Cost: one forward of the teacher and one, of fewer patches, of the student for every picture and
view; else that of `linear`. Features are kept by the teacher's hash, the share and the number of
patches.

What differs: the teacher's pixels are normalised by its own statistics (there by ImageNet's, as the
student's are); of patches with equal attention the first is kept; those of `linear`.

B pictures, S pixels a side, P patches, V of them kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featcache.errors import UsageError, UserError, counted
from featcache.models.contract import Teacher
from featcache.models.weights import weight_hash
from student.features import run_teacher
from student.features.task import Outcome, Task, Visible
from student.training import probe
from student.training.optim import lars
from student.training.probe import Head, Probe, ProbeOptions

OPTIONS: dict[str, tuple[Any, str]] = {
    **probe.OPTIONS,
    "epochs": (100, probe.OPTIONS["epochs"][1]),
    "blr": ("0.05", probe.OPTIONS["blr"][1]),
    "keep_share": (0.7, "share of the patches that are kept, rounded down; the paper's is 0.5"),
    **run_teacher.OPTIONS,
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {("milan", "large"): {"blr": "0.02"}}


def evaluate(
    task: Task, keep_share: float, teacher_name: str, teacher_weights: str, **options: Any
) -> Outcome:
    """Train a head on features of the patches kept, and score the test pictures by theirs."""
    chosen = ProbeOptions("semantic", len(task.train), **options)
    patches = _check(task, keep_share)
    found = run_teacher.find(_run(task), teacher_name)
    teacher = run_teacher.load(found, teacher_weights)
    _check_grid(teacher, patches)
    visible = chosen_patches(teacher, keep_share, task.device)
    made = Probe(
        chosen, lambda width, classes: Head(width, classes, task.seed), lars, tokens=False,
        visible=visible,
    )  # fmt: skip
    trained, scored = probe.run_probe(task, made)
    facts = probe.facts(made, trained)
    facts |= {"teacher": teacher.name, "weight_hash": weight_hash(teacher)}
    facts |= {"patches": patches, "kept": visible.count}
    return Outcome(scored, facts, trained.head.state_dict())


def chosen_patches(teacher: Teacher, share: float, device: str) -> Visible:
    """Choose this share of the patches, rounded down: those that the teacher attends to most."""
    teacher.to(device)
    count = int(teacher.patches * share)

    @torch.no_grad()
    def choose(pixels: Tensor) -> Tensor:
        _, attention = teacher(pixels, (teacher.depth,))
        wanted = (len(pixels), teacher.patches)
        if tuple(getattr(attention, "shape", ())) != wanted or not bool(attention.isfinite().all()):
            raise UserError(
                f"teacher {teacher.name!r} gives no attention of [CLS] to {teacher.patches} "
                "patches, by which they are chosen; a teacher with one is needed, such as clip-b16"
            )
        return most_attended(attention, count)

    name = (
        f"the first int({teacher.patches} * {share!r}) = "
        f"{counted(count, 'patch', 'patches')} by attention of "
        f"{teacher.name} {weight_hash(teacher)} at {teacher.input_px} pixels"
    )
    return Visible(name, count, choose, teacher.input_px)


def most_attended(attention: Tensor, count: int) -> Tensor:
    """Return the ids (B,V), ascending, of the `count` patches of most attention (B,P); of equal
    ones the first.

    >>> most_attended(torch.tensor([[0.1, 0.4, 0.2, 0.2]]), 2).tolist()
    [[1, 2]]
    """
    order = attention.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


# ------------------------------------------------------------ what cannot be


def _run(task: Task) -> Any:
    if task.subject.run is None:
        raise UsageError(
            "student eval semantic hides patches from a student, by its teacher's attention; "
            "--teacher evaluates a teacher: give RUN"
        )
    return task.subject.run


def _check(task: Task, share: float) -> int:
    """Return the number of patches P. Raises UsageError for what this protocol cannot read."""
    _run(task)
    if not task.frozen.hides:
        raise UsageError(
            f"cannot hide patches from the encoder of {task.frozen.name}: its positions are "
            "relative to all patches; give a run whose recipe hides them, such as milan"
        )
    if task.blocks != 1:
        raise UsageError(
            f"--blocks {task.blocks}: student eval semantic reads the last block; leave it out"
        )
    patches = task.token_shape()[0] - task.frozen.prefix
    if not 0 < share <= 1 or int(patches * share) < 1:
        raise UsageError(
            f"cannot keep {share:g} of {counted(patches, 'patch', 'patches')}: "
            "--keep-share is at most 1 and leaves one "
            "patch at least; give 0.7"
        )
    return patches


def _check_grid(teacher: Teacher, patches: int) -> None:
    if teacher.patches != patches:
        raise UserError(
            f"teacher {teacher.name!r} has "
            f"{counted(teacher.patches, 'patch', 'patches')}, the student {patches}: the "
            "attention to the one's chooses none of the other's; a teacher on the student's grid "
            "is needed, as NAME,grid=14 makes it"
        )
