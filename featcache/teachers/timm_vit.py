"""timm's vision transformers are teachers: DINO, DINOv2, DINOv3, SigLIP, MAE and DeiT by short
names, others as `timm:NAME[,key=value...]`.

Options: `img_size` in pixels or `grid` in patches a side; `pos`, how positions come onto another
grid (`featcache.models.position_embedding`); all others go to timm's constructor, so a small
teacher of one's own is
`timm:vit_small_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4` with
`--weights FILE`. Random weights without `grid` and `pos` are drawn at `img_size` itself, as timm's
constructor draws them.

What is stored is [CLS] and the patches: register and distillation tokens take part in everything,
the attention's softmax included, and are then left out. SigLIP has no [CLS]: its row 0 is the mean
of the patches, and its attention is that of its attention pool's query on the patches.

B batch, T tokens, P patches, D width, H heads, d width of a head, S input pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from featcache.errors import UsageError, UserError, near
from featcache.models import architecture, position_embedding
from featcache.models.contract import REGISTERED, ModelCard, Option
from featcache.models.position_embedding import resolve_input_px
from featcache.models.timm_wrapper import TimmVit, check_architecture, wrap
from featcache.models.weights import (
    build_seeded,
    fetch_pretrained,
    is_random,
    load_state,
    read_state,
    weights_file,
)

PREFIX = "timm"


def _card(
    arch: str,
    px: int,
    width: int,
    depth: int,
    params: int,
    gmac: float,
    licence: str = "apache-2.0",
) -> Any:
    return ModelCard(
        f"timm {arch}", px, 196, width, depth, params, gmac, licence, hub=f"timm/{arch}"
    )


NAMES = {
    "dino-b16": _card("vit_base_patch16_224.dino", 224, 768, 12, 85_798_656, 17.56),
    "dino-s16": _card("vit_small_patch16_224.dino", 224, 384, 12, 21_665_664, 4.6),
    "dinov2-s14": _card("vit_small_patch14_dinov2.lvd142m", 196, 384, 12, 21_605_760, 4.58),
    "dinov2-b14": _card("vit_base_patch14_dinov2.lvd142m", 196, 768, 12, 85_678_848, 17.54),
    "dinov2-l14": _card("vit_large_patch14_dinov2.lvd142m", 196, 1024, 24, 303_166_464, 61.52),
    "dinov2-b14-reg": _card(
        "vit_base_patch14_reg4_dinov2.lvd142m", 196, 768, 12, 85_681_152, 17.91
    ),
    "dinov2-l14-reg": _card(
        "vit_large_patch14_reg4_dinov2.lvd142m", 196, 1024, 24, 303_169_536, 62.8
    ),
    "dinov3-b16": _card(
        "vit_base_patch16_dinov3.lvd1689m", 224, 768, 12, 85_641_216, 17.93, "dinov3-license"
    ),
    "dinov3-l16": _card(
        "vit_large_patch16_dinov3.lvd1689m", 224, 1024, 24, 303_079_424, 62.84, "dinov3-license"
    ),
    "siglip-b16": _card("vit_base_patch16_siglip_224.webli", 224, 768, 12, 92_884_224, 17.47),
    "siglip2-b16": _card("vit_base_patch16_siglip_224.v2_webli", 224, 768, 12, 92_884_224, 17.47),
    "mae-b16": _card("vit_base_patch16_224.mae", 224, 768, 12, 85_798_656, 17.56, "cc-by-nc-4.0"),
    "mae-l16": _card(
        "vit_large_patch16_224.mae", 224, 1024, 24, 303_301_632, 61.55, "cc-by-nc-4.0"
    ),
    "deit-b16": _card("deit_base_patch16_224.fb_in1k", 224, 768, 12, 85_798_656, 17.56),
}
_UNUSED = (
    "head.",
    "head_dist.",
    "fc_norm.",
    "attn_pool.",
    "mask_token",
    "decoder_",
)  # of a file, where the model has none


def load(name: str, options: dict[str, Option], weights: str | None) -> TimmVit:
    """Load a timm model. `weights` None is its registered tag; a file's classifier, decoder and
    mask token are not the teacher's."""
    row = NAMES.get(name)
    arch = row.hub.removeprefix("timm/") if row else name.removeprefix(f"{PREFIX}:")
    _check_name(arch)
    architecture.check_keywords(
        f"teacher {name!r}", {k: v for k, v in options.items() if k not in ("grid", "pos")}
    )
    pos, constructor = (
        options.get("pos"),
        {k: v for k, v in options.items() if k not in ("grid", "pos", "img_size")},
    )
    path = weights_file(weights)
    drawn = bool(weights) and is_random(str(weights))
    if weights is not None and not path and not drawn:
        raise UsageError(
            f"weights {weights!r} of {name}: a file or random:SEED is allowed; a tag is part of "
            "timm's name"
        )
    default = row.input_px if row else None
    if drawn and "img_size" in options and not {"grid", "pos"} & options.keys():
        constructor["img_size"] = options["img_size"]
        options, default = {}, None
    if path:
        sized = {
            **constructor,
            **({"img_size": options["img_size"]} if "img_size" in options else {}),
        }
        vit = _load_file(lambda: _create_model(arch, sized, pretrained=False), name, path)
    elif drawn:
        vit = build_seeded(lambda: _create_model(arch, constructor, pretrained=False), weights)
    else:
        tag = arch.partition(".")[2] or "default"
        vit = fetch_pretrained(lambda: _create_model(arch, constructor, pretrained=True), name, tag)
    check_architecture(vit, name)
    px = resolve_input_px(name, options, int(vit.patch_embed.patch_size[0]), default)
    return wrap(vit, name, px, pos, weights or REGISTERED)


