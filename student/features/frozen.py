"""Frozen encoders and the features they give to labelled pictures.

An evaluation never looks at a run folder or a teacher: it takes a `Frozen`, which turns uint8 pixels into one feature
row a picture, and `embed_source`, which turns a source of pictures into feature rows. A student's feature is its CLS
token after the encoder's own final norm (MAE's protocol; a MaskAlign student never trains that norm, and the published
numbers read through it all the same); a teacher's feature is its own output, f = gamma * LN(y_T) + beta.

n pictures, V views of each, S pixels a side, T = prefix + P tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL.Image import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from featcache import rng, teachers
from featcache.errors import UsageError, UserError, near
from featcache.pictures.open_source import PictureError, Source, decode
from featcache.views import draw as views

POOLS = ("cls", "mean")
CROP_PCT = 0.875  # 256 -> 224, the centre crop of MAE's and DINO's evaluations
DECODE_THREADS = 4  # Pillow frees the interpreter while it decodes and resizes

Progress = Callable[[str, int, int], None]  # stage, pictures (or epochs) done, of how many


@dataclass(frozen=True)
class Frozen:
    """A frozen network: `forward` maps uint8 pixels to pooled features, `to` moves its weights to a device."""

    name: str
    img_size: int
    pool: str
    forward: Callable[[Tensor], Tensor]
    to: Callable[[str], object]

    def embed(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B,3,S,S) -> features (B,D) float32, on the device of the pixels, without gradients."""
        with torch.no_grad():
            return self.forward(pixels).float()


def from_run(run: Path, pool: str = "cls", ema: bool = False) -> Frozen:
    """The encoder of a training run, or the average of its weights: CLS, or the mean of the patch tokens, after its
    final norm."""
    from student.checkpoint import load_encoder  # imports the trainer's side; a teacher needs none of it

    _check_pool(pool)
    encoder, config = load_encoder(run, ema)
    return from_encoder(encoder, int(config["img_size"]), str(run), pool)


def from_encoder(encoder: nn.Module, img_size: int, name: str, pool: str = "cls") -> Frozen:
    """A timm VisionTransformer that reads ImageNet-normalised pixels."""
    _check_pool(pool)
    prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
    if pool == "cls" and prefix == 0:
        raise UsageError(f"cannot pool the CLS token of {name}: its encoder has none; give --pool mean")
    encoder.eval().requires_grad_(False)

    def forward(pixels: Tensor) -> Tensor:
        tokens = encoder.forward_features(_normalised(pixels))  # type: ignore[operator]  # (B,T,D), normed
        return _pooled(tokens, pool, prefix)

    return Frozen(name, img_size, pool, forward, encoder.to)


