"""Weighted k-nearest-neighbour votes between rows of features.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: each
of the k rows of a bank that are nearest by cosine similarity votes for its class with
exp(similarity / temperature); k = 20, temperature = 0.07.

n queries (B in a chunk), N rows of the bank, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K, TEMPERATURE = 20, 0.07
CHUNK_ROWS = 1024  # queries compared with the whole bank at a time


def votes(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
) -> Tensor:
    """Return votes (n,C) float64, on the CPU, of the k nearest rows of `bank` (N,D) for each row of
    `queries` (n,D), both of one dtype, in which similarities are computed.

    With `leave_one_out` the queries are the bank, and no row votes for itself. A row's votes are
    divided by exp(its best similarity / temperature): the order stays, and no temperature
    overflows. k is 1 to N, or to N - 1 with `leave_one_out`.
    """
    bank = F.normalize(bank, dim=1)
    rows = []
    for number, chunk in enumerate(queries.split(CHUNK_ROWS)):
        cosine = F.normalize(chunk, dim=1) @ bank.T  # (B,N)
        if leave_one_out:
            cosine.diagonal(number * CHUNK_ROWS).fill_(-torch.inf)
        near = cosine.topk(k, dim=1)  # (B,k), largest first
        similarity, labels = near.values.double().cpu(), bank_labels[near.indices.cpu()]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        empty = torch.zeros(len(chunk), classes, dtype=torch.float64)
        rows.append(empty.scatter_add_(1, labels, weight))
    return torch.cat(rows)
