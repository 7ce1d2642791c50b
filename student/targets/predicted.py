"""What a model predicts of its teacher's output at [CLS] is an embedding in the space that a CLIP's
pictures and texts share.

    z              as it is predicted
    f              z = f P
    h of the last level   f = gamma h + beta, z = f P

by gamma, beta and P of the teacher (`Teacher.tail`). The model sees whole pictures; nothing is
hidden. It is a `FrozenEncoder` whose [CLS], and whose only patch, is that embedding.

B pictures, P patches, N tokens, D width of the teacher, E of its projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models.contract import Teacher
from featcache.models.hooks import normalise_pixels
from featcache.models.weights import weight_hash
from featcache.reading.tensors import tail_tensors, tail_to_device
from featcache.storage import json_file
from student import checkpoint, recipes
from student.config import RecipeConfig, build_config, read_settings
from student.features.frozen import FrozenEncoder, digest_of
from student.features.task import Subject
from student.recipes import TargetSpec

Embed = Callable[[Tensor], Tensor]  # uint8 pixels (B,3,S,S) -> (B,E)
SERVING = "kd, milan, caev2, maskalign and mralign, with [CLS] in the loss"
EPS = 1e-5  # of the teacher's own norm


def teacher_embedding(frozen: FrozenEncoder) -> FrozenEncoder:
    """Return a teacher's own z of [CLS]. UserError for one without a projection."""
    projection = frozen.projection
    if projection is None:
        raise UserError(
            f"teacher {frozen.name!r} has no projection into a space of texts; a CLIP is needed, "
            "such as clip-b16"
        )

    def embed(pixels: Tensor) -> Tensor:
        return frozen.tokens(pixels)[0][:, 0] @ projection.to(pixels.device)

    return _embedding(frozen.name, frozen.img_size, embed, frozen.to, frozen.digest)


def run_embedding(subject: Subject, teacher: Teacher) -> FrozenEncoder:
    """Return a run's prediction of z of [CLS] of its teacher. UserError for a recipe that predicts
    none, and for a teacher without a projection."""
    assert subject.run is not None
    tail: Mapping[str, Tensor] = tail_tensors(teacher.tail())
    if "proj" not in tail or "gamma" not in tail:
        raise UserError(
            f"teacher {teacher.name!r} has no projection into a space of texts; only a student of "
            "a CLIP has one"
        )
    recipe, config = _recipe_of(subject.run)
    model: Any = checkpoint.load_model(
        subject.run, lambda: _build(subject.run, recipe, config), subject.ema, subject.checkpoint
    )
    spec = recipe.needs(config)
    kind = _kind(subject.run, model, config, spec, tail["proj"])

    def embed(pixels: Tensor) -> Tensor:
        images = normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        prediction = model.predictions(_whole(images, config, spec))[kind][0][:, 0].float()
        return to_texts(prediction, kind, config, tail_to_device(tail, pixels.device))

    about = {"config": repr(config), "kind": kind, "teacher": weight_hash(teacher)}
    digest = digest_of(model, about)
    return _embedding(str(subject.run), config.img_size, embed, model.to, digest)


def _embedding(
    name: str, size: int, embed: Embed, to: Callable[[str], object], digest: str
) -> FrozenEncoder:
    """Return an encoder of one block whose [CLS], and whose only patch, is a picture's embedding of
    length 1."""

    def forward(pixels: Tensor, blocks: Any, ids_keep: Tensor | None) -> list[Tensor]:
        assert ids_keep is None
        return [F.normalize(embed(pixels).float(), dim=-1)[:, None].expand(-1, 2, -1)]

    digest = json_file.digest({"embedding": digest}) if digest else ""
    return FrozenEncoder(name, size, 1, 1, forward, to, digest)


def to_texts(
    prediction: Tensor, kind: str, config: RecipeConfig, tail: Mapping[str, Tensor]
) -> Tensor:
    """Map what is predicted of a teacher's [CLS], by its name, to z (B,E)."""
    if kind == "cosine_z":
        return prediction
    if kind != "cosine_f":
        # other target norms keep a token's direction about its mean: LN gives h again
        if getattr(config, "target_norm", "ln") != "ln":
            prediction = F.layer_norm(prediction, prediction.shape[-1:], eps=EPS)
        prediction = tail["gamma"] * prediction + tail["beta"]
    return prediction @ tail["proj"]


# ------------------------------------------------------------ the model


def _recipe_of(run: Path) -> tuple[ModuleType, RecipeConfig]:
    """Return the recipe and the configuration of a run. A file chooses no code: a recipe of one's
    own is a UserError."""
    record = checkpoint.read_config(run)
    where = repr(str(run / checkpoint.CONFIG))
    name = record["recipe"]
    if name not in recipes.names():
        raise UserError(
            f"{where} names the recipe {name[:80]!r}, which is none of ours; those that predict a "
            f"CLIP's embedding: {SERVING}"
        )
    recipe = recipes.load(name)
    try:
        return recipe, build_config(recipe.Config, read_settings(recipe.Config, record["config"]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _build(run: Path | None, recipe: ModuleType, config: RecipeConfig) -> nn.Module:
    """Build a model that config.json describes; what cannot be meant is that file's fault."""
    try:
        model: nn.Module = recipe.Model(config)
    except UserError as error:
        raise UserError(f"{str(run)!r}, {checkpoint.CONFIG}: {error}") from error
    return model


def _kind(run: Path, model: Any, config: RecipeConfig, spec: TargetSpec, projection: Tensor) -> str:
    """Return the name of the prediction of the teacher's output, or of its last level, at [CLS].
    Raises UserError where there is none."""
    predictions: dict[str, tuple[Tensor, Tensor]] = {}
    if hasattr(model, "predictions"):
        side = config.img_size
        with torch.no_grad():
            predictions = model.predictions(_whole(torch.zeros(1, 3, side, side), config, spec))
    shapes = {name: tuple(pair[0].shape[1:]) for name, pair in predictions.items()}
    width, out = projection.shape
    level = f"cosine_{config.teacher_depth}"
    for kind, wanted in {"cosine_z": out, "cosine_f": width, level: width}.items():
        if shapes.get(kind) == (1 + config.patches, wanted):  # [CLS] is among them
            return kind
    learned = ", ".join(name.removeprefix("cosine_") for name in shapes) or "nothing of a teacher"
    raise UserError(
        f"run {str(run)!r} predicts {learned}, and not the teacher's output at [CLS], which stands "
        f"beside texts; recipes that do: {SERVING}"
    )


def _whole(images: Tensor, config: RecipeConfig, spec: TargetSpec) -> dict[str, Tensor]:
    """Return a batch of which nothing is hidden, with zeros for targets that nobody looks at."""
    count, patches, device = len(images), config.patches, images.device
    width = getattr(config, "target_width", config.teacher_width)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    levels = max(1, len(spec.levels))
    return {
        "images": images,
        "ids_keep": torch.arange(patches, device=device).expand(count, -1),
        "ids_masked": torch.zeros(count, 0, dtype=torch.int64, device=device),
        "targets": zero.expand(count, 1 + patches, width),
        "features": zero.expand(count, levels, 1 + patches, config.teacher_width),
        "feature_stats": one.expand(count, levels, 1 + patches, 2),
        "moments": one.expand(levels, 2),
    }
