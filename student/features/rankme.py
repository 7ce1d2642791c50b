"""RankMe scores features without labels, by their effective rank.

Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
Representations by Their Rank", ICML 2023, arXiv 2210.02885, eq. 1:

    RankMe(Z) = exp(-sum_k p_k log p_k),   p_k = sigma_k(Z) / sum_j sigma_j(Z) + 1e-7

The features are not centred. The value lies between 1, one direction, and about min(n, D), all
directions alike; n below D bounds it, and the paper takes 25,600 pictures. The p_k do not quite sum
to 1, so that each direction that is absent still adds 1.6e-6 of itself: 768 of them, 0.12 %.

n pictures, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-7


def rankme(features: Tensor) -> float:
    """Return the effective rank of features (n,D) of any real dtype and device.

    Features that are not all finite have none: nan. Features that are all zero have rank 0.
    Raises ValueError for another shape or for no features.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(
            f"RankMe takes features (n,D), at least one of each; given {tuple(features.shape)}"
        )
    # float64 on the CPU: in float32 a singular value of 0 comes out near 1e-7 of the largest, as
    # large as EPS, and another on each device.
    rows = features.detach().to("cpu", torch.float64)
    if not rows.isfinite().all():
        return math.nan
    sigma = torch.linalg.svdvals(rows)  # (min(n,D),)
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum() + EPS
    return float(torch.exp(-(p * p.log()).sum()))
