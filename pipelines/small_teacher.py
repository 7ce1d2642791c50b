"""Train a small ViT with labels on a few pictures: the teacher of digits and of clip art.

The pictures are those of labelled shards, decoded once; each epoch shows a fresh view of every one,
drawn as `featcache extract` draws its own. AdamW, one epoch of warm-up, half a cosine to 0.

B batch, C classes, n pictures, S pixels a side.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from featcache import rng
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

BATCH_SIZE = 64
LR = 2e-3
TELL_S = 8.0  # seconds between two lines on how far it is


@dataclass(frozen=True)
class SmallTeacher:
    """Describe a teacher: a timm ViT with its options, and the crops it is trained on, which an
    extraction from it draws as well."""

    architecture: str
    options: Mapping[str, Any]
    classes: int
    crops: Mapping[str, Any]

    @property
    def spec(self) -> str:
        """Return the value of `featcache extract --teacher`; its --weights are the file that is
        written."""
        return f"timm:{self.architecture}," + _joined(self.options)

    @property
    def student(self) -> str:
        """Return a student's `encoder` of the same architecture, in the words that every recipe
        takes; picture and patch come from the cache."""
        own = {key: self.options[key] for key in ("embed_dim", "depth", "num_heads")}
        return f"tiny,{_joined(own)}"

    @property
    def px(self) -> int:
        """Return S, the pixels of a side."""
        return int(self.crops["size"])


def _joined(options: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())


def use_threads() -> None:
    """Take both cores, which torch leaves to one thread where they are one core's two; or as many
    as OMP_NUM_THREADS says."""
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(2)


def pack_parts(out: Path, shard_size: int, seed: int) -> None:
    """Pack the class folders OUT/pictures/{train,test} to labelled shards in OUT/data."""
    for part in ("train", "test"):
        pack(open_source(out / "pictures" / part), out / "data", shard_size, seed=seed, prefix=part)


def train(
    kind: SmallTeacher,
    source: Source,
    *,
    seed: int,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    lr: float = LR,
) -> VisionTransformer:
    """Train by cross-entropy on a fresh view of every picture each epoch."""
    vit = weights.build_seeded(
        lambda: timm.create_model(kind.architecture, num_classes=kind.classes, **kind.options),
        start_of(seed),
    )
    assert isinstance(vit, VisionTransformer)
    assert source.labels is not None
    labels = torch.from_numpy(source.labels)
    pictures = [decode(source.read(row)) for row in range(len(source))]
    digests = rng.key_digests(source.keys)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=lr, weight_decay=0.05)
    steps = math.ceil(len(source) / batch_size)
    vit.train()
    told = time.perf_counter()
    for epoch in range(epochs):
        pixels = _views(kind, pictures, digests, seed, epoch)
        order = torch.from_numpy(rng.permutation(len(source), seed, epoch))
        total = 0.0
        for step, rows in enumerate(order.split(batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(epoch + step / steps, total=epochs, warmup=1, peak=lr)
            loss = F.cross_entropy(vit(_normalised(vit, pixels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if epoch == epochs - 1 or time.perf_counter() - told > TELL_S:
            told = time.perf_counter()
            echo(f"teacher: epoch {epoch + 1} of {epochs}, loss {total / steps:.3f}")
    return vit.eval()


def start_of(seed: int) -> str:
    """Return the weights the teacher starts from. A student of the same seed must start elsewhere:
    one that begins as its teacher began is aligned with it by more than its targets."""
    return f"random:{1000 + seed}"


def _views(
    kind: SmallTeacher, pictures: list[Image.Image], digests: rng.U64, seed: int, epoch: int
) -> Tensor:
    """View number `epoch` of every picture, uint8 (n, 3, S, S)."""
    policy = Policy(**kind.crops, seed=seed)
    sizes = np.array([(picture.height, picture.width) for picture in pictures])
    drawn = draw_views(policy, digests, sizes, views=[epoch])
    rendered = [
        render(
            picture, drawn.crop[i, 0], drawn.flip[i, 0], drawn.jitter[i, 0], kind.px, policy.filter
        )
        for i, picture in enumerate(pictures)
    ]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)


def _normalised(vit: VisionTransformer, pixels: Tensor) -> Tensor:
    """With the statistics that featcache will use for this file."""
    facts: Any = vit.pretrained_cfg
    return normalise_pixels(pixels, facts["mean"], facts["std"])


@torch.no_grad()
def accuracy(kind: SmallTeacher, vit: VisionTransformer, source: Source) -> float:
    """Return per cent of the whole, uncropped pictures that the teacher's own head gets right."""
    assert source.labels is not None
    whole = [
        render_centre(decode(source.read(row)), kind.px, 1.0, "bicubic")
        for row in range(len(source))
    ]
    logits = vit(_normalised(vit, torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2)))  # (n, C)
    return 100.0 * float((logits.argmax(1).numpy() == source.labels).mean())


def train_from_shards(
    kind: SmallTeacher,
    out: Path,
    *,
    what: str,
    seed: int,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    lr: float = LR,
) -> None:
    """Train on OUT/data's training part; write OUT/teacher.safetensors and OUT/teacher.json, and
    say how many of the held-out pictures its own head names."""
    started = time.perf_counter()
    fit, test = (open_source(out / "data" / f"{part}-*.tar") for part in ("train", "test"))
    vit = train(kind, fit, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr)
    save_file(vit.state_dict(), out / "teacher.safetensors")
    facts = {
        "spec": kind.spec,
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "head_top1": round(accuracy(kind, vit, test), 2),
    }
    facts["seconds"] = round(time.perf_counter() - started, 1)
    (out / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n")
    echo(
        f"{len(fit)} training and {len(test)} held-out {what} in {out / 'data'}; the teacher names "
        f"{facts['head_top1']} % of the held-out ones ({facts['seconds']} s): "
        f"{out / 'teacher.safetensors'}"
    )
