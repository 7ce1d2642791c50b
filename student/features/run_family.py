"""A run of `student train` is a teacher: `run:RUN`, `run:RUN#ema`, `run:RUN#model`.

    featcache extract --teacher run:runs/mralign-s0 --images train/ --views 4

featcache finds this family by the entry point group `featcache.teachers`. Its levels are the blocks
of the run's own encoder, at the picture and patch size of the run. `weights` is the name of a
checkpoint and the part of it, `step-00000020.pt#model`: the newest one's weights where none is
given, and what was taken is what a cache records and is made from again.

B batch, P patches, D width, S pixels a side.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.errors import UsageError, UserError
from featcache.models import timm_wrapper
from featcache.models.contract import Option
from featcache.models.hooks import BlockOutputs, normalise_pixels, tail_arrays
from featcache.models.spec import check_options
from featcache.runtime.local_path import local_path
from student import checkpoint
from student.features.exported import Exported
from student.models.conv_vit import ConvViT

PREFIX = "run"
NAMES: dict[str, Any] = {}  # all are of the user's own folders
PARTS = ("model", checkpoint.EMA)
_LOG = logging.getLogger(__name__)


def load(name: str, options: dict[str, Option], weights: str | None) -> nn.Module:
    """Load the encoder of the run that `name` says. `weights`: None, or the name of one of its
    checkpoints, perhaps with #model or #ema."""
    check_options(name, options, ())
    run, asked = _split(name)
    record = checkpoint.read_config(run)
    file, part = _choose(name, weights, run, asked)
    saved = checkpoint.load(run, checkpoint.step_of(file))
    part = _part(name, run, part, saved)
    ema, settings = part == checkpoint.EMA, record["config"]
    net: Any = checkpoint.encoder_of(run, settings, saved, ema)
    given = Exported(run, net, settings, record, saved["step"], ema)
    for own in ("head", "fc_norm"):  # of a fine-tuned one: no token goes through them
        if hasattr(net, own):
            setattr(net, own, nn.Identity())
    return _wrap(given, name, f"{file.name}#{part}")


def _choose(name: str, weights: str | None, run: Path, part: str | None) -> tuple[Path, str | None]:
    """Return the checkpoint that is meant, the newest where none is named, and the part of it that
    is asked for, None where none is."""
    files = {path.name: path for path in checkpoint.list_checkpoints(run)}
    if not files:
        raise UserError(
            f"teacher {name!r}: run {str(run)!r} has no checkpoint; train it first, or give the "
            "folder of a run"
        )
    if weights is None:
        return list(files.values())[-1], part
    file, mark, also = weights.partition("#")
    if file not in files or (mark and also not in PARTS):
        raise UsageError(
            f"teacher {name!r} has the weights of its run, and --weights {weights!r} is given; "
            f"leave it out, or give one of its checkpoints, {', '.join(files)}, as in "
            f"{list(files)[-1]}#{PARTS[0]}"
        )
    if mark and part and also != part:
        raise UsageError(
            f"teacher {name!r} names the part {part!r}, and --weights {weights!r} another; give "
            "one of them"
        )
    return files[file], part or also or None


def _split(name: str) -> tuple[Path, str | None]:
    """Return the folder of `run:RUN#PART` and the part; a folder's own name may hold a #."""
    text = local_path(name.removeprefix(f"{PREFIX}:"), "--teacher run:RUN")
    folder, mark, part = text.rpartition("#")
    if not mark or Path(text).exists():
        return Path(text), None
    if part not in PARTS:
        raise UsageError(
            f"teacher {name!r}: a checkpoint of a run has the parts {' and '.join(PARTS)}, "
            f"{part!r} is given; give {PREFIX}:{folder} or {PREFIX}:{folder}#{PARTS[0]}"
        )
    return Path(folder), part


def _part(name: str, run: Path, asked: str | None, saved: dict[str, Any]) -> str:
    """Return the part of a checkpoint that is taken, and say so where it holds two and none was
    asked for."""
    averaged = checkpoint.EMA in saved
    if asked == checkpoint.EMA and not averaged:
        raise UserError(
            f"teacher {name!r}: the run keeps no average of its weights; give {PREFIX}:{run}, or "
            "train it with --ema"
        )
    if averaged and asked is None:
        _LOG.warning(
            f"run {str(run)!r} has its weights of step {saved['step']} and their average: the "
            f"weights are taken; --teacher {PREFIX}:{run}#{checkpoint.EMA} takes the average"
        )
    return asked or PARTS[0]


def _wrap(given: Exported, name: str, weights: str) -> nn.Module:
    mean, std = given.pixels
    if isinstance(given.net, ConvViT):
        return ConvTeacher(given.net, given.img_size, weights, mean, std)
    return timm_wrapper.wrap(given.net, name, None, None, weights, mean, std)


class ConvTeacher(nn.Module):
    """Read the blocks of a convolutional encoder's third stage through hooks."""

    name = PREFIX

    def __init__(
        self, net: ConvViT, img_size: int, weights: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.weights, self.input_px = net, weights, img_size
        self.patches, self.width, self.depth = net.grid**2, net.embed_dim, len(net.blocks3)
        self.pixel_mean, self.pixel_std = tuple(mean), tuple(std)
        self.has_attention = net.cls_token is not None
        self.first_token = "cls" if self.has_attention else "mean"
        self._block_outputs = BlockOutputs(net.blocks3)  # type: ignore[arg-type]
        self._attention = torch.empty(0)
        if self.has_attention:
            net.blocks3[-1].attn.register_forward_pre_hook(self._record)  # type: ignore[union-attr]

    def _record(self, attn: Any, inputs: tuple[Tensor, ...]) -> None:
        prefix = self.net.num_prefix_tokens
        self._attention = timm_wrapper.attention_of_cls(attn, inputs[0], {}, prefix)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Map uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P), or (B, 0) without
        [CLS]."""
        pixels = normalise_pixels(images, self.pixel_mean, self.pixel_std)
        self.net.forward_features(pixels)
        ys = self._block_outputs.take(levels)
        if self.has_attention:
            return ys, self._attention
        return [torch.cat([y.mean(1, keepdim=True), y], 1) for y in ys], pixels.new_empty(
            len(pixels), 0
        )

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the final norm, or that there is none before the pool."""
        norm = self.net.norm
        if isinstance(norm, nn.LayerNorm):
            return tail_arrays(norm)
        return {"identity": np.array(1, np.float32)}
