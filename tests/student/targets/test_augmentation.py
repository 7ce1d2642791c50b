"""Erasing, mixup and cutmix follow timm's laws, from the seed, the key and the round alone."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from timm.data import mixup as timm_mixup
from timm.data import random_erasing

from featcache import rng
from featcache.errors import UsageError
from student.targets import augmentation
from student.targets.augmentation import Augmentation
from tests import stand_in_device as stand_in

SIZE = 32
MANY = rng.key_digests(str(i) for i in range(4000))
seeds = st.integers(0, 2**63 - 1)
sizes = st.integers(1, 300)


@pytest.mark.parametrize(
    "given_values",
    [
        {"erasing": 1.5},
        {"erasing": -0.1},
        {"mixup": -1.0},
        {"mixup": 1e-9},
        {"cutmix": float("inf")},
        {"mix_prob": float("nan")},
        {"switch_prob": 2.0},
        {"smoothing": -1e-9},
    ],
)
def test_absurd_numbers_are_refused(given_values: dict[str, float]) -> None:
    ((name, value),) = given_values.items()
    with pytest.raises(UsageError, match=rf"{name}={value}: \S+ to \S+ is allowed; 0 leaves"):
        Augmentation(**given_values)  # type: ignore[arg-type]


def test_defaults_are_maes() -> None:
    assert vars(Augmentation()) == {
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_prob": 1.0,
        "switch_prob": 0.5,
        "smoothing": 0.1,
    }


# --- where erasing falls --------------------------------------------------------------------------


class TimmsErasing:
    """Stands for `random` in timm's file: the words of one picture, in the order they are for."""

    def __init__(self, words: rng.U64) -> None:
        first, _seed, *self.tries = rng.uniform(words)
        self.first, self.asked = first, 0  # the next try's number, doubled

    def random(self) -> float:
        return float(self.first)

    def uniform(self, low: float, high: float) -> float:
        attempt, part = divmod(self.asked, 2)
        self.asked += 1
        return float(low + (high - low) * self.tries[4 * attempt + part])

    def randint(self, low: int, high: int) -> int:
        """Both ends are included; the row comes before the column."""
        attempt, part = self.asked // 2 - 1, 2 + self.asked % 2
        self.asked += 1
        return int(low + math.floor((high + 1 - low) * self.tries[4 * attempt + part]))


def box_of(filled: torch.Tensor) -> list[int]:
    """(S, S) bool -> top, left, height, width."""
    if not filled.any():
        return [0, 0, 0, 0]
    rows, columns = filled.any(1).nonzero()[:, 0], filled.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    return [top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left]


def timms_box(erasing: float, size: int) -> list[int]:
    image = torch.zeros(1, size, size)
    eraser = random_erasing.RandomErasing(erasing, mode="pixel", device="cpu")
    return box_of(eraser(image)[0] != 0)


def test_boxes_are_timms_given_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    option, rounds = Augmentation(erasing=0.9), np.arange(4000)
    ours = augmentation.draw_erasing(option, MANY, 5, rounds, SIZE)["erase_box"]
    words = rng.words(MANY, rng.stream("erasing", 5), 42, epoch=rounds)
    later = 0
    for box, row in zip(ours[:1500], words, strict=False):
        numbers = TimmsErasing(row)
        monkeypatch.setattr(random_erasing, "random", numbers)
        assert box.tolist() == timms_box(0.9, SIZE)
        later += numbers.asked > 4
    assert later > 5  # some first tries do not fit


def test_share_and_law_of_boxes_are_timms() -> None:
    option = Augmentation(erasing=0.25)
    ours = augmentation.draw_erasing(option, MANY, 1, 0, SIZE)["erase_box"]
    ours = ours[ours[:, 2] > 0]
    assert abs(len(ours) / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    state = random.getstate()
    random.seed(0)
    theirs = np.array([timms_box(1.0, SIZE) for _ in range(2000)])
    random.setstate(state)
    for law in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]):
        assert stats.ks_2samp(law(ours), law(theirs)).pvalue > 0.01
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01


