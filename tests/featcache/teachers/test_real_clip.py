"""The real shapes run on real photographs: `clip-b16` with random:0 equals open_clip run directly,
with hooks of our own.

ViT-B/16 at 224, 12 blocks, 196 patches and [CLS]; no trained weights are needed to compare which
numbers are taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import skimage
import torch
import zarr
from PIL import Image

from tests.conftest import Ran

NAMES = ("astronaut.png", "coffee.png", "rocket.jpg")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.slow
def test_clip_b16_on_photographs(featcache_command: Callable[..., Ran], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in NAMES:
        (photos / name).write_bytes((Path(skimage.__file__).parent / "data" / name).read_bytes())
    options = (
        "--teacher",
        "clip-b16",
        "--weights",
        "random:0",
        "--images",
        photos,
        "--out",
        tmp_path / "c",
    )
    ran = featcache_command(
        "extract", *options, "--views", 2, "--levels", "all", "--batch-size", 4, "--json"
    )
    assert ran.status == 0, ran.err
    assert "random:0" in ran.err
    assert json.loads(ran.out)["levels"] == list(range(1, 13))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).visual.eval()
    ys: list[torch.Tensor] = []
    normed: list[torch.Tensor] = []
    blocks = visual.transformer.resblocks
    for block in blocks:
        block.register_forward_hook(lambda _, __, y: ys.append(y))
    blocks[-1].ln_1.register_forward_hook(lambda _, __, x: normed.append(x))

    group = zarr.open_group(tmp_path / "c/shards/000000.zarr", mode="r")
    stored = {name: group[name][:] for name in ("features", "attention", "crop", "flip")}
    assert stored["features"].shape == (3, 2, 12, 197, 768)
    assert stored["attention"].shape == (3, 2, 196)
    assert group["key"][:].tolist() == ["astronaut", "coffee", "rocket"]
    for row, name in enumerate(NAMES):
        for view in range(2):
            top, left, height, width = stored["crop"][row, view].tolist()
            picture = (
                Image.open(photos / name)
                .convert("RGB")
                .crop((left, top, left + width, top + height))
            )
            picture = picture.resize((224, 224), Image.Resampling.BICUBIC)
            if stored["flip"][row, view]:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            x = ((np.asarray(picture) / 255 - MEAN) / STD).astype(np.float32)
            ys.clear()
            normed.clear()
            with torch.no_grad():
                visual(torch.from_numpy(x).permute(2, 0, 1)[None])
            y = torch.cat(ys).double().numpy()  # (12, 197, 768)
            h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
            got = stored["features"][row, view].astype(np.float64)
            assert (np.linalg.norm(got - h, axis=-1) / np.linalg.norm(h, axis=-1)).max() < 1e-3
            attn = blocks[-1].attn
            qkv = (
                normed[0][0].double() @ attn.in_proj_weight.double().T + attn.in_proj_bias.double()
            )
            q, k, _ = qkv.detach().reshape(197, 3, 12, 64).permute(1, 2, 0, 3).numpy()
            logits = np.einsum("hd,htd->ht", q[:, 0], k) / 8
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            a = (weights / weights.sum(-1, keepdims=True)).mean(0)[1:]
            assert np.abs(stored["attention"][row, view] - a).max() / a.max() < 1e-5
