"""Levels, statistics and masks are assembled as a recipe takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.reading.tensors import to_tensor
from featcache.targets.derived import derive
from student import masking
from student.config import RecipeConfig
from student.models import vit
from student.recipes import TargetSpec
from student.targets.contract import HostBatch


def pixel_layout(
    size: int, name: str = "pixels"
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return {name: ((size, size, 3), np.dtype(np.uint8))}


def recipe_targets(
    spec: TargetSpec,
    features: Tensor,
    stats: Tensor | None,
    tail: Mapping[str, Tensor],
    ids_keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """features (B,L,1+P,D), stats (B,L,1+P,2) -> what a recipe takes: the levels, and their stats
    where it asks for them; or `targets` (B,1+P,E) derived from the only level. For these `stats`,
    mean and divisor, are looked at where the teacher's eps is not the cache's; with `ids_keep`
    (B,V) those of CLS and these patches, the rest is NaN: a projection of 197 tokens for 50 that
    are looked at costs a percent of kd's step."""
    if not spec.derive:
        asked = (
            {"feature_stats": stats} if stats is not None and "feature_stats" in spec.fields else {}
        )
        return {"features": features, **asked}
    assert features.shape[1] == 1, features.shape
    h, std = features[:, 0], None if stats is None else stats[:, 0, :, 1:]
    if ids_keep is None:
        return {"targets": derive(spec.derive, h, tail, std)}
    ids = vit.prepend_cls_id(ids_keep)
    few = derive(
        spec.derive,
        vit.gather_tokens(h, ids),
        tail,
        None if std is None else vit.gather_tokens(std, ids),
    )
    out = few.new_full((*h.shape[:2], few.shape[-1]), float("nan"))
    return {"targets": out.scatter_(1, ids.unsqueeze(-1).expand(-1, -1, few.shape[-1]), few)}


def copied_to(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On the device, and never the host's own memory, which is filled again: on a CPU nothing else
    would copy it."""
    return to_tensor(values).to(device, non_blocking=True, copy=True)


def draw_masks(
    config: RecipeConfig, host: HostBatch, sources: dict[str, npt.NDArray[Any]], seed: int
) -> dict[str, Tensor]:
    """ids_keep and ids_masked of a batch, from (seed, round, key) and what the mask reads."""
    keep, masked = masking.draw(
        config.mask,
        digests=host["digests"],
        seed=seed,
        epoch=host["round"],
        n_visible=config.visible,
        n_patches=config.patches,
        **sources,
    )
    return {"ids_keep": torch.from_numpy(keep), "ids_masked": torch.from_numpy(masked)}
