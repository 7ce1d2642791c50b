"""Classify frozen features by weighted k-nearest neighbours: no training, no seed, one number.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: cosine
similarity between the centre views of test and training pictures; each of the k nearest training
pictures votes for its class with exp(similarity / 0.07); k = 20. Here ties go to the smaller class
number, and a class without a vote is never among the top 5 (in DINO's code such classes take the
free places in whatever order the sort leaves them).

    student eval knn RUN --images LABELLED

Cost: one forward of every picture, then n_test x n_train x D multiply-adds.

n test pictures (B in a chunk), N training pictures (the bank), D width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch

from featcache.errors import UsageError
from featcache.extraction.knn import TEMPERATURE, K, votes
from featcache.pictures.source import Source
from student.evals import hits, percent
from student.features.embed import CROP_PCT, EmbedProgress, embed_source
from student.features.frozen import FrozenEncoder
from student.features.labels import class_count, labels_as

OPTIONS: dict[str, tuple[Any, str]] = {
    "k": (K, "nearest training pictures that vote"),
    "temperature": (TEMPERATURE, "a neighbour votes with exp(cosine / temperature)"),
}


def _check(k: int, temperature: float, bank: int) -> None:
    if not 1 <= k <= bank:
        raise UsageError(
            f"cannot ask {k} nearest neighbours: there are {bank} training pictures, --k is 1 to "
            f"{bank}; give a smaller --k or more training pictures"
        )
    if not temperature > 0:
        raise UsageError(
            f"cannot vote at temperature {temperature:g}: --temperature is above 0; give 0.07"
        )


def evaluate(
    frozen: FrozenEncoder,
    train: Source,
    test: Source,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_size_embed: int = 256,
    crop_pct: float = CROP_PCT,
    progress: EmbedProgress | None = None,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Return top-1 (and top-5 from five classes on) of the test pictures; `seed` is not used:
    nothing here is random."""
    _check(k, temperature, len(train))
    classes, test_labels = class_count(train), torch.from_numpy(labels_as(test, train))

    # features: the centre view of every picture
    (bank,), bank_labels = embed_source(
        frozen,
        train,
        batch_size=batch_size_embed,
        device=device,
        progress=progress,
        crop_pct=crop_pct,
        stage="train",
    )
    (rows,), _ = embed_source(
        frozen,
        test,
        batch_size=batch_size_embed,
        device=device,
        progress=progress,
        crop_pct=crop_pct,
        stage="test",
    )

    # votes: a class without one is among nobody's best
    found = votes(
        rows.to(device), bank.to(device), bank_labels, classes, k=k, temperature=temperature
    )
    voted = found.gather(1, test_labels[:, None])[:, 0] > 0
    result: dict[str, Any] = {"top1": percent(hits(found, test_labels, 1) & voted)}
    if classes >= 5:
        result["top5"] = percent(hits(found, test_labels, 5) & voted)
    return result | {
        "k": k,
        "temperature": temperature,
        "n_train": len(train),
        "n_test": len(test),
        "classes": classes,
        "features": frozen.name,
        "pool": frozen.pool,
    }
