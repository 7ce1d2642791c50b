"""Frozen encoders, the held-out split and the features of a source are compared with hand-made
numbers and numpy."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from featcache import rng, teachers
from featcache.errors import UsageError, UserError
from featcache.models.precision import fp32_products
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.views import draw as view_draw
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from student import checkpoint
from student.features import frozen as fz
from student.features.labels import Subset, class_count, labels_as, labels_of, split_holdout
from tests.student import toy_task as toys

TINY = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


class Pictures:
    """A source in memory that counts its reads."""

    def __init__(
        self,
        blobs: list[bytes],
        keys: list[str],
        labels: list[int] | None,
        classes: list[str] | None = None,
    ):
        self.spec, self.blobs, self.keys, self.classes = "pictures", blobs, keys, classes
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.reads: list[int] = []
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.blobs)

    def read(self, index: int) -> bytes:
        with self.lock:
            self.reads.append(index)
        return self.blobs[index]


def noise(n: int, seed: int = 0) -> Pictures:
    draw = np.random.default_rng(seed)
    blobs = [png(draw.integers(0, 256, (20 + i % 5, 24, 3), np.uint8)) for i in range(n)]
    return Pictures(blobs, [f"k{i}" for i in range(n)], [i % 3 for i in range(n)])


def raw_pixels(size: int = 8) -> fz.FrozenEncoder:
    """Features are the pixels themselves, so that every view can be compared to the byte."""
    return toys.encoder(lambda pixels: pixels.flatten(1)[:, None].expand(-1, 2, -1), size=size)


def embedded(
    source: Pictures, views: list[int] | None = None, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (V,n,D) and labels (n,) of pictures whose features are their pixels."""
    task = toys.task_of(raw_pixels(), source, source, **options)  # type: ignore[arg-type]
    return task.pooled(task.train, views, stage="train")


def tiny_vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **{**TINY, **changes})
    for p in vit.parameters():  # away from the start, so that the final norm does something
        nn.init.normal_(p, std=0.3)
    return vit


def layer_norm(y: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float) -> np.ndarray:
    y = y.astype(np.float64)
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gamma + beta


def pooled(tokens: torch.Tensor, pool: str) -> torch.Tensor:
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)


# --- encoders and teachers ------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_encoder_features_are_pooled_after_the_final_norm(pool: str) -> None:
    vit = tiny_vit()
    last: list[torch.Tensor] = []
    vit.blocks[-1].register_forward_hook(lambda _, __, y: last.append(y))
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 3, 16, 16), np.uint8))
    with torch.no_grad():
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        vit.eval()(((pixels / 255.0) - mean[:, None, None]) / std[:, None, None])
    normed = layer_norm(
        last[0].numpy(), vit.norm.weight.detach().numpy(), vit.norm.bias.detach().numpy(), 1e-6
    )
    want = normed[:, 0] if pool == "cls" else normed[:, 1:].mean(1)
    frozen = fz.from_encoder(vit.train(), 16, "run")
    (tokens,) = frozen.tokens(pixels)
    got = pooled(tokens, pool)
    assert (frozen.depth, frozen.prefix) == (len(vit.blocks), 1)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_teacher_features_are_its_normed_last_level(pool: str) -> None:
    spec = "synthetic:levels=3,tokens=16,width=8,size=16"
    teacher = teachers.load(spec)
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 3, 16, 16), np.uint8))
    (y,), _ = teacher(pixels, (3,))
    tail = teacher.tail()
    f = layer_norm(y.numpy(), tail["gamma"], tail["beta"], 1e-5)
    got = fz.from_teacher(spec)
    assert (got.img_size, got.name, got.depth, got.prefix) == (16, spec, 3, 1)
    (tokens,) = got.tokens(pixels)
    np.testing.assert_allclose(
        pooled(tokens, pool).numpy(), f[:, 0] if pool == "cls" else f[:, 1:].mean(1), atol=1e-5
    )


def test_timm_teacher_equals_the_same_network_as_an_encoder_with_its_own_pixels() -> None:
    options = ",".join(f"{key}={value}" for key, value in TINY.items() if key != "num_classes")
    spec = f"timm:vit_tiny_patch16_224,{options}"
    frozen = fz.from_teacher(spec, "random:3")
    teacher = teachers.load(spec, "random:3")
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 3, 16, 16), np.uint8))
    mean, std = (torch.tensor(x)[:, None, None] for x in (teacher.pixel_mean, teacher.pixel_std))
    with torch.no_grad():
        want = teacher.vit((pixels / 255.0 - mean) / std)  # type: ignore[attr-defined]
    torch.testing.assert_close(frozen.tokens(pixels)[0][:, 0], want, rtol=1e-5, atol=1e-5)


