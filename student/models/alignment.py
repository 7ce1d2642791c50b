"""An alignment head compares a student's visible tokens with a frozen teacher's levels; MaskAlign
and MR-Align share it.

Student blocks s = 1..S give x_s, the teacher's level t gives y_t and h_t = LN(y_t) without affine.
For each aligned level t, by default

    q_t = A_t( sum_s W[t,s] x_s )          mixing first, then one Linear per teacher level (the
                                           released code's order)
    loss = sum_t weight_t * 2 * mean smooth-L1(q_t, h_t)      over pictures, CLS + visible tokens,
                                                              channels

and by the switches of the paper's ablations, `AlignmentOptions`,

    q_t = sum_s W[t,s] A_s(x_s)            adapt_then_mix: the paper's Eq. 1, an adaptor per student
                                           block
    q_t = A_t(x_t)                         layer_wise: no W

Only levels of weight > 0 exist here: a level without weight has no row of W, no adaptor and no
target to read. The released code builds and computes the heads of all levels; the loss and its
gradients are the same.

Shapes: B batch, V visible, N visible with CLS, P patches, L aligned levels, S student blocks, D
student width, Dt teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.errors import UsageError
from student.models import losses, vit

MIX_START = 0.01  # of every student block; the block of the teacher's own number starts 1 above it
BN_EPS = 1e-6
ALIGNMENTS = ("mix_then_adapt", "adapt_then_mix", "layer_wise")
MIX_STARTS = ("auto", "identity", "even")
ADAPTORS = ("linear", "norm_linear", "mlp", "mlp2")
TARGET_NORMS = ("ln", "l2", "bn", "none")
LOSSES = {"smooth_l1": losses.smooth_l1, "l2": losses.l2, "l1": losses.l1}


@dataclass(frozen=True)
class AlignmentOptions:
    """Hold how levels are aligned, by the names of `maskalign`'s settings, where they are
    explained."""

    alignment: str = "mix_then_adapt"
    mix_start: str = "auto"
    adaptor: str = "linear"
    target_norm: str = "ln"
    loss: str = "smooth_l1"
    cls_loss: bool = True


class AlignmentHead(nn.Module):
    """Hold W and the adaptors of the aligned levels, and compute their loss."""

    def __init__(
        self,
        student_depth: int,
        student_width: int,
        teacher_depth: int,
        teacher_width: int,
        weights: dict[int, float],
        options: AlignmentOptions | None = None,
    ) -> None:
        """Build W [L, S], its rows in ascending order of level; `weights` is what `aligned_levels`
        gives."""
        super().__init__()
        self.weights, self.options = dict(weights), options or AlignmentOptions()
        mixes = self.options.alignment != "layer_wise"
        if not mixes:
            _check_equal_depths("alignment=layer_wise", student_depth, teacher_depth)
        start = (
            _initial_mix(self.options.mix_start, student_depth, teacher_depth, tuple(weights))
            if mixes
            else None
        )
        self.mix = None if start is None else nn.Parameter(start)
        # student blocks that the loss looks at, from the first on: W looks at all
        self.blocks_read = student_depth if mixes else max(weights)
        blocks_adapted = self.options.alignment == "adapt_then_mix"
        numbers = range(1, student_depth + 1) if blocks_adapted else weights
        self.adaptors = nn.ModuleDict(
            {str(n): _adaptor(self.options.adaptor, student_width, teacher_width) for n in numbers}
        )

    def forward(
        self,
        outputs: Sequence[Tensor],
        features: Tensor,
        ids_keep: Tensor,
        feature_stats: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, and each level's own loss.

        outputs: S x (B,1+V,D); features (B,L,1+P,Dt), ids_keep (B,V), and for target norms other
        than ln feature_stats (B,L,1+P,2), for bn moments (L,2).
        """
        parts: dict[str, Tensor] = {}
        # Level by level: one product over stacked weights and one smooth-L1 of all five levels took
        # 1.1 times as long on a CPU, and 1.24 times the memory.
        for level, predicted, target in self.pairs(
            outputs, features, ids_keep, feature_stats, moments
        ):
            parts[f"level_{level}"] = LOSSES[self.options.loss](predicted, target)
        weighted = [
            weight * part
            for weight, part in zip(self.weights.values(), parts.values(), strict=True)
        ]
        return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}

    def pairs(
        self,
        outputs: Sequence[Tensor],
        features: Tensor,
        ids_keep: Tensor,
        feature_stats: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each aligned level's number, q_t and its target, (B,N,Dt) both, in ascending order
        of level; arguments are those of `forward`."""
        assert features.shape[1] == len(self.weights), (features.shape, tuple(self.weights))
        rows = vit.prepend_cls_id(ids_keep) if self.options.cls_loss else ids_keep + 1
        aligned = self._predictions(
            outputs if self.options.cls_loss else [x[:, 1:] for x in outputs]
        )
        for i, (level, predicted) in enumerate(zip(self.weights, aligned, strict=True)):
            target = vit.gather_tokens(features[:, i], rows)
            if self.options.target_norm != "ln":
                assert feature_stats is not None
                stats = vit.gather_tokens(feature_stats[:, i], rows)
                target = normalise_target(
                    self.options.target_norm, target, stats, None if moments is None else moments[i]
                )
            yield level, predicted, target

    def _predictions(self, outputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield q_t in ascending order of level: S x (B,N,D) -> L x (B,N,Dt)."""
        if self.mix is None:
            for level in self.weights:
                yield self.adaptors[str(level)](outputs[level - 1])
        elif self.options.alignment == "adapt_then_mix":
            yield from self._mix_blocks(
                [adapt(x) for adapt, x in zip(self.adaptors.values(), outputs, strict=True)]
            )
        else:
            for adapt, mixed in zip(self.adaptors.values(), self._mix_blocks(outputs), strict=True):
                yield adapt(mixed)

    def _mix_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        """Multiply the blocks by W: S x (B,N,E) -> (L,B,N,E)."""
        assert self.mix is not None
        with losses.autocast_off(self.mix):  # W's steps near 1 are finer than bf16's
            return torch.einsum(
                "ls,sbnd->lbnd", losses.upcast(self.mix), losses.upcast(torch.stack(list(blocks)))
            )


def normalise_target(kind: str, h: Tensor, stats: Tensor, moments: Tensor | None) -> Tensor:
    """Restore y = h * std + mean from h (B,N,Dt) and stats (B,N,2), mean and divisor of each token,
    and normalise it otherwise:

    none: y itself; l2: each token of length 1; bn: (y - m) / sqrt(v + 1e-6) with the two numbers of
    `moments`, mean m and variance v of the level over all channels and tokens of the whole batch.
    (MaskAlign's `target_norm`.)
    """
    with losses.autocast_off(h):
        stats = losses.upcast(stats)
        y = losses.upcast(h) * stats[..., 1:] + stats[..., :1]
        if kind == "l2":
            return F.normalize(y, dim=-1)
        if kind == "bn":
            assert moments is not None
            mean, variance = losses.upcast(moments).unbind()
            return (y - mean) / (variance + BN_EPS).sqrt()
        return y


def _adaptor(kind: str, student_width: int, teacher_width: int) -> nn.Module:
    """Build A: D -> Dt, of one of `ADAPTORS`."""
    last, hidden = nn.Linear(student_width, teacher_width), (student_width, student_width)
    built: nn.Module = {
        "linear": lambda: last,
        "norm_linear": lambda: nn.Sequential(vit.NORM(student_width), last),
        "mlp": lambda: nn.Sequential(nn.Linear(*hidden), nn.GELU(), last),
        "mlp2": lambda: nn.Sequential(nn.Linear(*hidden), vit.NORM(student_width), last),
    }[kind]()
    return built.apply(vit.init_linear_and_norm)


def _check_equal_depths(what: str, student_depth: int, teacher_depth: int) -> None:
    if student_depth != teacher_depth:
        raise UsageError(
            f"{what} pairs student block t with teacher level t: the student has {student_depth} "
            f"blocks, the teacher {teacher_depth}; allowed: equal depths; give another encoder or "
            "teacher, or leave it out"
        )


def _initial_mix(
    kind: str, student_depth: int, teacher_depth: int, aligned: tuple[int, ...]
) -> Tensor:
    """Return the start of W [L, S].

    identity: 0.01 everywhere and 1 more on student block t for level t; even: 1/S; auto: identity
    where the depths are equal, else even.

    With unequal depths there is no block of the same number: the released code then pairs block 12
    of 12 with level 12 of 24, silently.
    """
    if kind == "identity":
        _check_equal_depths("mix_start=identity", student_depth, teacher_depth)
    if kind == "even" or student_depth != teacher_depth:
        return torch.full((len(aligned), student_depth), 1 / student_depth)
    start = torch.full((len(aligned), student_depth), MIX_START)
    start[torch.arange(len(aligned)), torch.tensor(aligned) - 1] += 1
    return start
