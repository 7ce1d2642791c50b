"""Transforms that move pixels are refused by `Dataset`, and those that change colours are not."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from featcache.errors import UsageError
from featcache.reading import transform_probe
from featcache.reading.transform_probe import check_transform
from featcache.torch import Dataset
from tests import student_fixtures as fx

FLOAT = v2.ToDtype(torch.float32, scale=True)
SIMCLR = v2.Compose([
    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
    v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5), v2.RandomSolarize(128, 0.2), FLOAT,
    v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), v2.RandomErasing(0.25),
])  # fmt: skip


class OwnGenerator:
    """Draw from a generator of its own, which can be copied."""

    def __init__(self, share: float) -> None:
        self.draw, self.share = np.random.default_rng(0), share

    def __call__(self, image: Tensor) -> Tensor:
        image = image + torch.from_numpy(self.draw.integers(0, 9, (3, 1, 1)).astype(np.uint8))
        return image.flip(2) if self.draw.random() < self.share else image


def with_a_closure() -> Callable[[Tensor], Tensor]:
    """Draw from a generator that no copy reaches: nothing can be told."""
    draw = np.random.default_rng(0)
    return lambda x: x.float() * draw.random()


COLOURS: dict[str, Any] = {
    "none": v2.Identity(),
    "float": lambda x: x.float() / 255,
    "normalise": v2.Compose([FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3)]),
    "jitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "grey": v2.Grayscale(),
    "blur": v2.GaussianBlur(23, (0.1, 2.0)),
    "wide blur": v2.GaussianBlur(51, 10.0),
    "erasing": v2.RandomErasing(1.0),
    "erasing with noise": v2.Compose([FLOAT, v2.RandomErasing(1.0, (0.02, 0.6), value="random")]),
    "blur, erased": v2.Compose([FLOAT, v2.GaussianBlur(23, 2.0), v2.RandomErasing(1.0)]),
    "solarize": v2.RandomSolarize(128, 1.0),
    "posterize": v2.RandomPosterize(2, 1.0),
    "equalize": v2.RandomEqualize(1.0),
    "autocontrast": v2.RandomAutocontrast(1.0),
    "invert": v2.RandomInvert(0.5),
    "sharpness": v2.RandomAdjustSharpness(2, 1.0),
    "channels": v2.RandomChannelPermutation(),
    "photometric": v2.RandomPhotometricDistort(),
    "jpeg": v2.JPEG((5, 50)),
    "noise": v2.Compose([FLOAT, v2.GaussianNoise()]),
    "simclr": SIMCLR,
    "a PIL image": v2.ToPILImage(),
    "an array": lambda x: x.numpy().transpose(1, 2, 0),
    "own generator": OwnGenerator(0.0),
    "a closure's generator": with_a_closure(),
    "several pictures": lambda x: [x, x],
    "it fails": lambda x: x.nothing,
}
MOVES: dict[str, Any] = {
    "flip": v2.RandomHorizontalFlip(1.0),
    "flip now and then": v2.RandomHorizontalFlip(0.1),
    "upside down": v2.RandomVerticalFlip(0.5),
    "crop": v2.RandomResizedCrop(224),
    "narrow crop": v2.RandomResizedCrop(224, (0.9, 1.0)),
    "padded crop": v2.RandomCrop(224, padding=16),
    "rotation": v2.RandomRotation(5),
    "quarter turn": lambda x: torch.rot90(x, 1, (1, 2)),
    "transposed": lambda x: x.transpose(1, 2),
    "translation": v2.RandomAffine(0, translate=(0.05, 0.05)),
    "perspective": v2.RandomPerspective(0.2, 1.0),
    "shift of 3": lambda x: x.roll(3, 2),
    "elastic": v2.ElasticTransform(100.0, 5.0),
    "RandAugment": v2.RandAugment(),
    "flip of an array": lambda x: x.numpy().transpose(1, 2, 0)[:, ::-1],
    "flip and colours": v2.Compose([v2.RandomHorizontalFlip(), SIMCLR]),
    "own generator": OwnGenerator(0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COLOURS)
def test_colours_pass(name: str) -> None:
    check_transform(COLOURS[name], 224)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_pixels_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="the transform moves pixels, and targets belong to the"):
        check_transform(MOVES[name], 224)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48, 96])
def test_small_views(size: int) -> None:
    for name in ("normalise", "jitter", "erasing", "equalize", "jpeg", "noise"):
        check_transform(COLOURS[name], size)
    for move in (v2.RandomHorizontalFlip(0.1), v2.RandomRotation(15), v2.RandomVerticalFlip()):
        with pytest.raises(UsageError, match="moves pixels"):
            check_transform(move, size)


def test_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="the transform makes 196 x 196 of 224 x 224 pixels"):
        check_transform(v2.Resize(196), 224)


def test_the_blocks_places_stay_apart() -> None:
    """Under flips and quarter turns each block comes to lie beside itself, grown by its side."""
    for place in transform_probe.PLACES:
        *_, block = transform_probe._pictures(224, place)
        assert block.sum() == 28 * 28
        grown = transform_probe._grown(block)
        turns = [np.rot90(each, k) for each in (block, block.T) for k in range(4)][1:]
        assert all((turned & ~grown).sum() > 0.2 * block.sum() for turned in turns)


def test_pictures_of_the_pair_have_one_histogram() -> None:
    one, other, block = transform_probe._pictures(64, transform_probe.PLACES[1])
    assert not torch.equal(one, other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.flatten().bincount(minlength=256), b.flatten().bincount(minlength=256))
        assert np.array_equal(np.asarray(a != b), block)


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.slow
@pytest.mark.parametrize("transform", [SIMCLR, v2.RandomHorizontalFlip()])
def test_the_generators_are_left_as_they_were(transform: Any) -> None:
    """And a transform's own: it is a copy that draws."""
    own, before = OwnGenerator(0.0), states()
    for each in (transform, own):
        with contextlib.suppress(UsageError):
            check_transform(each, 64)
    assert states() == before
    assert own.draw.random() == np.random.default_rng(0).random()


def test_a_dataset_refuses_it_and_can_be_told_not_to_look() -> None:
    flip = v2.RandomHorizontalFlip(0.5)
    with pytest.raises(UsageError, match="crops and flips are drawn by `featcache extract`"):
        Dataset(fx.pictures(), fx.cache_path(), transform=flip)
    Dataset(fx.pictures(), fx.cache_path(), transform=flip, check_transform=False)
    data = Dataset(fx.pictures(), fx.cache_path(), transform=FLOAT)
    assert data[3]["pixels"].dtype == torch.float32
