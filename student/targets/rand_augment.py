"""RandAugment is timm's own, and draws from a word that each picture brings.

B samples of a batch.
"""

from __future__ import annotations

import importlib.util
import random
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy.typing as npt
from PIL import Image

from featcache import rng
from featcache.errors import UsageError

# A section of RandAugment's text: timm passes over some that it does not know, and takes any number
_SECTION = re.compile(
    r"(m)[0-9]{1,2}|(n)[1-9]|(p)(?:0(?:\.[0-9]{1,6})?|1)|(mstd)[0-9]{1,3}(?:\.[0-9]{1,6})?"
    r"|(mmax)[1-9][0-9]?|(inc)[01]"
)


def check_rand_augment(text: str) -> None:
    """Raise UsageError for a text that is no RandAugment of timm's."""
    first, *sections = text.split("-")
    matches = [_SECTION.fullmatch(section) for section in sections]
    names = [match[match.lastindex or 0] for match in matches if match]
    if text and (first != "rand" or len(set(names)) < len(sections)):
        raise UsageError(
            f"cannot augment with rand_augment={text!r}: allowed are rand and, joined by '-' and "
            "each at most once, m0 to m99, n1 to n9, p0 to p1, mstd0 to mstd999, mmax1 to mmax99, "
            "inc0 or inc1; give rand-m9-mstd0.5-inc1, or an empty text for none"
        )


class _ThreadRandom(threading.local):
    """Stands where timm expects the module `random`: a generator for each thread."""

    def __init__(self) -> None:
        self.generator = random.Random()  # seeded before it is drawn from

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


def draw_rand_augment(digests: rng.U64, seed: int, rounds: npt.ArrayLike) -> rng.U64:
    """digests (B, 2), rounds () or (B,) -> (B,): draw the word that each picture's RandAugment is
    seeded with."""
    return rng.words(digests, rng.stream("randaugment", seed), 1, epoch=rounds)[:, 0]


def rand_augment(
    text: str, size: int, mean: Sequence[float]
) -> Callable[[Image.Image, int], Image.Image]:
    """Return timm's RandAugment of RGB pictures, as its `create_transform` makes it for `size`
    pixels a side, `mean` of three channels in 0..1, and bicubic interpolation.

    The function takes a picture and a word of 64 bits, which all that is random comes from. Any
    number of threads may call it.
    """
    if not text:
        return lambda picture, word: picture
    own = _ThreadRandom()
    transform = _own_timm(own).rand_augment_transform(text, _hparams(size, mean))

    def augment(picture: Image.Image, word: int) -> Image.Image:
        own.generator.seed(int(word))
        # timm chooses by numpy's global generator, with the same law
        for op in own.generator.choices(transform.ops, k=transform.num_layers):
            picture = op(picture)
        return picture

    return augment


def _own_timm(own: _ThreadRandom) -> ModuleType:
    """Run timm's file once more, as a module that nobody else sees, and let it draw from `own`.

    timm's operations draw from the module-level `random`, which threads share, so that results
    would depend on timing. A seed set there, or another `random` in timm's own module, would change
    what others in the process see. Nothing here does, nor the other `posterize`.
    """
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["random"] = own
    module.NAME_TO_OP.update(
        (name, partial(_posterize, op))
        for name, op in module.NAME_TO_OP.items()
        if op is module.posterize
    )
    return module


def _posterize(
    timms: Callable[..., Image.Image], picture: Image.Image, bits: int, **options: Any
) -> Image.Image:
    """Keep no bits where timm's level says so, one time in 44 at m9-mstd0.5-inc1: Pillow 13 refuses
    that, and gave black before."""
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    return timms(picture, bits, **options)


def _hparams(size: int, mean: Sequence[float]) -> dict[str, Any]:
    """timm/data/transforms_factory.py:192-197."""
    return {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * part)) for part in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
