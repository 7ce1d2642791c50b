"""Write the 1,797 handwritten digits that ship with scikit-learn as labelled shards, and train a
small ViT on them.

    python -m pipelines.digits OUT

    OUT/pictures/{train,test}/CLASS/NUMBER.png   8 x 8 grey digits, enlarged bicubically to 32 x 32
    OUT/data/{train,test}-000000.tar ...         the same, packed as `featcache pack` does,
                                                 with labels
    OUT/teacher.safetensors, teacher.json        a timm ViT trained on the training digits
                                                 (pipelines.small_teacher); its accuracy

The split is 1,400 to 397 by a seeded permutation; neither the teacher nor anything after it sees
the held-out digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from featcache import rng
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.params import BATCH, FiniteRange, LocalPath
from featcache.pictures.source import Source
from pipelines import small_teacher
from pipelines.small_teacher import BATCH_SIZE, LR, SmallTeacher, start_of

__all__ = ["start_of"]

PX = 32
TRAIN, TEST = 1400, 397
CLASSES = 10
SHARD_SIZE = 512
ARCHITECTURE = "vit_small_patch16_224"
PATCH = 4
WIDTH, DEPTH, HEADS = 128, 6, 4
# The teacher is trained on the same crops as the extraction draws; a mirrored digit is another
# shape.
CROPS: dict[str, Any] = {"size": PX, "scale": (0.7, 1.0), "flip": 0.0}


def teacher(depth: int = DEPTH) -> SmallTeacher:
    """Return the digits' teacher of so many blocks."""
    options = {
        "img_size": PX,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": depth,
        "num_heads": HEADS,
    }
    return SmallTeacher(ARCHITECTURE, options, CLASSES, CROPS)


TEACHER = teacher()
SPEC = TEACHER.spec


def write_pictures(out: Path, seed: int) -> None:
    """Write OUT/train and OUT/test as class folders of PNGs."""
    from sklearn.datasets import load_digits  # the extra [quickstart]

    digits = load_digits()
    order = rng.permutation(len(digits.target), seed, 0)
    for part, rows in (("train", order[:TRAIN]), ("test", order[TRAIN:])):
        for row in sorted(rows.tolist()):
            folder = out / part / str(digits.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            enlarge(digits.images[row]).save(folder / f"{row:04d}.png")


def enlarge(digit: npt.NDArray[np.floating]) -> Image.Image:
    """Enlarge (8, 8) in 0..16 to (32, 32) grey, ink white."""
    grey = np.rint(np.asarray(digit) * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey).resize((PX, PX), Image.Resampling.BICUBIC)


def write_shards(out: Path, seed: int) -> None:
    """Write OUT/pictures and OUT/data."""
    write_pictures(out / "pictures", seed)
    small_teacher.pack_parts(out, SHARD_SIZE, seed)


def train_teacher(train: Source, *, seed: int, epochs: int) -> VisionTransformer:
    """Train the digits' teacher; a student of the same seed starts from other weights."""
    return small_teacher.train(TEACHER, train, seed=seed, epochs=epochs)


def accuracy(vit: VisionTransformer, source: Source) -> float:
    """Return per cent of the whole, uncropped digits that the teacher's own head gets right."""
    return small_teacher.accuracy(TEACHER, vit, source)


@click.command(
    cls=Command,
    epilog="Examples:\n"
    "  python -m pipelines.digits digits\n"
    "  python -m pipelines.digits digits-1 --seed 1 --epochs 10",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("out", type=LocalPath())
@option(
    "--seed",
    group=HelpGroup.TRAINING,
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the split and the teacher.",
)
@option(
    "--epochs",
    group=HelpGroup.TRAINING,
    type=click.IntRange(2),
    default=25,
    show_default=True,
    help="Of the teacher's training.",
)
@option(
    "--depth",
    group=HelpGroup.TRAINING,
    type=click.IntRange(1, 100),
    default=DEPTH,
    show_default=True,
    help="Blocks of the teacher.",
)
@option(
    "--batch-size",
    group=HelpGroup.TRAINING,
    type=BATCH,
    default=BATCH_SIZE,
    show_default=True,
    help="Of the teacher's training.",
)
@option(
    "--lr",
    group=HelpGroup.TRAINING,
    type=FiniteRange(0, min_open=True),
    default=LR,
    show_default=True,
    help="Of the teacher's training, at its peak.",
)
def cli(out: Path, seed: int, epochs: int, depth: int, batch_size: int, lr: float) -> None:
    """Write the digits to OUT/data as labelled shards and train OUT/teacher.safetensors on the
    training part.
    """
    small_teacher.use_threads()
    write_shards(out, seed)
    small_teacher.train_from_shards(
        teacher(depth),
        out,
        what="digits",
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
    )


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