def test_erasing_is_literally_this() -> None:
    """Of seed 7: six pictures, shown 0 to 2 times before; whatever the batch."""
    option, keys = Augmentation(erasing=0.5), rng.key_digests("abcdef")
    rounds = np.array([0, 1, 2, 0, 1, 2])
    drawn = augmentation.draw_erasing(option, keys, 7, rounds, SIZE)
    boxes = [[2, 21, 23, 10], [7, 18, 11, 11], [6, 7, 9, 9]]
    assert drawn["erase_box"].tolist() == [[0] * 4, [0] * 4, *boxes, [0] * 4]
    assert drawn["erase_seed"][:3].tolist() == [
        8326673504904460052,
        362415150159709663,
        9183626213273714371,
    ]
    alone = augmentation.draw_erasing(option, keys[2:3], 7, 2, SIZE)
    assert {name: value.tolist() for name, value in alone.items()} == {
        "erase_box": boxes[:1],
        "erase_seed": [9183626213273714371],
    }
    assert [value.dtype for value in drawn.values()] == [np.int32, np.int64]


@given(seeds, sizes, st.floats(0, 1))
def test_boxes_lie_inside(seed: int, size: int, erasing: float) -> None:
    drawn = augmentation.draw_erasing(Augmentation(erasing=erasing), MANY[:50], seed, seed, size)
    top, left, height, width = drawn["erase_box"].T
    for low, length in ((top, height), (left, width)):
        assert ((low >= 0) & (length >= 0) & (low + length <= size)).all()
        assert (length < size).all()
    assert (drawn["erase_seed"] >= 0).all()


def test_certain_and_no_erasing() -> None:
    every, none = (
        augmentation.draw_erasing(Augmentation(erasing=share), MANY, 0, 0, SIZE)["erase_box"]
        for share in (1.0, 0.0)
    )
    assert (every[:, 2:] > 0).all()
    assert not none.any()


# --- what erasing fills ---------------------------------------------------------------------------

MASK = 2**64 - 1


