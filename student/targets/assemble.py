"""Levels, statistics and masks are assembled as a recipe takes them.

B samples of a batch, L levels, P patches, V visible ones, D width of the teacher, E width of a
derived target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.runtime import device as devices
from featcache.targets.derived import derive
from student import masking
from student.config import TrainConfig
from student.models import vit
from student.recipes import TargetSpec
from student.targets.contract import HostBatch


def pixel_layout(
    size: int, name: str = "pixels"
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape (S, S, 3) and dtype of a view's pixels, under the name of their array."""
    return {name: ((size, size, 3), np.dtype(np.uint8))}


def recipe_targets(
    spec: TargetSpec,
    features: Tensor,
    stats: Tensor | None,
    tail: Mapping[str, Tensor],
    ids_keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what a recipe takes of features (B, L, 1 + P, D) and stats (B, L, 1 + P, 2): the
    levels, and their stats where it asks for them; or `targets` (B, 1 + P, E) derived from the only
    level.

    Stats are mean and divisor; a derived target looks at them where it needs them
    (`targets.derived`). With `ids_keep` (B, V) the targets are those of CLS and these patches, and
    the rest is NaN: a projection of 197 tokens for 50 that are looked at costs a percent of kd's
    step.
    """
    if not spec.derive:
        if stats is not None and "feature_stats" in spec.fields:
            return {"features": features, "feature_stats": stats}
        return {"features": features}
    assert features.shape[1] == 1, features.shape
    h, stats = features[:, 0], None if stats is None else stats[:, 0]
    if ids_keep is None:
        return {"targets": derive(spec.derive, h, tail, stats)}
    return {"targets": _derive_visible(spec.derive, h, stats, tail, vit.prepend_cls_id(ids_keep))}


def _derive_visible(
    name: str, h: Tensor, stats: Tensor | None, tail: Mapping[str, Tensor], ids: Tensor
) -> Tensor:
    """h (B, 1 + P, D), stats (B, 1 + P, 2), ids (B, 1 + V) -> (B, 1 + P, E), NaN beside the
    ids."""
    visible_stats = None if stats is None else vit.gather_tokens(stats, ids)
    visible = derive(name, vit.gather_tokens(h, ids), tail, visible_stats)
    out = visible.new_full((*h.shape[:2], visible.shape[-1]), float("nan"))
    return out.scatter_(1, ids.unsqueeze(-1).expand(-1, -1, visible.shape[-1]), visible)


def copy_page_locked(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small array, without waiting for the copy: through page-locked memory of its own."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if devices.is_gpu(device) else tensor).to(device, non_blocking=True)


# --- masks ----------------------------------------------------------------------------------------


def mask_of(config: TrainConfig) -> str:
    """Return the mask of a configuration that has one."""
    assert config.mask is not None
    return config.mask


def draw_masks(
    config: TrainConfig, host: HostBatch, mask_inputs: Mapping[str, Any], seed: int
) -> dict[str, Tensor]:
    """Draw ids_keep (B, V) and ids_masked (B, P - V) of a batch, from (seed, round, key) and what
    the mask reads, (B, P) each."""
    keep, masked = masking.draw(mask_of(config), **_drawn_from(config, host, seed), **mask_inputs)
    return {"ids_keep": torch.from_numpy(keep), "ids_masked": torch.from_numpy(masked)}


def draw_for_masks(config: TrainConfig, host: HostBatch, seed: int) -> dict[str, Tensor]:
    """Draw what a mask needs beside rows that only the device will know: `exponentials` (B, P)
    float64, or nothing."""
    drawn = masking.drawn(mask_of(config), **_drawn_from(config, host, seed))
    assert drawn.keys() <= {"exponentials"}, (config.mask, tuple(drawn))
    return {name: torch.from_numpy(values) for name, values in drawn.items()}


def masks_on_device(
    config: TrainConfig,
    drawn: Mapping[str, Tensor],
    mask_inputs: Mapping[str, Tensor],
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the masks that `draw_masks` would give, of what `draw_for_masks` drew and what the
    mask reads, (B, P) each; all on one device, which is not waited for."""
    order = masking.order_on_device(
        mask_of(config), drawn, mask_inputs, (batch_size, config.patches)
    )
    keep, masked = order.long().tensor_split([config.visible], dim=1)
    return {"ids_keep": keep.sort(1).values, "ids_masked": masked.sort(1).values}


def _drawn_from(config: TrainConfig, host: HostBatch, seed: int) -> dict[str, Any]:
    return {
        "digests": host["digests"],
        "seed": seed,
        "epoch": host["round"],
        "n_visible": config.visible,
        "n_patches": config.patches,
    }
