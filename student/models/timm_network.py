"""A teacher's network is trained further as timm's own module, whose name and sizes a run records.

    clip-b16  ->  open_clip's tower  ->  vit_base_patch16_clip_224,act_layer=quick_gelu,...
    timm:vit_small_patch14_dinov2.lvd142m,depth=4  ->  vit_small_patch14_dinov2,depth=4

A teacher of one's own file has no such name, and is not trained here.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import vision_transformer
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError, near
from featcache.models import architecture
from featcache.models.contract import Teacher
from featcache.models.open_clip_wrapper import OpenClipVit
from featcache.models.spec import parse_options, split_spec
from featcache.models.timm_wrapper import TimmVit
from student.models import drop_path as drops

FAMILY = "timm"
_PLACES = ("img_size", "grid", "pos", "pixels")  # options of a teacher that are no layers


def build(encoder: str, *, img_size: int, patch_size: int, drop_path: float = 0.0) -> nn.Module:
    """Build the network of `NAME,key=value,...` at random start values, without a classifier."""
    name, _, tail = encoder.partition(",")
    options: dict[str, Any] = dict(parse_options(tail)) if tail else {}
    architecture.check_keywords(f"cannot build encoder {encoder!r}", options)
    if name not in timm.list_models():
        raise UsageError(
            f"unknown encoder {name!r}: {near(name, timm.list_models('*vit*'))[:200]}; a network "
            "in timm.list_models() is needed"
        )
    keywords = {
        **options, "img_size": img_size, "patch_size": patch_size, "drop_path_rate": drop_path,
    }  # fmt: skip

    def create() -> nn.Module:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **keywords)
        return net

    try:
        architecture.check_memory(create, f"cannot build encoder {encoder!r}")
        net = create()
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"cannot build encoder {encoder!r}: timm says {str(error) or type(error).__name__}; "
            "a vision transformer and its options are allowed"
        ) from None
    check(net, encoder)
    drops.replace(net)
    return net


def check(net: Any, name: str) -> None:
    """Raise UsageError for a network that cannot be given a head and another picture size."""
    needs = ("blocks", "norm", "fc_norm", "reset_classifier", "set_input_size", "num_prefix_tokens")
    missing = [part for part in needs if not hasattr(net, part)]
    why = f"has no {', '.join(missing)}" if missing else ""
    if hasattr(net, "head_dist"):
        why = "has two heads, of [CLS] and of a distillation token"
    if why:
        raise UsageError(
            f"cannot fine-tune {name!r}: timm's {type(net).__name__} {why}; "
            "a vision transformer is needed, such as dino-b16 or clip-b16"
        )


def of_teacher(teacher: Teacher, spec: str) -> tuple[nn.Module, str]:
    """Return the network of a teacher with its weights, and the text that `build` builds it of."""
    if isinstance(teacher, OpenClipVit):
        return _of_open_clip(teacher.visual)
    name, options = split_spec(spec)
    if not isinstance(teacher, TimmVit) or not teachers.is_registered(spec):
        raise UserError(
            f"cannot fine-tune the teacher {spec!r}: its network is neither timm's nor open_clip's "
            "own by name; give one of `featcache teachers`"
        )
    card = teachers.model_cards().get(name)
    bare = (card.hub.removeprefix("timm/") if card else name.partition(":")[2]).partition(".")[0]
    layers = {key: value for key, value in options.items() if key not in _PLACES}
    check(teacher.vit, spec)
    return teacher.vit, _text(bare, layers)


def _of_open_clip(visual: Any) -> tuple[nn.Module, str]:
    """Return timm's module with the weights of an open_clip tower."""
    block = visual.transformer.resblocks[0]
    options = {
        "embed_dim": int(visual.transformer.width),
        "depth": len(visual.transformer.resblocks),
        "num_heads": int(block.attn.num_heads),
        "mlp_ratio": block.mlp.c_fc.out_features / visual.transformer.width,
        "act_layer": "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
    }
    text = _text("vit_base_patch16_clip_224", options)
    px, patch = int(visual.image_size[0]), int(visual.patch_size[0])
    net: Any = build(text, img_size=px, patch_size=patch)
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    found = vision_transformer.checkpoint_filter_fn(state, net)
    own = {name: value for name, value in found.items() if not name.startswith("head.")}
    net.load_state_dict(own)
    return net, text


def _text(name: str, options: dict[str, Any]) -> str:
    def told(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return ",".join([name, *(f"{key}={told(value)}" for key, value in options.items())])
