"""This program made codecs.json: bytes of the codecs q8, t4 and t3 and what they decode to, by the
reference in float64 (tests/featcache/targets/reference_codec.py). Nothing of featcache has a part
in it.

    python -m tests.golden.make_codecs > tests/golden/codecs.json

For every width there is a state, the same for all codecs but for the table: random signs and
permutations, and a mean that fp16 holds, so that a token can be exactly its mean. Tokens are told
by name in `TOKENS`; at the largest width there are fewer, to keep the file small. An array is
written as type, shape and its bytes in base64; `decoded` is the float64 result rounded to float32.

codec_tables.json, the numbers that codes stand for, is no output: it was fixed once.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.featcache.targets import reference_codec as reference

WIDTHS = {
    64: ("normal", "outliers", "constant", "zero", "mean", "near the mean"),
    192: ("normal", "outliers", "constant", "zero", "mean", "near the mean"),
    768: ("normal", "outliers", "near the mean"),
}


def token(kind: str, mean: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """One token (D,) of a kind, as fp16 stores it."""
    noise = rng.standard_normal(mean.shape)
    spikes = np.zeros(mean.shape)
    spikes[rng.permutation(len(mean))[:3]] = 60, -60, 60
    return {
        "normal": noise,
        "outliers": noise + spikes,
        "constant": np.full(mean.shape, 0.75),
        "zero": np.zeros(mean.shape),
        "mean": mean,
        "near the mean": mean * (1 + 2.0**-10) + 1e-4 * noise,
    }[kind].astype("f2")


def written(array: npt.NDArray[Any]) -> dict[str, Any]:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def read(array: dict[str, Any]) -> npt.NDArray[Any]:
    """What `written` wrote."""
    data = np.frombuffer(base64.b64decode(array["data"]), array["dtype"])
    return data.reshape(array["shape"]).copy()


def case(width: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    rng = np.random.Generator(np.random.PCG64(width))
    mean = rng.standard_normal(width).astype("f2").astype("f4")
    state = reference.random_state("q8", width, rng)
    h = np.stack([token(kind, mean, rng) for kind in kinds])
    made = {"tokens": kinds, "h": written(h), "mean": written(mean)}
    made |= {name: written(state[name]) for name in ("signs", "order")}
    for name, bits in reference.BITS.items():
        own = state | {"table": reference.table(name)}
        coded = reference.encode(h, mean, own, bits)
        decoded = reference.decode(coded, mean, own, bits).astype("f4")
        made[name] = {"coded": written(coded), "decoded": written(decoded)}
    return made


if __name__ == "__main__":
    print(json.dumps({str(width): case(width, kinds) for width, kinds in WIDTHS.items()}, indent=1))