def _load_file(make: Callable[[], nn.Module], name: str, path: str) -> Any:
    """Load a file's model at the input size of the file's own positions; timm renames other layouts
    of the same network."""
    vit: Any = build_seeded(make, None)
    check_architecture(vit, name)
    state = read_state(path, name)
    there = next(
        (
            v
            for k, v in state.items()
            if k.rpartition(".")[2] in ("pos_embed", "positional_embedding")
        ),
        None,
    )
    if there is not None and vit.pos_embed is not None and 2 <= there.ndim <= 3:
        prefixes = (0 if vit.no_embed_class else vit.num_prefix_tokens, 1, 0)
        square = position_embedding.grid_side(there.shape[-2], prefixes)
        if square is not None:
            vit.set_input_size(img_size=(square[0] * int(vit.patch_embed.patch_size[0]),) * 2)
    kept = vit.state_dict().keys()
    own = {
        k: v
        for k, v in _convert_names(state, vit, path, name).items()
        if k in kept or not k.startswith(_UNUSED)
    }
    load_state(vit, own, path, name)
    return vit


def _convert_names(state: dict[str, Tensor], vit: Any, path: str, name: str) -> dict[str, Tensor]:
    """Rename a foreign project's tensors as timm does (DINOv2's registers, DINOv3, OpenAI's,
    open_clip's)."""
    from timm.models import eva, vision_transformer

    if state.keys() == vit.state_dict().keys():
        return state
    module = eva if isinstance(vit, eva.Eva) else vision_transformer
    try:
        return dict(module.checkpoint_filter_fn(dict(state), vit))
    except Exception as error:  # it reads tensors by name and shape, and a foreign file has others
        raise UserError(
            f"weights {path!r} do not fit {name}: {type(error).__name__}: {error}; give the file "
            "of this architecture"
        ) from error


def _check_name(arch: str) -> None:
    import timm

    if arch.startswith(("hf-hub:", "local-dir:")):
        return
    bare, _, tag = arch.partition(".")
    if bare not in timm.list_models():
        raise UsageError(f"unknown timm model {bare!r}: {_near_models(bare)}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(bare)]
    if tag and tag not in tags:
        raise UsageError(f"unknown weights {tag!r} of timm model {bare!r}: {near(tag, tags)}")


def _near_models(bare: str) -> str:
    import timm

    return (
        near(bare, timm.list_models("vit_*"))[:200] + " ... (timm.list_models('vit_*') lists all)"
    )


def _create_model(arch: str, options: dict[str, Option], *, pretrained: bool) -> nn.Module:
    import timm

    def build() -> nn.Module:
        return timm.create_model(arch, num_classes=0, **options)  # type: ignore[arg-type]

    try:
        if options:
            architecture.check_memory(build, f"timm model {arch!r} with options {options}")
        if not pretrained:
            return build()
        vit: Any = timm.create_model(arch, pretrained=True, **options)  # type: ignore[arg-type]
        # only now: without its head timm would load a file that lacks tensors, silently
        vit.reset_classifier(0)
        return vit
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
    ) as error:  # timm hands options to the constructor
        raise UsageError(
            f"timm model {arch!r} with options {options}: {error}; give its constructor's arguments"
        ) from error