def test_run_is_loaded_through_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load_encoder(run: Path, ema: bool, step: int | None) -> tuple[nn.Module, dict[str, int]]:
        asked.append((run, ema, step))
        return tiny_vit(), {"img_size": 16}

    monkeypatch.setattr(checkpoint, "load_encoder", load_encoder)
    monkeypatch.setattr(checkpoint, "read_config", lambda run: {"recipe": "mae"})
    got = fz.from_run(tmp_path, True, 7)
    assert (got.img_size, got.name) == (16, str(tmp_path))
    assert got.facts == {"recipe": "mae", "size": "", "checkpoint": 7, "ema": True}
    assert asked == [(tmp_path, True, 7)]
    assert got.tokens(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))[0].shape == (2, 5, 16)


def test_features_are_of_fp32_arithmetic() -> None:
    """A GPU convolves in TF32 unless it is told not to; what was set before is set again."""
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    seen = list[str]()

    def look(pixels: torch.Tensor, *rest: object) -> list[torch.Tensor]:
        seen.append(switch.fp32_precision)
        return [pixels.float().flatten(2)]

    encoder = fz.FrozenEncoder("x", 4, 1, 0, look, str)
    with fp32_products("tf32"):  # whatever this process did before
        encoder.tokens(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        assert (seen, switch.fp32_precision) == (["ieee"], "tf32")


def test_blocks_are_normed_and_come_in_the_order_asked_for() -> None:
    vit = tiny_vit()
    outputs: list[np.ndarray] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, y: outputs.append(y.detach().numpy()))
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 16, 16), np.uint8))
    depth = len(vit.blocks)
    got = fz.from_encoder(vit, 16, "run").tokens(pixels, (depth, 1))
    gamma, beta = vit.norm.weight.detach().numpy(), vit.norm.bias.detach().numpy()
    for tokens, block in zip(got, (depth, 1), strict=True):
        want = layer_norm(outputs[block - 1], gamma, beta, 1e-6)
        np.testing.assert_allclose(tokens.numpy(), want, rtol=1e-4, atol=1e-4)
    assert all(len(block._forward_hooks) == 1 for block in vit.blocks)  # the test's own


def test_a_digest_is_of_weights_and_architecture() -> None:
    digests = {
        "same": fz.from_encoder(tiny_vit(), 16, "a").digest,
        "name": fz.from_encoder(tiny_vit(), 16, "b").digest,
        "heads": fz.from_encoder(tiny_vit(num_heads=4), 16, "a").digest,
    }
    changed = tiny_vit()
    with torch.no_grad():
        changed.norm.bias[3] += 1e-3
    digests["weight"] = fz.from_encoder(changed, 16, "a").digest
    assert digests["same"] == digests["name"]
    assert len(set(digests.values())) == 3


def test_unknown_pool_and_a_missing_cls_token_are_refused() -> None:
    teacher = fz.from_teacher("synthetic")
    with pytest.raises(
        UsageError, match=r"unknown pool 'clss': did you mean cls\? known: cls, mean"
    ):
        teacher.check_pool("clss")
    bare = fz.from_encoder(tiny_vit(class_token=False, global_pool="avg", fc_norm=False), 16, "run")
    with pytest.raises(UsageError, match="its encoder has none; give --pool mean"):
        bare.check_pool("cls")
    bare.check_pool("mean")
    assert bare.prefix == 0
    assert bare.tokens(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0].shape == (1, 4, 16)


# --- features of a source -------------------------------------------------------------------------


