"""A frozen encoder gives the tokens of pictures.

An evaluation never looks at a run folder or a teacher: it takes a `FrozenEncoder`, which turns
uint8 pixels into tokens, and features of them (`features.task`). A student's tokens are those after
the encoder's own final norm (MAE's protocol; a MaskAlign student never trains that norm, and the
published numbers read through it all the same); a teacher's are its own output f, after its final
norm where it has one.

B pictures, S pixels a side, T = prefix + P tokens, V visible patches, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError, near
from featcache.models import weights as weight_files
from featcache.models.hooks import normalise_pixels
from featcache.models.precision import fp32_products
from featcache.reading.tensors import tail_to_device
from featcache.runtime.device_clock import StepClock
from featcache.runtime.meter import meter
from featcache.storage import json_file
from featcache.targets.derived import has_output, output

POOLS = ("cls", "mean")
# pixels (B,3,S,S), 1-based blocks, perhaps ids_keep (B,V) -> tokens (B,T,D) of each block
Forward = Callable[[Tensor, Sequence[int], Tensor | None], list[Tensor]]


@dataclass(frozen=True)
class FrozenEncoder:
    """Holds a frozen network: `forward` maps uint8 pixels to tokens after the final norm, `to`
    moves its weights to a device. `digest` is of everything its tokens depend on but the pixels;
    features of an encoder without one are not kept."""

    name: str
    img_size: int
    depth: int  # blocks
    prefix: int  # tokens before the patches, [CLS] first; 0: there is no [CLS]
    forward: Forward
    to: Callable[[str], object]
    digest: str = ""
    hides: bool = False  # it can be given some of the patches only
    facts: Mapping[str, Any] = field(default_factory=dict)  # recipe, size, checkpoint of a run
    projection: Tensor | None = None  # (D,E) of a CLIP, from its tokens to the space of its texts

    def tokens(
        self, pixels: Tensor, blocks: Sequence[int] = (), ids_keep: Tensor | None = None
    ) -> list[Tensor]:
        """Map uint8 pixels (B,3,S,S) to tokens (B,T,D) float32 of 1-based `blocks` (default: the
        last), on the device of the pixels, without gradients. With ids_keep (B,V) the other patches
        are not there at all: T = prefix + V."""
        clock = StepClock(pixels.device)
        # a GPU would convolve in TF32: the patch embedding with 10 bits of its pixels
        with torch.no_grad(), fp32_products("ieee"):
            made = self.forward(pixels, blocks or (self.depth,), ids_keep)
            meter.device(clock.seconds())
            return [each.float() for each in made]

    @property
    def told(self) -> str:
        """Return the name, with the checkpoint of a run, and whether its weights are averaged."""
        step = f", step {self.facts['checkpoint']}" if "checkpoint" in self.facts else ""
        return f"{self.name}{step}{', average' if self.facts.get('ema') else ''}"

    def check_pool(self, pool: str) -> None:
        """Raise UsageError for a pool that there is not, or [CLS] of an encoder without one."""
        if pool not in POOLS:
            raise UsageError(f"unknown pool {pool!r}: {near(pool, POOLS)}")
        if pool == "cls" and not self.prefix:
            raise UsageError(
                f"cannot pool the [CLS] token of {self.name}: its encoder has none; give --pool "
                "mean"
            )


# ------------------------------------------------------------ a student


def from_run(run: Path, ema: bool = False, step: int | None = None) -> FrozenEncoder:
    """Freeze the encoder of a training run, or the average of its weights: that of its newest
    checkpoint, or of the one of `step`."""
    # imports the trainer's side; a teacher needs none of it
    from student import checkpoint

    # a run that goes on may have a newer one in a moment
    step = checkpoint.latest_step(run) if step is None else step
    encoder, config = checkpoint.load_encoder(run, ema, step)
    facts = {
        "recipe": str(checkpoint.read_config(run)["recipe"]),
        "checkpoint": step,
        **({"ema": True} if ema else {}),
    }
    return from_encoder(encoder, int(config["img_size"]), str(run), facts)


def from_encoder(
    encoder: nn.Module, img_size: int, name: str, facts: Mapping[str, Any] | None = None
) -> FrozenEncoder:
    """Freeze an encoder that reads ImageNet-normalised pixels: timm's VisionTransformer or Beit, or
    the convolutional one."""
    encoder.eval().requires_grad_(False)
    stack: Any = getattr(encoder, "blocks3", None) or encoder.blocks
    hides = _encode_visible(encoder)

    def forward(pixels: Tensor, blocks: Sequence[int], ids_keep: Tensor | None) -> list[Tensor]:
        images = normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if ids_keep is not None:
            assert hides is not None
            return [hides(images, ids_keep)]
        outputs: dict[int, Tensor] = {}
        hooks = [
            stack[block - 1].register_forward_hook(_keeper(outputs, block))
            for block in blocks
            if block != len(stack)
        ]
        try:
            last = encoder.forward_features(images)  # type: ignore[operator]  # (B,T,D), normed
        finally:
            for hook in hooks:
                hook.remove()
        norm: Any = encoder.norm
        return [norm(outputs[block]) if block in outputs else last for block in blocks]

    return FrozenEncoder(
        name,
        img_size,
        len(stack),
        int(encoder.num_prefix_tokens),  # type: ignore[arg-type]
        forward,
        encoder.to,
        digest_of(encoder, {"img_size": img_size, "class": type(encoder).__name__}),
        hides is not None,
        {"size": size_of(encoder), **(facts or {})},
    )


def _keeper(outputs: dict[int, Tensor], block: int) -> Callable[..., None]:
    def keep(module: nn.Module, given: object, output: Tensor) -> None:
        outputs[block] = output

    return keep


def _encode_visible(encoder: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a function from images and ids_keep to normed tokens; None where a family cannot leave
    patches out (relative positions)."""
    from student.models import beit, vit
    from student.models.conv_vit import ConvViT

    if isinstance(encoder, ConvViT):
        return lambda images, ids: encoder.norm(encoder.encode(images, ids)[0][-1])
    if encoder.pos_embed is None or encoder.num_prefix_tokens != 1:
        return None
    if isinstance(encoder, Beit):
        return lambda images, ids: beit.encode(encoder, images, ids)
    if isinstance(encoder, VisionTransformer) and encoder.cls_token is not None:
        return lambda images, ids: encoder.norm(vit.encode(encoder, images, ids)[-1])
    return None


SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def size_of(encoder: nn.Module) -> str:
    """Return the name that papers give to an encoder of this width; empty where they have none."""
    return SIZES.get(int(getattr(encoder, "embed_dim", 0)), "")


def digest_of(module: nn.Module, architecture: Mapping[str, Any]) -> str:
    """Return a digest of weights and buffers, and of what else the tokens depend on."""
    digest = hashlib.blake2b(json_file.canonical(dict(architecture)), digest_size=16)
    digest.update(repr(module).encode())  # kinds of layers, heads' widths, eps
    heads = [getattr(part, "num_heads", 0) for part in module.modules()]
    digest.update(json_file.canonical(heads))
    return digest_of_tensors(module.state_dict(), digest)


def digest_of_tensors(state: Mapping[str, Tensor], digest: Any = None) -> str:
    """Return a digest of names, dtypes, shapes and bytes of tensors, after what `digest` holds."""
    digest = digest or hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


# ------------------------------------------------------------ a teacher


def from_teacher(spec: str, weights: str | None = None) -> FrozenEncoder:
    """Freeze a teacher: its own output f, that of its final norm (CLIP's ln_post), y itself where
    it has none; before any projection."""
    teacher = teachers.load(spec, weights)
    tail = {
        name: torch.from_numpy(np.array(value, np.float32))
        for name, value in teacher.tail().items()
    }
    if not has_output(tail):
        raise UserError(
            f"cannot take the output of teacher {spec!r}: its tail names no final norm, nor that "
            "there is none; give a teacher whose tail does, such as dino-b16"
        )

    def forward(pixels: Tensor, blocks: Sequence[int], ids_keep: Tensor | None) -> list[Tensor]:
        assert ids_keep is None
        own = tail_to_device(tail, pixels.device)
        levels, _ = teacher(pixels, tuple(blocks))  # y (B,1+P,D) each
        return [output(y.float(), own) for y in levels]

    architecture = {
        "spec": spec,
        "pixels": [teacher.input_px, list(teacher.pixel_mean), list(teacher.pixel_std)],
        "weights": weight_files.weight_hash(teacher),
    }
    digest = json_file.digest(architecture)
    return FrozenEncoder(
        spec, teacher.input_px, teacher.depth, 1, forward, teacher.to, digest, False, {},
        tail.get("proj"),
    )  # fmt: skip
