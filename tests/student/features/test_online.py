"""The scores of a probe equal scikit-learn's and numpy's, and its pictures are those that words of
their keys choose."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from student.features import online
from student.features.online import ProbeRows
from student.models import conv_vit, vit
from tests import student_fixtures as fx
from tests.student.test_masking import numpy_words


class Labelled:
    """Pictures k00, k01, ... without bytes."""

    spec = "SRC"
    classes = None

    def __init__(self, labels: list[int] | None, count: int = 0) -> None:
        self.labels = None if labels is None else np.array(labels)
        self.keys = [f"k{i:02d}" for i in range(count or len(labels or []))]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        raise AssertionError("no picture is read to choose them")


# --- pictures -------------------------------------------------------------------------------------


def test_rows_are_chosen_by_words_of_their_keys() -> None:
    """Three classes of 10, 5 and 3 pictures, at most 12: 4 of each at most, half of them held out,
    by numpy's own Philox."""
    labels = [7] * 10 + [8] * 5 + [9] * 3
    source = Labelled(labels)
    word = {row: int(numpy_words(key, "probe", 5, 0, 1)[0]) for row, key in enumerate(source.keys)}
    train, test = [], []
    for label, held in ((7, 2), (8, 2), (9, 1)):
        rows = sorted((row for row in word if labels[row] == label), key=word.__getitem__)[:4]
        test, train = test + rows[:held], train + rows[held:]
    found = online.choose_rows(source, 5, most=12)
    assert found.test.tolist() == sorted(test, key=word.__getitem__)
    assert found.train.tolist() == sorted(train, key=word.__getitem__)
    assert found.train_labels.tolist() == [labels[row] - 7 for row in found.train]
    assert found.test_labels.tolist() == [labels[row] - 7 for row in found.test]
    assert (found.classes, len(found.train), len(found.test)) == (3, 6, 5)
    assert online.choose_rows(source, 6, most=12).test.tolist() != found.test.tolist()


def test_a_balanced_set_gives_2048_at_most() -> None:
    found = online.choose_rows(Labelled([i % 10 for i in range(5000)]), 0)
    assert len(found.train) == len(found.test) == 1020  # 204 of each of 10 classes
    assert set(found.train.tolist()).isdisjoint(found.test.tolist())
    for labels in (found.train_labels, found.test_labels):
        assert np.bincount(labels).tolist() == [102] * 10


def test_of_too_many_classes_some_are_chosen() -> None:
    """2,000 classes of two pictures: 1,024 of them, one picture to train and one held out."""
    labels = [i // 2 for i in range(4000)]
    found = online.choose_rows(Labelled(labels), 0)
    assert found.classes == 1024
    assert sorted(found.train_labels) == sorted(found.test_labels) == list(range(1024))
    own = {number: labels[row] for number, row in zip(found.train_labels, found.train, strict=True)}
    assert [own[number] for number in found.test_labels] == [labels[row] for row in found.test]
    assert max(own.values()) > 1500  # not the first ones


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Labelled(None, 4), "its 4 pictures have no labels"),
        (Labelled([3, 3, 3]), "--probe SRC: all 3 pictures are of one class, 3; give pictures of"),
        (
            Labelled([1, 1, 2, 4, 4, 5]),
            "--probe SRC: 2 of 4 classes have one picture, the first is 2; a class needs 2",
        ),
    ],
)
def test_pictures_that_no_probe_can_be_made_of(source: Labelled, text: str) -> None:
    with pytest.raises(UserError, match=text):
        online.choose_rows(source, 0)


def test_crops_are_those_of_an_evaluation(tmp_path: Path) -> None:
    """By Pillow: the shorter side to 32 / 0.875, then the middle. p03 is 47 x 43 pixels, p00 44 x
    40."""
    source = open_source(fx.save_pictures(tmp_path, 5))
    crops = online.centre_crops(source, [3, 0], 32)
    assert crops.shape == (2, 32, 32, 3)
    for crop, name, size in ((crops[0], "p03", (40, 37)), (crops[1], "p00", (40, 37))):
        picture = Image.open(tmp_path / f"{name}.png").resize(size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(crop, np.asarray(picture.crop((4, 2, 36, 34))))


def test_a_picture_that_cannot_be_decoded_is_one_line(tmp_path: Path) -> None:
    fx.save_pictures(tmp_path, 2)
    (tmp_path / "p00.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--probe .*: cannot decode the picture 'p00'"):
        online.centre_crops(open_source(tmp_path), [0, 1], 32)


# --- features -------------------------------------------------------------------------------------


def crops_of(count: int) -> online.U8:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def normalised(crops: online.U8) -> Tensor:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((crops / 255 - mean) / std).transpose(0, 3, 1, 2)).float()


def test_cls_after_the_final_norm_is_the_feature() -> None:
    """By the blocks of the encoder, one after the other, in batches of two and one."""
    encoder = vit.build(fx.ENCODER, img_size=32, patch_size=8).eval()
    torch.nn.init.uniform_(encoder.norm.weight)
    crops = crops_of(3)
    found = online.embed(encoder, crops, torch.device("cpu"), batch_size=2)
    with torch.no_grad():
        every = torch.arange(16).expand(3, -1)
        expected = encoder.norm(vit.encode(encoder, normalised(crops), every)[-1])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_without_cls_the_mean_of_the_patches_is_the_feature() -> None:
    text = "tiny,stage1=8,stage2=12,embed_dim=16,depth=2,num_heads=2"
    encoder = conv_vit.build(text, img_size=32, patch_size=16).eval()
    crops = crops_of(2)
    found = online.embed(encoder, crops, torch.device("cpu"))
    with torch.no_grad():
        outputs, _ = encoder.encode(normalised(crops), torch.arange(4).expand(2, -1))
        expected = encoder.norm(outputs[-1]).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- scores ---------------------------------------------------------------------------------------


