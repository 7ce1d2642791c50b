"""Write the 1,797 handwritten digits that ship with scikit-learn as labelled shards, and train a
small ViT on them.

    python -m pipelines.digits OUT

    OUT/pictures/{train,test}/CLASS/NUMBER.png   8 x 8 grey digits, enlarged bicubically to 32 x 32
    OUT/data/{train,test}-000000.tar ...         the same, packed as `featcache pack` does,
                                                 with labels
    OUT/teacher.safetensors, teacher.json        a timm ViT trained on the training digits; its
                                                 accuracy

The split is 1,400 to 397 by a seeded permutation; neither the teacher nor anything after it sees
the held-out digits.

B batch, C classes, S pixels a side.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from featcache import rng
from featcache.console.entry import entry
from featcache.console.params import LocalPath
from featcache.console.text import echo
from featcache.maintenance.pack_tars import pack
from featcache.models import weights
from featcache.models.hooks import normalise_pixels
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.views.draw import draw_views
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from student.training.optim import warmup_cosine

PX = 32
TRAIN = 1400
CLASSES = 10
SHARD_SIZE = 512
ARCHITECTURE = "vit_small_patch16_224"
OPTIONS: dict[str, Any] = {
    "img_size": PX,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
# The value of `featcache extract --teacher`, with --weights OUT/teacher.safetensors.
SPEC = f"timm:{ARCHITECTURE}," + ",".join(f"{key}={value}" for key, value in OPTIONS.items())
# The teacher is trained on the same crops as the extraction draws; a mirrored digit is another
# shape.
CROPS: dict[str, Any] = {"size": PX, "scale": (0.7, 1.0), "flip": 0.0}


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
    for part in ("train", "test"):
        pack(open_source(out / "pictures" / part), out / "data", SHARD_SIZE, seed=seed, prefix=part)


def train_teacher(
    train: Source, *, seed: int, epochs: int, batch_size: int = 64, lr: float = 2e-3
) -> VisionTransformer:
    """Train by cross-entropy on a fresh view of every digit each epoch; AdamW, one epoch of
    warm-up, half a cosine to 0."""
    vit = weights.build_seeded(
        lambda: timm.create_model(ARCHITECTURE, num_classes=CLASSES, **OPTIONS), start_of(seed)
    )
    assert isinstance(vit, VisionTransformer)
    assert train.labels is not None
    labels = torch.from_numpy(train.labels)
    pictures = [decode(train.read(row)) for row in range(len(train))]
    digests = rng.key_digests(train.keys)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=lr, weight_decay=0.05)
    steps = math.ceil(len(train) / batch_size)
    vit.train()
    for epoch in range(epochs):
        pixels = _views(pictures, digests, seed, epoch)
        order = torch.from_numpy(rng.permutation(len(train), seed, epoch))
        total = 0.0
        for step, rows in enumerate(order.split(batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(epoch + step / steps, total=epochs, warmup=1, peak=lr)
            loss = F.cross_entropy(vit(_normalised(vit, pixels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if epoch % 5 == 4 or epoch == epochs - 1:
            echo(f"teacher: epoch {epoch + 1} of {epochs}, loss {total / steps:.3f}")
    return vit.eval()


def start_of(seed: int) -> str:
    """Return the weights the teacher starts from. A student of the same seed must start elsewhere:
    one that begins as its teacher began is aligned with it by more than its targets."""
    return f"random:{1000 + seed}"


def _views(pictures: list[Image.Image], digests: rng.U64, seed: int, epoch: int) -> Tensor:
    """View number `epoch` of every picture, uint8 (n, 3, S, S)."""
    policy = Policy(**CROPS, seed=seed)
    sizes = np.array([(picture.height, picture.width) for picture in pictures])
    drawn = draw_views(policy, digests, sizes, views=[epoch])
    rendered = [
        render(picture, drawn.crop[i, 0], drawn.flip[i, 0], drawn.jitter[i, 0], PX, policy.filter)
        for i, picture in enumerate(pictures)
    ]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)


def _normalised(vit: VisionTransformer, pixels: Tensor) -> Tensor:
    """With the statistics that featcache will use for this file."""
    facts: Any = vit.pretrained_cfg
    return normalise_pixels(pixels, facts["mean"], facts["std"])


@torch.no_grad()
def accuracy(vit: VisionTransformer, source: Source) -> float:
    """Return per cent of the whole, uncropped digits that the teacher's own head gets right."""
    assert source.labels is not None
    whole = [
        render_centre(decode(source.read(row)), PX, 1.0, "bicubic") for row in range(len(source))
    ]
    logits = vit(_normalised(vit, torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2)))  # (n, C)
    return 100.0 * float((logits.argmax(1).numpy() == source.labels).mean())


@click.command()
@click.argument("out", type=LocalPath())
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the split and the teacher.",
)
@click.option(
    "--epochs",
    type=click.IntRange(2),
    default=25,
    show_default=True,
    help="Of the teacher's training.",
)
def cli(out: Path, seed: int, epochs: int) -> None:
    """Write the digits to OUT/data as labelled shards and train OUT/teacher.safetensors on the
    training part.

    \b
    Examples:
      python -m pipelines.digits digits
      python -m pipelines.digits digits-1 --seed 1 --epochs 10
    """
    torch.set_num_threads(2)
    started = time.perf_counter()
    write_shards(out, seed)
    train, test = (open_source(out / "data" / f"{part}-*.tar") for part in ("train", "test"))
    vit = train_teacher(train, seed=seed, epochs=epochs)
    save_file(vit.state_dict(), out / "teacher.safetensors")
    facts = {
        "spec": SPEC,
        "seed": seed,
        "epochs": epochs,
        "head_top1": round(accuracy(vit, test), 2),
    }
    facts["seconds"] = round(time.perf_counter() - started, 1)
    (out / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n")
    echo(
        f"{len(train)} training and {len(test)} held-out digits in {out / 'data'}; the teacher "
        f"names {facts['head_top1']} % of the held-out ones ({facts['seconds']} s): "
        f"{out / 'teacher.safetensors'}"
    )


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
