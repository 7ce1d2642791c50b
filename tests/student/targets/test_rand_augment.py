"""RandAugment is timm's, to the byte, and comes from the picture's word alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import auto_augment

from featcache import rng
from featcache.errors import UsageError
from student.targets import rand_augment as ours_module
from student.targets.augmentation import Augmentation
from student.targets.rand_augment import draw_rand_augment, rand_augment
from tests.conftest import waves

MAE = "rand-m9-mstd0.5-inc1"
# every operation of both lists, each nine times a picture
MANY = ("rand-m9-mstd0.5-p1-n9-inc1", "rand-m7-mstd101-mmax20-p1-n9-inc0")
MEAN = (0.485, 0.456, 0.406)
WORDS = [2**64 - 1, 0, 1, *(0x9E3779B97F4A7C15 * i % 2**64 for i in range(1, 38))]


def picture(size: int = 32) -> Image.Image:
    return Image.fromarray(waves(size, size))


def timms(text: str, size: int = 32) -> Any:
    """The RandAugment in the middle of timm's own pipeline."""
    pipeline = timm.data.create_transform(
        size, is_training=True, auto_augment=text, interpolation="bicubic", mean=MEAN
    )
    (found,) = (part for part in pipeline.transforms if isinstance(part, auto_augment.RandAugment))
    return found


@pytest.fixture
def global_random() -> Iterator[None]:
    """The shared generators are left as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])  # noqa: NPY002
    torch.set_rng_state(kept[2])


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the upper bits: the rule of every Pillow before 13, which refuses 0 of them."""
    return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)


@pytest.mark.usefixtures("global_random")
@pytest.mark.parametrize("text", [MAE, *MANY, "rand", "rand-m30-n3-p0.25-mmax30"])
@pytest.mark.parametrize("size", [32, 224])
def test_bytes_are_those_of_timms_pipeline(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_augment.ImageOps, "posterize", posterize)
    theirs, ours = timms(text, size), rand_augment(text, size, MEAN)
    for word in WORDS[:12]:
        random.seed(word)
        want = picture()
        for op in random.choices(theirs.ops, k=theirs.num_layers):
            want = op(want)
        assert ours(picture(), word).tobytes() == want.tobytes()


@pytest.mark.parametrize("size", [32, 224])
def test_what_no_operation_reads_is_timms_too(size: int) -> None:
    """The distance of an absolute translation, say."""
    (hparams,) = {repr(op.hparams) for op in timms(MAE, size).ops}
    assert repr(ours_module._hparams(size, MEAN) | {"magnitude_std": 0.5}) == hparams


def test_corners_that_turning_leaves_have_the_means_colour() -> None:
    turned = rand_augment("rand-m9-p1-n1-inc1", 32, (1.0, 0.0, 0.5))
    grey = Image.new("RGB", (32, 32), (90, 90, 90))
    corners = {turned(grey, word).getpixel((0, 0)) for word in range(200)}
    assert (255, 0, 128) in corners


@pytest.mark.parametrize(
    "text", ["rand-m10-p1-n1-inc1", "rand-m0-p1-n1", "rand-m30-p1-n1-mmax30-inc1"]
)
def test_no_bits_are_black(text: str) -> None:
    """Pillow 13 refuses to keep no bits, which timm's levels ask for."""
    augment = rand_augment(text, 32, MEAN)
    black = Image.new("RGB", (32, 32)).tobytes()
    assert black in {augment(picture(), word).tobytes() for word in range(200)}


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def states() -> tuple[str, ...]:
    """Every generator that the process shares."""
    shared = (random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())  # noqa: NPY002
    return tuple(map(repr, shared))


@pytest.mark.usefixtures("global_random")
@pytest.mark.parametrize("text", [MAE, *MANY])
def test_nothing_is_drawn_from_shared_generators(text: str) -> None:
    augment, results = rand_augment(text, 32, MEAN), []
    for seed in (0, 1):
        seed_all(seed)
        before = states()
        results.append([augment(picture(), word).tobytes() for word in WORDS])
        assert states() == before
    assert results[0] == results[1]
    assert len(set(results[0])) > len(WORDS) / 2  # the word matters


def test_others_see_timm_as_it_was() -> None:
    operations = dict(auto_augment.NAME_TO_OP)
    rand_augment(MAE, 32, MEAN)(picture(), 3)
    assert auto_augment.random is random
    assert operations == auto_augment.NAME_TO_OP
    assert sys.modules["timm.data.auto_augment"] is auto_augment


@pytest.mark.parametrize("text", MANY)
def test_threads_at_once_give_the_bytes_of_one(text: str) -> None:
    augment, threads = rand_augment(text, 32, MEAN), 4
    alone = [augment(picture(), word).tobytes() for word in WORDS]
    start, interval = threading.Barrier(threads), sys.getswitchinterval()

    def work(first: int) -> list[bytes]:
        start.wait()
        turned = WORDS[first:] + WORDS[:first]
        return [augment(picture(), word).tobytes() for word in turned]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)
    for first, result in enumerate(results):
        assert result == alone[first:] + alone[:first]


def test_an_empty_text_changes_nothing() -> None:
    assert rand_augment("", 32, MEAN)(picture(), 5).tobytes() == picture().tobytes()


def test_words_are_literally_these() -> None:
    """Of seed 7: two pictures, shown 0 and 3 times before; alone or together."""
    digests = rng.key_digests(["a", "b"])
    want = [2427808366823918853, 7914138998926572071]
    assert draw_rand_augment(digests, 7, np.array([0, 3])).tolist() == want
    assert draw_rand_augment(digests[1:], 7, 3).tolist() == want[1:]


@pytest.mark.parametrize(
    "text",
    [
        "augmix-m5-w4-d2",
        "original-mstd0.5",
        "3a",
        "rand-",
        "rand-m9-",
        "rand-mm9",
        "rand-m9-m5",
        "rand-m9.5",
        "rand-m100",
        "rand-m-1",
        "rand-m٣",
        "rand-n0",
        "rand-n10",
        "rand-p1.5",
        "rand-p.5",
        "rand-mstdinf",
        "rand-mstdnan",
        "rand-mmax0",
        "rand-inc2",
        "rand-tweights",
        "rand-w0",
        "rand-foo",
        "Rand-m9",
        " ",
        "rand-m9\n",
        "\x1b[31mrand",
    ],
)
def test_another_text_is_refused_in_one_line(text: str) -> None:
    parts = r"rand_augment=.*allowed are.*give rand-m9-mstd0\.5-inc1"
    with pytest.raises(UsageError, match=parts) as told:
        Augmentation(rand_augment=text)
    assert str(told.value).isprintable()
