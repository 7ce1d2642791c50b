"""Alignment of a student's visible tokens with a frozen teacher's levels: the head MaskAlign and MR-Align share.

Student blocks s = 1..S give x_s, the teacher's level t gives h_t = LN(y_t) without affine. For each aligned level t

    q_t = A_t( sum_s W[t,s] x_s )          mixing first, then one Linear per teacher level (the released code's order)
    loss = sum_t weight_t * 2 * mean smooth-L1(q_t, h_t)      over pictures, CLS + visible tokens, channels

Only levels of weight > 0 exist here: a level without weight has no row of W, no adaptor and no target to read. The
released code builds and computes the heads of all levels; the loss and its gradients are the same.

Shapes: B batch, V visible, P patches, L aligned levels, S student blocks, D student width, Dt teacher width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcache.errors import UsageError
from student import losses, vit

MIX_START = 0.01  # of every student block; the block of the teacher's own number starts 1 above it


def parse_levels(text: str) -> list[int] | None:
    """The levels that `align_levels` names: None for auto, [-K] for last:K, else the numbers of the list."""
    if text == "auto":
        return None
    kind, colon, count = text.partition(":")
    if kind == "last" and colon and count.isdecimal() and int(count) > 0:
        return [-int(count)]
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        return sorted({int(part) for part in parts})
    raise UsageError(
        f"cannot read align_levels={text!r}; allowed: auto, last:K, or block numbers from 1 such as 8,10,12; change it "
        "with align_levels=VALUE"
    )


def levels(level_weights: str, align_levels: str, teacher_depth: int) -> dict[int, float]:
    """The aligned teacher levels (block numbers from 1, ascending) and their weights, those of weight 0 left out.

    `auto` aligns what the weights name: the last K for top:K, the last for last, all for mean and linear-decay.

    >>> levels("top:2", "auto", 12)
    {11: 0.5, 12: 0.5}
    >>> levels("mean", "8,12", 12)
    {8: 0.5, 12: 0.5}
    """
    chosen = parse_levels(align_levels)
    if chosen is None:
        kind, count = losses.parse_level_weights(level_weights)
        chosen = [-{"top": count, "last": 1}.get(kind, teacher_depth)]
    if chosen[0] < 0:
        _check_depth(-chosen[0], level_weights, align_levels, teacher_depth)
        chosen = list(range(teacher_depth + chosen[0] + 1, teacher_depth + 1))
    _check_depth(chosen[-1], level_weights, align_levels, teacher_depth)
    weights = losses.level_weights(level_weights, len(chosen))
    return {level: weight for level, weight in zip(chosen, weights, strict=True) if weight > 0}


def _check_depth(needed: int, level_weights: str, align_levels: str, teacher_depth: int) -> None:
    if needed > teacher_depth:
        raise UsageError(
            f"cannot align levels: level_weights={level_weights} with align_levels={align_levels} needs {needed} "
            f"levels; allowed: the teacher's {teacher_depth}; give fewer, as in level_weights=top:{teacher_depth}, "
            "or teacher_depth=N of a deeper teacher"
        )


class Align(nn.Module):
    """W and the adaptors of the aligned levels, and their loss."""

    def __init__(
        self, student_depth: int, student_width: int, teacher_depth: int, teacher_width: int, weights: dict[int, float]
    ) -> None:
        """`weights` is what `levels` gives; W is [L, S], its rows in ascending order of level."""
        super().__init__()
        self.weights = dict(weights)
        self.mix = nn.Parameter(_mix_start(student_depth, teacher_depth, tuple(weights)))
        self.adaptors = nn.ModuleDict({str(level): nn.Linear(student_width, teacher_width) for level in weights})
        for adaptor in self.adaptors.values():
            assert isinstance(adaptor, nn.Linear)
            nn.init.xavier_uniform_(adaptor.weight)
            nn.init.zeros_(adaptor.bias)

    def forward(self, outputs: list[Tensor], features: Tensor, ids_keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """outputs: S x (B,1+V,D); features (B,L,1+P,Dt), ids_keep (B,V) -> the loss, and each level's own loss."""
        assert features.shape[1] == len(self.weights), (features.shape, tuple(self.weights))
        with losses.autocast_off(self.mix):  # W's steps near 1 are finer than bf16's
            mixed = torch.einsum("ls,sbnd->lbnd", losses.promote(self.mix), losses.promote(torch.stack(outputs)))
        rows = vit.with_cls(ids_keep)
        parts: dict[str, Tensor] = {}
        # Level by level: a smooth-L1 over all levels at once would keep one more float32 copy of all of them.
        for i, level in enumerate(self.weights):
            target = vit.select(features[:, i], rows)
            parts[f"level_{level}"] = losses.smooth_l1(self.adaptors[str(level)](mixed[i]), target)
        weighted = [weight * part for weight, part in zip(self.weights.values(), parts.values(), strict=True)]
        return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}


def _mix_start(student_depth: int, teacher_depth: int, aligned: tuple[int, ...]) -> Tensor:
    """W [L, S]: 0.01 everywhere and 1 more on student block t for level t; 1/S where the depths differ.

    With unequal depths there is no block of the same number: the released code then pairs block 12 of 12 with level 12
    of 24, silently.
    """
    if student_depth != teacher_depth:
        return torch.full((len(aligned), student_depth), 1 / student_depth)
    start = torch.full((len(aligned), student_depth), MIX_START)
    start[torch.arange(len(aligned)), torch.tensor(aligned) - 1] += 1
    return start