def test_centre_features_in_source_order_for_any_batch_size() -> None:
    source = noise(7)
    want = np.stack([render_centre(decode(blob), 8, 0.875, "bicubic") for blob in source.blobs])
    for batch_size in (1, 3, 7, 100):
        features, labels = embedded(source, batch_size=batch_size)
        assert features.shape == (1, 7, 192)
        assert features.dtype == torch.float32
        np.testing.assert_array_equal(
            features[0].numpy(), want.transpose(0, 3, 1, 2).reshape(7, -1)
        )
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_augmented_views_are_the_drawn_ones() -> None:
    source = noise(4)
    policy = Policy(size=8, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=9)
    features, _ = embedded(source, [5, 2], batch_size=3, seed=9)
    assert features.shape == (2, 4, 192)
    for row, blob in enumerate(source.blobs):
        picture = decode(blob)
        sizes = np.array([[picture.height, picture.width]])
        for v, number in enumerate([5, 2]):
            one = view_draw.draw_views(
                policy, rng.key_digests([f"k{row}"]), sizes, views=[number], clamp=True
            )
            want = render(picture, one.crop[0, 0], one.flip[0, 0], one.jitter[0, 0], 8, "bicubic")
            np.testing.assert_array_equal(
                features[v, row].numpy(), want.transpose(2, 0, 1).reshape(-1)
            )


def test_each_picture_is_read_once_and_two_batches_at_most_are_held() -> None:
    source, seen = noise(20), []

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        seen.append((len(pixels), len(source.reads)))
        return pixels.flatten(1)[:, None].expand(-1, 2, -1)

    told: list[tuple[str, int, int]] = []
    task = toys.task_of(
        toys.encoder(forward), source, source, batch_size=8,
        progress=lambda *report: told.append(report),
    )  # fmt: skip
    task.pooled(task.train, [0, 1], stage="train")
    assert sorted(source.reads) == list(range(20))
    assert [count for count, _ in seen] == [4] * 10  # 4 pictures, 2 views of each
    assert all(reads <= 4 * (step // 2 + 2) for step, (_, reads) in enumerate(seen))
    assert told == [("train", done, 20) for done in (4, 8, 12, 16, 20)]


def test_a_broken_picture_is_named() -> None:
    source = noise(5)
    source.blobs[3] = b"not a picture"
    with pytest.raises(
        UserError, match=r"cannot decode the picture 'k3' of pictures: .*repair it, take it out"
    ):
        embedded(source, batch_size=2)


def test_unlabelled_pictures_are_refused_with_the_way_to_give_labels() -> None:
    source = noise(2)
    source.labels = None
    with pytest.raises(
        UserError,
        match=r"no labels; labels are class folders .*, a table, .*#labels=FILE.csv",
    ):
        labels_of(source)
    with pytest.raises(UserError, match="no labels"):
        labels_of(Subset(source, [0], "half"))


def test_crop_outside_its_range_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"centre crop of 1\.2: --crop-pct is above 0 and at most 1"
    ):
        embedded(noise(2), crop_pct=1.2)


# --- labels and the held-out split ----------------------------------------------------------------


def test_split_is_the_word_of_each_key() -> None:
    source = noise(40)
    train, test = split_holdout(source, 0.2, seed=1)
    raw = rng.words(rng.key_digests(source.keys), rng.stream("held-out", 1), 1)[:, 0]
    held = [i for i in range(40) if int(raw[i]) / 2**64 < 0.2]
    assert test.rows == held == [4, 5, 10, 13, 18, 26, 28, 32, 39]
    assert sorted(train.rows + test.rows) == list(range(40))
    assert list(test.keys) == [f"k{i}" for i in held]
    assert test.labels is not None
    assert test.labels.tolist() == [i % 3 for i in held]
    assert test.read(0) == source.blobs[held[0]]
    assert len(test) == len(held)
    assert split_holdout(source, 0.2, seed=2)[1].rows != held


def test_a_picture_keeps_its_side_when_others_come() -> None:
    few, many = noise(15), noise(40)
    assert split_holdout(few, 0.3, 1)[1].rows == [
        row for row in split_holdout(many, 0.3, 1)[1].rows if row < 15
    ]


def test_a_split_with_an_empty_half_is_refused() -> None:
    with pytest.raises(UserError, match="both need at least one; give more pictures"):
        split_holdout(noise(1))
    with pytest.raises(UsageError, match="the fraction lies between 0 and 1"):
        split_holdout(noise(5), 1.0)


def test_classes_are_matched_by_name_between_folders(tmp_path: Path) -> None:
    for part, names in {"train": "abc", "test": "bc", "other": "bz"}.items():
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    train, test, other = (open_source(tmp_path / part) for part in ("train", "test", "other"))
    assert class_count(train) == 3
    assert labels_as(train, train).tolist() == [0, 1, 2]
    assert labels_as(test, train).tolist() == [1, 2]
    with pytest.raises(
        UserError,
        match="1 of its classes have no training pictures, the first is 'z'",
    ):
        labels_as(other, train)