def features_of(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of four classes that overlap, on scales of 0.1 to 10, and one channel that is
    constant."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, n)
    centres = np.random.default_rng(9).normal(size=(4, width))
    x = (centres[labels] * 0.4 + draw.normal(size=(n, width))) * np.geomspace(0.1, 10, width) + 3
    x[:, 0] = 2.0
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("width", [12, 80])  # below and above the 50 pictures
def test_ridge_scores_are_scikit_learns(width: int) -> None:
    """Ridge regression to one-hot labels on standardised channels, alpha = 0.1 x 50."""
    (train, labels), (test, _) = features_of(50, width, 0), features_of(30, width, 1)
    scaler = StandardScaler().fit(train.double().numpy())
    model = Ridge(alpha=5.0).fit(scaler.transform(train.double().numpy()), np.eye(4)[labels])
    expected = model.predict(scaler.transform(test.double().numpy()))
    found = online.ridge_scores(train, labels, test, 4)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def rows_of(train: Tensor, test: Tensor, classes: int) -> ProbeRows:
    none = np.zeros(0, np.int64)
    return ProbeRows(none, train.numpy(), none, test.numpy(), classes)


def test_scores_are_those_of_second_implementations() -> None:
    """k-NN: scikit-learn's, 20 neighbours by cosine that vote with exp(cosine / 0.07)."""
    (train, labels), (test, wanted) = features_of(60, 8, 0), features_of(40, 8, 1)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.numpy(), test.numpy())]
    voter = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    near = voter.fit(unit[0], labels).predict(unit[1])
    model = Ridge(alpha=6.0)
    scaler = StandardScaler().fit(train.double().numpy())
    model.fit(scaler.transform(train.double().numpy()), np.eye(4)[labels])
    linear = model.predict(scaler.transform(test.double().numpy())).argmax(1)
    found = online.scores(train, test, rows_of(labels, wanted, 4))
    assert found["probe_knn"] == pytest.approx(100 * (near == wanted.numpy()).mean())
    assert found["probe_linear"] == pytest.approx(100 * (linear == wanted.numpy()).mean())
    sigma = np.linalg.svd(torch.cat([train, test]).double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert found["rankme"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert 30 < found["probe_knn"] < 100  # neither chance nor all


def test_few_pictures_are_neighbours_of_all() -> None:
    """Two training pictures: both vote, the nearer one wins."""
    train, test = torch.eye(2), torch.tensor([[1.0, 0.2], [0.1, 1.0], [1.0, 0.9]])
    found = online.scores(train, test, rows_of(torch.tensor([0, 1]), torch.tensor([0, 1, 1]), 2))
    assert found["probe_knn"] == pytest.approx(200 / 3)


def test_features_that_are_not_finite_have_no_score() -> None:
    train, test = torch.eye(2), torch.tensor([[1.0, math.nan]])
    found = online.scores(train, test, rows_of(torch.tensor([0, 1]), torch.tensor([0]), 2))
    assert set(found) == {"probe_knn", "probe_linear", "rankme"}
    assert all(map(math.isnan, found.values()))


def test_alike_features_have_scores() -> None:
    """An encoder that has collapsed gives one feature to all pictures: chance, and no error."""
    found = online.scores(
        torch.ones(6, 8),
        torch.ones(4, 8),
        rows_of(torch.tensor([0, 1, 2] * 2), torch.tensor([0, 1, 2, 2]), 3),
    )
    assert found["probe_linear"] == found["probe_knn"] == 25.0
    assert found["rankme"] == pytest.approx(1, abs=1e-4)


def test_cosines_are_means_over_pictures_and_tokens() -> None:
    """Two batches of two pictures and one; two tokens each. cos: 1, 0; -1, 1; 0.6, 0.6."""
    e, f = [1.0, 0.0], [0.0, 2.0]
    first = (torch.tensor([[e, e], [e, f]]), torch.tensor([[e, f], [[-3.0, 0.0], f]]))
    second = (torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]), torch.tensor([[e, e]]))
    batches = [{"images": torch.zeros(2)}, {"images": torch.zeros(1)}]
    pairs: dict[int, Any] = {2: {"cosine_7": first}, 1: {"cosine_7": second}}
    found = online.cosines(lambda batch: pairs[len(batch["images"])], batches)
    assert found == {"cosine_7": pytest.approx((1 + 0 - 1 + 1 + 0.6 + 0.6) / 6)}


def test_the_encoder_may_have_any_prefix() -> None:
    """Registers come after [CLS], which is first."""
    tokens = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    encoder = SimpleNamespace(num_prefix_tokens=2, forward_features=lambda images: tokens)
    found = online.embed(encoder, crops_of(2), torch.device("cpu"))
    assert torch.equal(found, tokens[:, 0])


def test_a_picture_of_another_shape_is_cropped(tmp_path: Path) -> None:
    Image.new("RGB", (90, 20), (10, 20, 30)).save(tmp_path / "wide.png")
    Image.new("L", (20, 70), 7).save(tmp_path / "tall.png")
    crops = online.centre_crops(open_source(tmp_path), [0, 1], 16)
    assert crops[0].reshape(-1, 3).tolist() == [[7, 7, 7]] * 256
    assert crops[1].reshape(-1, 3).tolist() == [[10, 20, 30]] * 256
