"""Statistics of a shard's arrays are gathered as items pass, with the same numbers however the
stream is cut.

Range and count of non-finite values of every array; of `features` the mean L2 norm of a token as
well, before encoding, and of `attention` the mean entropy in nats of its distribution over the
patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.storage import checksums

if TYPE_CHECKING:
    from torch import Tensor

_OPAQUE = {*checksums.NAMES, "pixel_hash"}  # hashes: their range says nothing


class FeatureStatistics(NamedTuple):
    """A batch's levels are summarised before encoding, where they are, on the device."""

    low: float
    high: float
    norms: npt.NDArray[np.float32]  # (n, L): mean over tokens of the L2 norm


def stored_feature_statistics(
    codec_name: str,
    width: int,
    items: Mapping[str, npt.NDArray[Any]],
    state: Mapping[str, Tensor],
) -> FeatureStatistics:
    """Compute the same of levels as they are stored, where what was encoded is not at hand, or not
    all of it was kept, or a codec changed it. `state` is the codec's, of these levels."""
    import torch

    from featcache.targets import codecs

    codec = codecs.get_codec(codec_name)
    coded = {name: torch.from_numpy(items[name]) for name in codec.arrays(width)}
    h = codec.decode(coded, state)  # (n, L, T, D) float32
    low, high = h.aminmax()
    return FeatureStatistics(
        float(low), float(high), torch.linalg.vector_norm(h, dim=-1).mean(-1).numpy()
    )


def first_not_finite(
    items: Mapping[str, npt.NDArray[Any]], features: FeatureStatistics
) -> tuple[str, int] | None:
    """Return the name of an array with numbers that are not finite, or whose norm is not, and the
    first item that has them; None where all are."""
    for name, values in items.items():
        plain = features.norms if name == "features" else values
        if plain.dtype.kind == "f":
            bad = ~np.isfinite(plain.reshape(len(plain), -1)).all(1)
            if bad.any():
                return name, int(bad.argmax())
    return None


class Statistics:
    """Gathers minimum, maximum and sums. Means are kept as numbers per item and summed exactly at
    the end."""

    def __init__(self) -> None:
        self._range: dict[str, tuple[float, float]] = {}
        self._non_finite: dict[str, int] = {}
        self._means: dict[str, list[npt.NDArray[np.float64]]] = {"features": [], "attention": []}

    def add(self, items: Mapping[str, npt.NDArray[Any]], features: FeatureStatistics) -> None:
        for name, values in items.items():
            if name in _OPAQUE or not values.size:
                continue
            if name == "features":
                self._widen(name, features.low, features.high)
                self._means[name].append(features.norms.astype(np.float64).ravel())
                continue
            self._widen(name, values.min().item(), values.max().item())
            if values.dtype.kind == "f":
                self._non_finite[name] = self._non_finite.get(name, 0) + int(
                    np.count_nonzero(~np.isfinite(values))
                )
        if "attention" in items and len(items["attention"]):
            self._means["attention"].append(entropy(items["attention"]))

    def _widen(self, name: str, low: float, high: float) -> None:
        before = self._range.get(name, (low, high))
        self._range[name] = (min(before[0], low), max(before[1], high))
        self._non_finite.setdefault(name, 0)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return {min, max, non_finite, norm or entropy} of each array as plain numbers."""
        out: dict[str, dict[str, Any]] = {
            name: {"min": low, "max": high, "non_finite": self._non_finite[name]}
            for name, (low, high) in self._range.items()
        }
        for name, word in (("features", "norm"), ("attention", "entropy")):
            if name in out and self._means[name]:
                values = np.concatenate(self._means[name])
                out[name][word] = math.fsum(values) / len(values)
        return out


def entropy(attention: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Compute the entropy (n,) in nats of weights (n, P), each row brought to sum 1 first."""
    weights = attention.astype(np.float64)
    p = weights / np.maximum(weights.sum(1, keepdims=True), 1e-30)
    return -(p * np.log(np.maximum(p, 1e-30))).sum(1)


def totals(
    records: Iterable[Mapping[str, Any]], before: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Merge the statistics of shards into those of the shards `before`, and keep beside them how
    many rows they are of."""
    out = {} if before is None else before
    for record in records:
        for name, facts in record["statistics"].items():
            _add(out, name, facts, record["rows"])
    return out


def merge_totals(parts: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Merge the totals of several parts into plain statistics."""
    out: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, facts in part.items():
            _add(out, name, facts, facts["rows"])
    return {
        name: {key: value for key, value in facts.items() if key != "rows"}
        for name, facts in out.items()
    }


def _add(out: dict[str, dict[str, Any]], name: str, facts: Mapping[str, Any], rows: int) -> None:
    so_far = out.setdefault(
        name, {"min": facts["min"], "max": facts["max"], "non_finite": 0, "rows": 0}
    )
    so_far["min"] = min(so_far["min"], facts["min"])
    so_far["max"] = max(so_far["max"], facts["max"])
    so_far["non_finite"] += facts["non_finite"]
    for word in ("norm", "entropy"):
        if word in facts:
            if rows and not so_far["rows"]:  # as it is: a product that is divided is rounded twice
                so_far[word] = facts[word]
            else:
                total = so_far.get(word, 0.0) * so_far["rows"] + facts[word] * rows
                so_far[word] = total / max(so_far["rows"] + rows, 1)
    so_far["rows"] += rows