def from_teacher(spec: str, weights: str | None = None, pool: str = "cls") -> Frozen:
    """A teacher's own output f = gamma * LN(y_T) + beta (CLIP's ln_post), before any projection."""
    _check_pool(pool)
    teacher = teachers.load(spec, weights)
    tail = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in teacher.tail().items()}
    if "gamma" not in tail:
        raise UserError(
            f"cannot take the output of teacher {spec!r}: it has no final norm on its tokens (it pools first); "
            "give a teacher with one, such as dino-b16"
        )

    def forward(pixels: Tensor) -> Tensor:
        (last,), _ = teacher(pixels, (teacher.depth,))  # y_T (B,1+P,D)
        gamma, beta = tail["gamma"].to(pixels.device), tail["beta"].to(pixels.device)
        f = F.layer_norm(last.float(), last.shape[-1:], gamma, beta, float(tail["eps"]))
        return _pooled(f, pool, prefix=1)

    return Frozen(spec, teacher.input_px, pool, forward, teacher.to)


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        raise UsageError(f"unknown pool {pool!r}: {near(pool, POOLS)}")


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 (B,3,S,S) -> float32 with ImageNet's mean and deviation taken out."""
    mean = pixels.new_tensor(IMAGENET_DEFAULT_MEAN, dtype=torch.float32).view(3, 1, 1)
    std = pixels.new_tensor(IMAGENET_DEFAULT_STD, dtype=torch.float32).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def _pooled(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """(B,T,D) -> (B,D); `prefix` tokens (CLS, registers) come before the patches."""
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Labels and the held-out split
# ---------------------------------------------------------------------------------------------------------------------


def labels_of(source: Source) -> npt.NDArray[np.int64]:
    """(n,) class numbers, or the error that says how pictures get them."""
    if source.labels is None:
        raise UserError(
            f"cannot evaluate on {source.spec}: its {len(source)} pictures have no labels; labels are class folders "
            "(SRC/CLASS/picture.png) or the .cls members of webdataset tars; arrange the pictures so, or pack them "
            "with python -m pipelines.pack_images"
        )
    return np.asarray(source.labels, np.int64)


def class_count(train: Source) -> int:
    """Classes by name where the source names them, else one more than the largest number."""
    return len(train.classes) if train.classes is not None else int(labels_of(train).max()) + 1


def labels_as(source: Source, train: Source) -> npt.NDArray[np.int64]:
    """(n,) the labels of `source` in the numbering of `train`: class folders are matched by name, not by position."""
    labels = labels_of(source)
    if source.classes is None or train.classes is None:
        if int(labels.max()) >= class_count(train):
            raise UserError(
                f"cannot score {source.spec}: it has class {int(labels.max())}, the training pictures have classes "
                f"0 to {class_count(train) - 1}; give training and test pictures with the same classes"
            )
        return labels
    number = {name: index for index, name in enumerate(train.classes)}
    unknown = sorted(set(source.classes) - set(number))
    if unknown:
        raise UserError(
            f"cannot score {source.spec}: {len(unknown)} of its classes are not among the training pictures', the "
            f"first is {unknown[0]!r} ({near(unknown[0], number)[:300]}); "
            "give training and test pictures with the same classes"
        )
    return np.array([number[name] for name in source.classes], np.int64)[labels]


@dataclass
class Subset:
    """Some rows of a source, itself a source with the same class numbers."""

    source: Source
    rows: list[int]
    spec: str

    def __post_init__(self) -> None:
        self.keys: Sequence[str] = [self.source.keys[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        return self.source.read(self.rows[index])

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        labels = self.source.labels
        return None if labels is None else labels[self.rows]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes


def split(source: Source, fraction: float = 0.2, seed: int = 0) -> tuple[Subset, Subset]:
    """(train, test): a picture is held out when the word of its key falls below `fraction`.

    A picture keeps its side whatever else is in the folder, so adding pictures never moves one from test to train.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"cannot hold out {fraction:g} of the pictures: the fraction lies between 0 and 1; give 0.2")
    raw = rng.words(rng.key_digests(source.keys), rng.stream("held-out", seed), 1)[:, 0]
    held = rng.uniform(raw) < fraction
    train = Subset(source, np.flatnonzero(~held).tolist(), f"{source.spec} (train part)")
    test = Subset(source, np.flatnonzero(held).tolist(), f"{source.spec} (held-out part)")
    if not len(train) or not len(test):
        raise UserError(
            f"cannot hold out {fraction:g} of {len(source)} pictures: {len(train)} are left to train and {len(test)} "
            "to test, both need at least one; give more pictures, another seed, or test pictures of their own"
        )
    return train, test


# ---------------------------------------------------------------------------------------------------------------------
# Pictures to features
# ---------------------------------------------------------------------------------------------------------------------


def embed_source(
    frozen: Frozen,
    source: Source,
    view_numbers: Sequence[int] | None = None,
    *,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress | None = None,
    crop_pct: float = CROP_PCT,
    seed: int = 0,
    stage: str = "features",
) -> tuple[Tensor, Tensor]:
    """Features (V,n,D) float32 and labels (n,) int64, both on the CPU.

    `view_numbers` None is the centre crop (V = 1); else those augmented views of each picture, drawn under `seed`.
    Every picture is decoded once; at most two batches of pixels are held.
    """
    labels = torch.from_numpy(labels_of(source))
    count = 1 if view_numbers is None else len(view_numbers)
    draw = _centre(source, frozen.img_size, crop_pct)
    if view_numbers is not None:
        draw = _augmented(source, frozen.img_size, view_numbers, seed)
    frozen.to(device)
    parts: list[Tensor] = []
    done = 0
    for pixels in _batches(draw, len(source), max(1, batch_size // count)):  # (b,V,3,S,S)
        flat = [frozen.embed(chunk.to(device)).cpu() for chunk in pixels.flatten(0, 1).split(batch_size)]
        parts.append(torch.cat(flat).unflatten(0, pixels.shape[:2]))
        done += len(pixels)
        if progress is not None:
            progress(stage, done, len(source))
    return torch.cat(parts).transpose(0, 1).contiguous(), labels


def policy_of(img_size: int, seed: int) -> views.Policy:
    """The training views of the linear protocol: crops of (0.08, 1) by MAE's own sampler, bicubic, flip; no jitter."""
    return views.Policy(size=img_size, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=seed)


def _centre(source: Source, size: int, crop_pct: float) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Row -> (1,S,S,3)."""
    if not 0 < crop_pct <= 1:
        raise UsageError(f"cannot take a centre crop of {crop_pct:g}: --crop-pct is above 0 and at most 1; give 0.875")
    return lambda row: views.centre(_picture(source, row), size, crop_pct, "bicubic")[None]


def _augmented(
    source: Source, size: int, view_numbers: Sequence[int], seed: int
) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Row -> (V,S,S,3): the boxes come from the picture's key and the view numbers, whatever the batch."""
    policy = policy_of(size, seed)

    def pixels(row: int) -> npt.NDArray[np.uint8]:
        picture = _picture(source, row)
        digest = rng.key_digests([source.keys[row]])
        drawn = views.draw(policy, digest, np.array([[picture.height, picture.width]]), views=view_numbers, clamp=True)
        return np.stack(
            [
                views.render(picture, drawn.crop[0, v], drawn.flip[0, v], drawn.jitter[0, v], size, policy.filter)
                for v in range(len(view_numbers))
            ]
        )

    return pixels


def _picture(source: Source, row: int) -> Image:
    try:
        return decode(source.read(row))
    except PictureError as error:
        raise UserError(
            f"cannot decode the picture {source.keys[row]!r} of {source.spec}: {error}; an evaluation counts "
            "every labelled picture: repair it or take it out of the source"
        ) from error


def _batches(draw: Callable[[int], npt.NDArray[np.uint8]], n: int, rows: int) -> Iterator[Tensor]:
    """uint8 (b,V,3,S,S) in source order; the next batch decodes while the caller embeds this one."""
    pool = ThreadPoolExecutor(DECODE_THREADS)
    ahead: list[Future[npt.NDArray[np.uint8]]] = []
    try:
        for start in range(0, n, rows):
            current, ahead = ahead, [pool.submit(draw, row) for row in range(start, min(start + rows, n))]
            if current:
                yield _stacked(current)
        if ahead:
            yield _stacked(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(futures: list[Future[npt.NDArray[np.uint8]]]) -> Tensor:
    return torch.from_numpy(np.stack([future.result() for future in futures])).permute(0, 1, 4, 2, 3).contiguous()
