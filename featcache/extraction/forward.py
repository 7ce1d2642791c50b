"""A batch goes through the teacher and its levels are encoded, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.extraction.plan import Plan
from featcache.models import precision, tokenizer
from featcache.models.contract import Teacher
from featcache.targets import codecs
from featcache.targets import levels as target_levels


@torch.no_grad()
def run_teacher(teacher: Teacher, pixels: Tensor, levels: Sequence[int]) -> tuple[Tensor, ...]:
    """Run a teacher: uint8 (B, 3, S, S) -> y_k (B, T, D) of each level, then attention (B, P), or
    (B, 0) where it has none; of a tokenizer its ids (B, P)."""
    with precision.autocast_for(teacher):
        if isinstance(teacher, tokenizer.TokenizerTeacher):
            return (teacher.ids(pixels),)
        ys, attention = teacher(pixels, levels)
    return (*ys, attention)


@torch.no_grad()
def encode_outputs(plan: Plan, answer: tuple[Tensor, ...], count: int) -> dict[str, Tensor]:
    """Encode what the host needs of the first `count` views of a teacher's outputs."""
    if plan.is_tokenizer:
        return {tokenizer.FIELD: answer[0][:count]}
    *ys, attention = answer
    rest = encode_levels(ys, plan.codec, count, plan.device_state)
    return {**rest, "attention": attention[:count].float()}


def encode_levels(
    ys: Sequence[Tensor], codec: str, count: int, state: codecs.State
) -> dict[str, Tensor]:
    """Encode levels: y_k (B, T, D) -> the codec's arrays and `feature_stats` (n, L, T, ...); of h
    its range (L, 2) and mean norms (n, L); whether all is `finite` (n, L). `state` is the codec's,
    of these levels."""
    coded, stats, ranges, norms, finite = [], [], [], [], []
    for k, y in enumerate(ys):
        h, stat = target_levels.normalise(y[:count])
        ranges.append(torch.stack(h.aminmax()))
        norms.append(torch.linalg.vector_norm(h, dim=-1).mean(-1))
        rounded = h.to(torch.float16)
        finite.append(codecs.all_finite(rounded, stat))
        coded.append(codecs.CODECS[codec].encode(rounded[:, None], codecs.of_level(state, k)))
        stats.append(stat)
    return {
        **{name: torch.cat([level[name] for level in coded], 1) for name in coded[0]},
        "feature_stats": torch.stack(stats, 1),
        "range": torch.stack(ranges).double(),
        "norms": torch.stack(norms, 1).float(),
        "finite": torch.stack(finite, 1),
    }


def compute_targets(
    teacher: Teacher,
    pixels: Tensor,
    levels: Sequence[int],
    codec: str,
    count: int,
    state: codecs.State,
) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Compute what an extraction stores of pixels, for those who compare: uint8 (B, 3, S, S) -> the
    codec's arrays (n, L, T, ...), statistics (n, L, T, 2), attention (n, P), facts on h, all where
    the teacher is. `state` is the codec's, of these levels."""
    *ys, attention = run_teacher(teacher, pixels, levels)
    with torch.no_grad():
        rest = encode_levels(ys, codec, count, state)
    coded = {name: rest.pop(name) for name in codecs.CODECS[codec].arrays(teacher.width)}
    return coded, rest.pop("feature_stats"), attention[:count].float(), rest


def rank_tokens(
    values: npt.NDArray[Any], order: npt.NDArray[np.unsignedinteger], count: int
) -> npt.NDArray[Any]:
    """Rank tokens: (n, L, 1 + P, ...) in image order -> (n, L, count, ...): [CLS], then patches as
    `order` (n, P) ranks them."""
    out = np.empty((*values.shape[:2], count, *values.shape[3:]), values.dtype)
    for item, ranks, target in zip(values, order, out, strict=True):
        target[:, 0] = item[:, 0]
        target[:, 1:] = item[:, 1 + ranks[: count - 1].astype(np.intp)]
    return out
