"""This program made losses.json: the first ten steps of every recipe without the trainer, in
float64.

    python -m tests.golden.make_losses > tests/golden/losses.json

A recipe's forward pass is its own (compared with second implementations in tests/test_recipe_*.py);
everything around it is written out here from METHODS and DESIGN: which pictures make a batch, which
view each shows, its pixels by plain Pillow from the stored box, its targets by numpy from what zarr
reads, its mask from numpy's own Philox, normalised colours, the rate of a step, the gradient's
largest norm, AdamW with decoupled decay. Nothing of the trainer, optim, loader, targets and masking
or of featcache's reader, views and rng has a part in it; a recipe's own `needs` says which levels
it is given.

The weights at the start are sines of their index (`test_recipes.fill`), so that no version of torch
or timm draws others; `losses.json` names the cache by digests of what it holds, so that another
cache is not taken for another loss.

B batch, P patches, S pixels a side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor, nn

from student import config, recipes
from tests import student_fixtures as fx
from tests.student.recipes.test_recipes import fill, trained
from tests.student.test_masking import blocks, numpy_words

STEPS, BATCH, SEED, PATCHES, FIRST_LEVEL = 10, 8, 3, 16, 2
RATE, LOWEST, WARMUP = 1e-3, 2e-4, 3  # one epoch of 24 pictures is three steps
# Beside the small settings of the fixtures: no drop path, whose draws have tests of their own; a
# rate that rises, falls and does not end at zero; so much decay, and where a recipe clips so small
# a norm, that either shows within ten steps.
SETS = ("drop_path=0", "warmup_epochs=1", f"lr={RATE}", f"min_lr={LOWEST}", "weight_decay=2.0")
CLIPPED = "clip_grad=0.3"
FACTS = ("img_size=32", "patch_size=8", "teacher_depth=4", "teacher_width=24", "teacher_out=24")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGESTED = ("features", "feature_stats", "attention", "crop", "flip", "area", "pixel_hash")

F64 = npt.NDArray[np.float64]


class Stored:
    """A cache's only shard by zarr alone, its teacher's end, and the pictures as files."""

    def __init__(self, path: Path) -> None:
        self.group = zarr.open_group(next((path / "shards").glob("*.zarr")), mode="r")
        self.tail = load_file(next(path.glob("*.safetensors")))
        self.keys = self.group["key"][:].tolist()
        self.views = self.group["crop"].shape[1]

    def view_of(self, row: int, epoch: int, low: float) -> int:
        """Stored views of at least this area take turns; where a picture begins is the first word
        of its key's digest."""
        accepted = [view for view in range(self.views) if self.group["area"][row, view] >= low]
        first = hashlib.blake2b(self.keys[row].encode(), digest_size=16).digest()[:8]
        return accepted[(epoch + int.from_bytes(first, "little")) % len(accepted)]

    def pixels(self, row: int, view: int) -> F64:
        """(3, S, S), normalised."""
        top, left, height, width = (int(x) for x in self.group["crop"][row, view])
        picture = Image.open(fx.pictures() / f"{self.keys[row]}.png").convert("RGB")
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((fx.SIZE, fx.SIZE), Image.Resampling.BICUBIC)
        if self.group["flip"][row, view]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return ((np.asarray(picture, np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)

    def target(self, derive: str, h: F64) -> F64:
        """h (1+P, D) of the last level -> f, or fd: f normalised again."""
        f = h * self.tail["gamma"] + self.tail["beta"]
        if derive == "fd":
            f = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5)
        return f

    def digests(self) -> dict[str, str]:
        return {
            name: hashlib.blake2b(self.group[name][:].tobytes(), digest_size=8).hexdigest()
            for name in DIGESTED
        }


def hidden_of(settings: Any, stored: Stored, row: int, view: int, epoch: int) -> list[int]:
    """The masked patches of a picture in an epoch."""
    key, visible = stored.keys[row], int(PATCHES * (1 - settings.mask_ratio))
    if settings.mask == "blockwise":
        return blocks(key, SEED, epoch, math.isqrt(PATCHES), PATCHES - visible)
    raw = numpy_words(key, f"mask:{settings.mask}", SEED, epoch, PATCHES)
    finish: list[float] = [float(word) for word in raw]
    if settings.mask == "attentive":
        weights = stored.group["attention"][row, view].astype(np.float64)
        finish = [
            -math.log(((word >> 12) + 0.5) / 2**52) / p
            for word, p in zip(raw, weights, strict=True)
        ]
    else:
        assert settings.mask == "uniform", settings.mask
    return sorted(sorted(range(PATCHES), key=finish.__getitem__)[visible:])


def batch_of(recipe: str, settings: Any, stored: Stored, step: int) -> dict[str, Tensor]:
    """The pictures of a step: slices of the epoch's order, which is the stable sort of 24 words."""
    epoch, place = divmod(step, len(stored.keys) // BATCH)
    words = numpy_words(f"rows:{len(stored.keys)}", "order", SEED, epoch, len(stored.keys))
    order = sorted(range(len(words)), key=words.__getitem__)
    spec = recipes.load(recipe).needs(settings)
    columns: dict[str, list[Any]] = {"images": [], "ids_keep": [], "ids_masked": []}
    for row in order[place * BATCH : (place + 1) * BATCH]:
        view = stored.view_of(row, epoch, spec.scale[0])
        hidden = hidden_of(settings, stored, row, view, epoch)
        columns["images"].append(stored.pixels(row, view))
        columns["ids_masked"].append(hidden)
        columns["ids_keep"].append([patch for patch in range(PATCHES) if patch not in hidden])
        if "features" in spec.fields:
            levels = [level - FIRST_LEVEL for level in spec.levels]
            h = stored.group["features"][row, view][levels].astype(np.float64)
            columns.setdefault("targets" if spec.derive else "features", []).append(
                stored.target(spec.derive, h[0]) if spec.derive else h
            )
        if "token_ids" in spec.fields:
            columns.setdefault("token_ids", []).append(
                stored.group["token_ids"][row, view].astype(np.int64)
            )
    return {name: torch.from_numpy(np.array(values)) for name, values in columns.items()}


def rate(step: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine towards the lowest."""
    if step < WARMUP:
        return RATE * step / WARMUP
    return (
        LOWEST + (RATE - LOWEST) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    )


def losses_of(recipe: str) -> list[float]:
    """The losses of STEPS steps of AdamW (eps 1e-8), written out."""
    module = recipes.load(recipe)
    settings = config.from_overrides(module.Config, given(recipe))
    stored = Stored(fx.cache_of(recipe))
    model: nn.Module = module.Model(settings)
    fill(model)
    model.double()
    weights, (b1, b2) = trained(model), settings.betas
    spared = model.no_weight_decay()
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    found = []
    for step in range(STEPS):
        loss = model(batch_of(recipe, settings, stored, step))["loss"]
        found.append(loss.item())
        grads = torch.autograd.grad(loss, list(weights.values()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        limit = settings.clip_grad
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for (name, w), g in zip(weights.items(), grads, strict=True):
            m[name] = b1 * m[name] + (1 - b1) * g * scale
            v[name] = b2 * v[name] + (1 - b2) * (g * scale) ** 2
            mean, square = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
            decays = w.ndim > 1 and not name.endswith(("_token", ".bias")) and name not in spared
            decay = settings.weight_decay if decays else 0.0
            with torch.no_grad():
                w.copy_(w * (1 - rate(step) * decay) - rate(step) * mean / (square.sqrt() + 1e-8))
    return found


def settings_of(recipe: str) -> tuple[str, ...]:
    """Return the settings that `student train` is given by --set."""
    clips = recipes.load(recipe).Config().clip_grad is not None
    return (*fx.RECIPES[recipe], *SETS, *((CLIPPED,) if clips else ()))


def given(recipe: str) -> list[str]:
    """The settings, with the facts of the cache that the recipe has a field for."""
    fields = {each.name for each in dataclasses.fields(recipes.load(recipe).Config)}
    return [*(fact for fact in FACTS if fact.partition("=")[0] in fields), *settings_of(recipe)]


if __name__ == "__main__":
    made = {
        "cache": Stored(fx.token_path()).digests(),
        "losses": {name: losses_of(name) for name in recipes.names()},
    }
    print(json.dumps(made, indent=1))
