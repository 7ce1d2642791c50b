"""An encoded batch on the host becomes the items that a store appends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UserError
from featcache.extraction.forward import rank_tokens
from featcache.extraction.plan import Plan
from featcache.extraction.rendering import Rendered
from featcache.models import precision
from featcache.models.contract import has_attention
from featcache.storage.statistics import FeatureStatistics
from featcache.targets.attention import mask_order
from featcache.views.draw import DrawnViews

Batch = list[tuple[Rendered, int]]  # (picture, view)
Host = dict[str, npt.NDArray[Any]]
FP16_LARGEST = 65504


@dataclass(frozen=True)
class EncodedBatch:
    """Hold a batch on the host as it will be stored, but for the order of tokens."""

    # the codec's arrays, `features` (n, L, T, ...) among them, and `feature_stats` (n, L, T, 2)
    tokens: Host
    attention: npt.NDArray[np.float32]  # (n, P), or (n, 0) where the teacher gives none
    about: FeatureStatistics  # h before encoding


def check_encoded(plan: Plan, batch: Batch, host: Host) -> EncodedBatch:
    """Check that features are finite and that attention is a softmax row; a UserError names the
    picture where it is not so."""
    for row, level in np.argwhere(~host["finite"])[:1].tolist():
        raise not_finite_error(plan, batch, row, level)
    weights = host["attention"]
    good = np.isfinite(weights).all(1) & (weights >= 0).all(1) & (weights.sum(1) <= 1 + 1e-3)
    for row in np.flatnonzero(~good)[:1].tolist():
        raise UserError(
            f"teacher {plan.teacher.name!r} gave [CLS] attention outside 0 to 1 for picture "
            f"{_of(plan, batch, row)}; weights of one softmax row are needed{_remedy(plan)}"
        )
    names = (*plan.coded_arrays, "feature_stats")
    about = FeatureStatistics(
        float(host["range"][:, 0].min()), float(host["range"][:, 1].max()), host["norms"]
    )
    return EncodedBatch({name: host[name] for name in names}, weights, about)


def not_finite_error(plan: Plan, batch: Batch, row: int, level: int) -> UserError:
    """Return the error that names the picture of a row of a batch, and the level."""
    return UserError(
        f"teacher {plan.teacher.name!r} gave non-finite features for picture "
        f"{_of(plan, batch, row)}, level {plan.levels[level]}{_remedy(plan)}"
    )


def _of(plan: Plan, batch: Batch, row: int) -> str:
    picture, view = batch[row]
    return f"{picture.key!r}, view {plan.view_numbers[view]}"


def _remedy(plan: Plan) -> str:
    if precision.execution_config(plan.teacher).precision == "fp16":
        return (
            f"; --precision fp16 ends at {FP16_LARGEST}: "
            "give --precision bf16, which has fp32's range"
        )
    return f"; finite values within {plan.codec}'s range are needed: check the weights"


def batch_items(plan: Plan, batch: Batch, answer: EncodedBatch) -> Host:
    """Return what is stored of a batch of features, but for the checksums."""
    order = order_of(plan, batch, answer.attention)
    stored: Mapping[str, npt.NDArray[Any]] = answer.tokens
    if plan.tokens == "ranked":
        stored = {
            name: rank_tokens(values, order, plan.stored_tokens) for name, values in stored.items()
        }
    pixels = (
        {"pixels": np.stack([p.proofs[view] for p, view in batch if p.proofs is not None])}
        if plan.pixels
        else {}
    )
    return {
        **stored,
        **pixels,
        **({"attention": answer.attention} if has_attention(plan.teacher) else {}),
        "mask_order": order,
        **view_items(plan, batch),
    }


def order_of(
    plan: Plan, batch: Batch, attention: npt.NDArray[np.float32]
) -> npt.NDArray[np.unsignedinteger]:
    """Return the mask order (n, P) of a batch, from the attention (n, P); (n, 0) of a teacher
    without, whose order does not look at it."""
    if not has_attention(plan.teacher):
        attention = np.zeros((len(batch), plan.teacher.patches), np.float32)
    digests = rng.key_digests(picture.key for picture, _ in batch)
    numbers = np.array([plan.view_numbers[view] for _, view in batch])
    return mask_order(plan.order, attention, digests, numbers, plan.policy.seed)


def view_items(plan: Plan, batch: Batch) -> Host:
    """Return what is stored of the views themselves, and of the files of their pictures."""
    digests = {"file_digest": np.stack([picture.file_digest for picture, _ in batch])}
    drawn = {
        name: np.stack([getattr(picture.drawn, name)[0, view] for picture, view in batch])
        for name in DrawnViews._fields
    }
    return {
        **drawn,
        "pixel_hash": np.stack([picture.hashes[view] for picture, view in batch]),
        "thumbnail": np.stack([picture.thumbnails[view] for picture, view in batch]),
        "source_size": np.array([picture.source_size for picture, _ in batch], np.int32),
        **(digests if plan.file_digests else {}),
    }
