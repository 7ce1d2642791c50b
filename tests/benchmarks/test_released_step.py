"""The released-like step of MaskAlign computes what the recipe `maskalign` computes, for equal
weights, masks and teacher levels: what is timed beside it is the same mathematics.

B batch, P patches, V visible, Dt teacher width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import released_step
from benchmarks.released_step import ReleasedMaskAlign, Size
from featcache.errors import UsageError, UserError
from student.recipes import maskalign

pytest.importorskip("transformers")

STUDENT = Size(64, 16, 32, 6, 2)  # 16 patches, of which int(16 * 0.3) = 4 are visible
EQUAL = Size(64, 16, 16, 6, 2)  # as CLIP-B/16 for a base student: the same pixels, as many blocks
RESIZED = Size(56, 14, 16, 8, 2)  # as CLIP-L/14: smaller pictures, more blocks
TEACHERS = pytest.mark.parametrize("teacher", [EQUAL, RESIZED], ids=["equal", "resized"])


def build(teacher: Size) -> tuple[ReleasedMaskAlign, Tensor]:
    """A model with weights large enough for attention to matter, and four pictures."""
    torch.manual_seed(0)
    model = ReleasedMaskAlign(STUDENT, teacher)
    for name, parameter in model.teacher.named_parameters():
        if "proj.weight" in name or "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(4, 3, 64, 64)


def loss_of(model: ReleasedMaskAlign, images: Tensor) -> Tensor:
    """The loss with the mask that seed 7 draws: nothing else is drawn before it."""
    torch.manual_seed(7)
    loss: Tensor = model(images)
    return loss


@contextmanager
def seen_teacher(model: ReleasedMaskAlign) -> Iterator[dict[str, Any]]:
    """What goes into the teacher, and what its blocks and its last attention give."""
    seen: dict[str, Any] = {"blocks": []}
    layers = model.teacher.encoder.layers
    hooks = [
        model.teacher.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(pixels=kwargs["pixel_values"]), with_kwargs=True
        ),
        layers[-1].self_attn.register_forward_hook(
            lambda _, args, out: seen.update(attention=out[1])
        ),
        *(
            layer.register_forward_hook(
                lambda _, args, out: seen["blocks"].append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for layer in layers
        ),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def recipe_like(model: ReleasedMaskAlign, teacher: Size) -> maskalign.Model:
    """The recipe's model with the same weights: of W and the adaptors the aligned levels' alone."""
    encoder = "vit_tiny_patch16_224,embed_dim=32,depth=6,num_heads=2"
    ours = maskalign.Model(
        maskalign.Config(
            encoder=encoder, img_size=64, teacher_depth=teacher.depth, teacher_width=16, drop_path=0
        )
    )
    parts = ("patch_embed.", "cls_token", "pos_embed", "blocks.", "norm.")
    weights = {name: w for name, w in model.state_dict().items() if name.startswith(parts)}
    ours.encoder.load_state_dict(weights)
    aligned = range(teacher.depth - 5, teacher.depth)
    heads: dict[str, Tensor] = {"mix": model.distill_weights.data[list(aligned)]}
    for level in aligned:
        for name, weight in model.distill_heads[level].state_dict().items():
            heads[f"adaptors.{level + 1}.{name}"] = weight
    ours.align.load_state_dict(heads)
    return ours


def stored(blocks: list[Tensor]) -> Tensor:
    """What a cache holds of a teacher's last five blocks (B,1+P,Dt): each token less its mean, over
    its standard deviation."""
    y = np.stack([block.numpy() for block in blocks[-5:]], 1).astype(np.float64)
    centred = y - y.mean(-1, keepdims=True)
    h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return torch.from_numpy(h.astype(np.float32))


@TEACHERS
def test_the_loss_and_its_gradients_are_the_recipes(teacher: Size) -> None:
    model, images = build(teacher)
    torch.nn.init.normal_(model.distill_weights, std=0.5)
    with seen_teacher(model) as seen:
        loss = loss_of(model, images)
    torch.manual_seed(7)
    keep = torch.multinomial(seen["attention"][:, :, 0, 1:].mean(1), 16)[:, :4]
    ours = recipe_like(model, teacher)
    found = ours({"images": images, "features": stored(seen["blocks"]), "ids_keep": keep})["loss"]
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() > 0.1
    loss.backward()
    found.backward()
    for name, parameter in ours.encoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6
            )


@TEACHERS
def test_the_teacher_sees_pictures_by_clips_statistics(teacher: Size) -> None:
    """A grey of 0.6 is the same number everywhere; other pictures are the same as when they are
    normalised first and resized then, both being linear."""
    model, images = build(teacher)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    grey = ((0.6 - mean) / std).expand(1, 3, 64, 64)
    with seen_teacher(model) as seen:
        model(torch.cat([grey, images]))
    side = teacher.image_px
    assert seen["pixels"].shape == (5, 3, side, side)
    expected = torch.tensor([0.441297, 0.544091, 0.695450]).view(3, 1, 1).expand(3, side, side)
    torch.testing.assert_close(seen["pixels"][0], expected, rtol=1e-5, atol=1e-5)
    clip_mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    clip_std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    normalised = (images * std + mean - clip_mean) / clip_std
    resized = F.interpolate(normalised, (side, side), mode="bicubic", align_corners=False)
    torch.testing.assert_close(seen["pixels"][1:], resized, rtol=1e-4, atol=1e-4)


def test_where_the_teacher_looks_is_visible() -> None:
    """Patches that have all of the importance are kept, whatever is drawn."""
    importance = torch.full((2, 16), 1e-30)
    importance[0, [3, 5, 8, 13]] = importance[1, [0, 1, 2, 15]] = 0.25
    tokens = torch.arange(16.0).view(1, 16, 1).repeat(2, 1, 3)
    visible, keep = released_step._draw_visible(tokens, importance)
    assert sorted(keep[0].tolist()) == [3, 5, 8, 13]
    assert sorted(keep[1].tolist()) == [0, 1, 2, 15]
    torch.testing.assert_close(visible[..., 2], keep.float())


def test_a_step_lowers_the_loss() -> None:
    model, images = build(EQUAL)
    before = loss_of(model, images)
    frozen = {name: weight.clone() for name, weight in model.teacher.state_dict().items()}
    torch.manual_seed(7)
    released_step.step_of(model, images, "no")()
    assert loss_of(model, images) < before - 1e-4
    for name, weight in model.teacher.state_dict().items():
        torch.testing.assert_close(weight, frozen[name], rtol=0, atol=0)


def test_the_optimiser_is_the_released_one() -> None:
    """Biases, norms and W are not decayed, cls_token is; the teacher and the positions are not
    trained."""
    model, _ = build(EQUAL)
    spared, decayed = released_step.make_optimizer(model).param_groups
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in spared["params"]}
    lowered = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"distill_weights", "norm.weight", "blocks.5.mlp.fc2.bias"} <= kept
    assert {"cls_token", "patch_embed.proj.weight", "distill_heads.0.weight"} <= lowered
    assert not [name for name in kept | lowered if name.startswith(("teacher", "pos_embed"))]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_steps_of_every_precision_change_the_student(precision: str) -> None:
    model, images = build(EQUAL)
    before = model.distill_heads[-1].weight.detach().clone()
    step = released_step.step_of(model, images, precision)
    for _ in range(3):  # the first scales of fp16 may be too large
        step()
    assert not torch.equal(before, model.distill_heads[-1].weight)
    assert not torch.backends.cudnn.benchmark


def test_a_loss_that_is_not_finite_stops() -> None:
    model, images = build(EQUAL)
    torch.nn.init.constant_(model.distill_heads[-1].bias, torch.inf)
    with pytest.raises(UserError, match="loss is not finite"):
        released_step.step_of(model, images, "no")()


def test_steps_by_name_and_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    images, cpu = torch.zeros(2, 3, 224, 224), torch.device("cpu")
    released_step.make_step("tiny", "tiny", images, cpu, "no")()
    with pytest.raises(UsageError, match=r"unknown teacher .*'clip-b32': .*clip-b16"):
        released_step.make_step("clip-b32", "tiny", images, cpu, "no")
    with pytest.raises(UsageError, match=r"unknown encoder .*'huge'"):
        released_step.make_step("tiny", "huge", images, cpu, "no")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is not installed; pip install"):
        released_step.make_step("tiny", "tiny", images, cpu, "no")