def normals(seed: int, count: int) -> list[float]:
    """SplitMix64 and Box-Muller, in Python's own numbers."""
    pairs = []
    for i in range(1, -(-count // 2) + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & MASK
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        high, low = divmod(z ^ (z >> 31), 2**32)
        radius, angle = math.sqrt(-2 * math.log((high + 0.5) / 2**32)), math.tau * low / 2**32
        pairs.append((radius * math.cos(angle), radius * math.sin(angle)))
    cosines, sines = zip(*pairs, strict=True)
    return [*cosines, *sines][:count]


def test_words_are_split_mixs() -> None:
    """The first outputs for the seed 1234567, as published with other implementations."""
    words = augmentation._split_mix(torch.tensor([1234567]), 5)[0].tolist()
    assert [word % 2**64 for word in words] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_box_is_filled_and_the_rest_stays() -> None:
    images = torch.arange(2 * 3 * 25, dtype=torch.float32).view(2, 3, 5, 5)
    boxes = torch.tensor([[1, 2, 3, 2], [0, 0, 0, 0]], dtype=torch.int32)
    filled = augmentation.erase(images.clone(), boxes, torch.tensor([2**63 - 1, 4]))
    want = images.clone()
    noise = torch.tensor(normals(2**63 - 1, 75)).view(3, 5, 5)
    want[0, :, 1:4, 2:4] = noise[:, 1:4, 2:4]
    torch.testing.assert_close(filled, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(filled[1], images[1])


def some_batch(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = augmentation.draw_erasing(Augmentation(erasing=0.5), MANY[:count], 3, 0, SIZE)
    boxes, seeds = (torch.from_numpy(drawn[name]) for name in ("erase_box", "erase_seed"))
    return torch.zeros(count, 3, SIZE, SIZE), boxes, seeds


def test_the_numbers_do_not_depend_on_the_batch() -> None:
    images, boxes, seeds = some_batch(20)
    together = augmentation.erase(images.clone(), boxes, seeds)
    for i in range(20):
        one = slice(i, i + 1)
        assert torch.equal(augmentation.erase(images[one], boxes[one], seeds[one]), together[one])


def test_nothing_waits_for_the_device() -> None:
    """Boxes may lie here or there, and the numbers are the same; mixing waits for nothing too."""
    images, boxes, seeds = some_batch(6)
    lam, labels = torch.tensor(0.25), torch.arange(6)
    with stand_in.installed() as queue:

        def there(values: torch.Tensor) -> torch.Tensor:
            return values.pin_memory().to(stand_in.DEVICE, non_blocking=True)

        filled = augmentation.erase(there(images), there(boxes), there(seeds))
        from_host = augmentation.erase(there(images), boxes, seeds)
        mixed = augmentation.mix_images(filled, there(lam), there(boxes[1]))
        targets = augmentation.mix_targets(there(labels), 6, there(lam), 0.1)
        assert queue.syncs == []
        got = [values.tolist() for values in (filled, from_host, mixed, targets)]
    want = augmentation.erase(images, boxes, seeds)
    mixed_here = augmentation.mix_images(want, lam, boxes[1])
    targets_here = augmentation.mix_targets(labels, 6, lam, 0.1)
    assert got == [values.tolist() for values in (want, want, mixed_here, targets_here)]


@pytest.mark.gpu
def test_a_gpu_gives_the_hosts_numbers_and_is_not_waited_for() -> None:
    images, boxes, seeds = some_batch(20)
    on_gpu = images.cuda(), boxes.cuda(), seeds.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        filled = augmentation.erase(*on_gpu)
        from_host = augmentation.erase(on_gpu[0].clone(), boxes, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = augmentation.erase(images, boxes, seeds)
    for got in (filled, from_host):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)


def test_numbers_are_normal_and_unlike_their_neighbours() -> None:
    images, seeds = torch.zeros(8, 3, 64, 64), torch.arange(8)
    boxes = torch.tensor([[0, 0, 64, 64]] * 8)
    noise = augmentation.erase(images, boxes, seeds).double()
    assert stats.kstest(noise.flatten()[::3], "norm").pvalue > 0.01
    halves = [(noise[..., 1:], noise[..., :-1]), (noise[..., 1:, :], noise[..., :-1, :])]
    halves += [(noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])]
    halves += [(noise.view(8, 2, -1)[:, 0], noise.view(8, 2, -1)[:, 1])]  # of one word
    for a, b in halves:
        for power in (1, 2):
            correlation = np.corrcoef(a.flatten() ** power, b.flatten() ** power)[0, 1]
            assert abs(correlation) < 4 / math.sqrt(a.numel())


# --- mixup and cutmix -----------------------------------------------------------------------------


def on_host(drawn: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(drawn["mix_lam"]), torch.from_numpy(drawn["mix_box"])


def timms_numbers(seed: int, step: int) -> Any:
    """Stands for numpy in timm's file: one step's words, in the order they are for."""
    digest = rng.key_digests(["batch"])
    words = rng.words(digest, rng.stream("mixup", seed), 5, epoch=step)
    is_mixed, switch, quantile, *centre = map(float, rng.uniform(words)[0])
    coins = iter([is_mixed, switch])
    places = iter(centre)

    def randint(low: int, high: int, size: None) -> int:
        return low + math.floor((high - low) * next(places))

    numbers = SimpleNamespace(
        rand=lambda: next(coins),
        beta=lambda a, b: stats.beta.ppf(quantile, a, b),
        randint=randint,
    )
    return SimpleNamespace(random=numbers, sqrt=np.sqrt, clip=np.clip)


@pytest.mark.parametrize(
    "option",
    [
        Augmentation(),
        Augmentation(mixup=0),
        Augmentation(cutmix=0, smoothing=0.0),
        Augmentation(mixup=0.2, cutmix=3.0, mix_prob=0.6, switch_prob=0.8),
    ],
)
def test_pictures_and_targets_are_timms(
    option: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm mixes the first with the last: in its order our neighbours stand at both ends."""
    images, labels = torch.randn(6, 3, 9, 9), torch.tensor([3, 1, 4, 1, 5, 0])
    order, kinds = [0, 2, 4, 5, 3, 1], set()
    for step in range(60):
        lam, box = on_host(augmentation.draw_mix(option, 11, step, 9))
        monkeypatch.setattr(timm_mixup, "np", timms_numbers(11, step))
        theirs = timm_mixup.Mixup(
            option.mixup,
            option.cutmix,
            prob=option.mix_prob,
            switch_prob=option.switch_prob,
            label_smoothing=option.smoothing,
            num_classes=7,
        )
        want, want_targets = theirs(images[order].clone(), labels[order])
        mixed = augmentation.mix_images(images, lam, box)
        targets = augmentation.mix_targets(labels, 7, lam, option.smoothing)
        torch.testing.assert_close(mixed[order], want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(targets[order], want_targets, rtol=1e-5, atol=1e-6)
        kinds.add("cutmix" if box.any() else "none" if lam == 1 else "mixup")
    on = {"mixup": option.mixup, "cutmix": option.cutmix, "none": option.mix_prob < 1}
    assert kinds >= {kind for kind, is_on in on.items() if is_on}
    assert option.mixup or "mixup" not in kinds
    assert option.cutmix or "cutmix" not in kinds


def test_mixup_by_hand() -> None:
    images = torch.tensor([0.0, 4.0, 8.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mixed = augmentation.mix_images(images, torch.tensor(0.75), torch.zeros(4, dtype=torch.int32))
    assert torch.equal(mixed, torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2))


def test_cutmix_by_hand() -> None:
    """Top 0, left 1, height 2, width 1; the last of three keeps its own, to the bit."""
    images = torch.arange(12.0).view(3, 1, 2, 2) / 7
    box = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    mixed = augmentation.mix_images(images, torch.tensor(0.5), box)
    want = torch.tensor([[0, 5, 2, 7], [4, 1, 6, 3], [8, 9, 10, 11]]).view(3, 1, 2, 2) / 7
    assert torch.equal(mixed, want)


def test_targets_by_hand() -> None:
    """Four classes and a smoothing of 0.2: 0.85 on, 0.05 off."""
    targets = augmentation.mix_targets(torch.tensor([0, 1, 2]), 4, torch.tensor(0.75), 0.2)
    want = [[0.65, 0.25, 0.05, 0.05], [0.25, 0.65, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]
    torch.testing.assert_close(targets, torch.tensor(want))
    assert targets.dtype == torch.float32


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_mix_stay(count: int) -> None:
    images, box = torch.randn(count, 3, 4, 4), torch.tensor([0, 0, 2, 2])
    assert torch.equal(augmentation.mix_images(images, torch.tensor(0.75), box), images)
    labels = torch.zeros(count, dtype=torch.int64)
    hot = torch.eye(2)[labels]
    assert torch.equal(augmentation.mix_targets(labels, 2, torch.tensor(0.75), 0.0), hot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_type(dtype: torch.dtype) -> None:
    images, boxes, seeds = some_batch(4)
    images = images.to(dtype)
    assert augmentation.erase(images, boxes, seeds).dtype == dtype
    assert augmentation.mix_images(images, torch.tensor(0.3), boxes[0]).dtype == dtype


def draws(option: Augmentation, steps: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = [augmentation.draw_mix(option, 2, step, size) for step in range(steps)]
    return np.stack([d["mix_lam"] for d in drawn]), np.stack([d["mix_box"] for d in drawn])


@pytest.mark.slow
def test_shares_and_law_of_lambda() -> None:
    option = Augmentation(mixup=0.8, mix_prob=0.7, switch_prob=0.4)
    lam, box = draws(option, 4000, 224)
    cut = box[:, 2] > 0
    for share, want in ((cut.mean(), 0.28), ((lam == 1).mean(), 0.3)):
        assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / 4000) + 0.01
    assert stats.kstest(lam[~cut & (lam < 1)], stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_mix_is_literally_this() -> None:
    """Of seed 7, steps 0 to 2."""
    lam, box = zip(
        *[on_host(augmentation.draw_mix(Augmentation(), 7, s, 32)) for s in range(3)], strict=True
    )
    assert [round(float(part), 6) for part in lam] == [0.543554, 0.505859, 0.202252]
    assert [part.tolist() for part in box] == [[0, 0, 0, 0], [10, 9, 22, 23], [0, 0, 0, 0]]
    assert lam[0].dtype == torch.float32
    assert box[0].dtype == torch.int32


@given(seeds, st.integers(0, 2**40), sizes, st.floats(0.01, 100), st.floats(0.01, 100))
def test_lambda_is_what_the_box_leaves(
    seed: int, step: int, size: int, mixup: float, cutmix: float
) -> None:
    drawn = augmentation.draw_mix(Augmentation(mixup=mixup, cutmix=cutmix), seed, step, size)
    lam, (top, left, height, width) = float(drawn["mix_lam"]), drawn["mix_box"].tolist()
    assert 0 <= lam <= 1
    assert min(top, left, height, width) >= 0
    assert max(top + height, left + width) <= size
    assert (height > 0) == (width > 0)
    if not height:
        assert (top, left) == (0, 0)
    else:
        assert lam == pytest.approx(1 - height * width / size**2, abs=1e-6)


@given(
    st.lists(st.integers(0, 4), max_size=7), st.floats(0, 1, width=32), st.floats(0, 1, width=32)
)
def test_targets_sum_to_one(labels: list[int], lam: float, smoothing: float) -> None:
    targets = augmentation.mix_targets(
        torch.tensor(labels, dtype=torch.int64), 5, torch.tensor(lam), smoothing
    )
    torch.testing.assert_close(targets.sum(1), torch.ones(len(labels)))
    assert (targets >= 0).all()
