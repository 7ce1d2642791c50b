"""timm's vision transformers are teachers: DINO, DINOv2, DINOv3, TIPSv2, C-RADIO, SigLIP,
Perception Encoder, EVA-02-CLIP, AIMv2, BEiT v2, MAE and DeiT by short names, others as
`timm:NAME[,key=value...]`.

Options: `img_size` in pixels or `grid` in patches a side; `pos`, how positions come onto another
grid (`featcache.models.position_embedding`); all others go to timm's constructor, so a small
teacher of one's own is
`timm:vit_small_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4` with
`--weights FILE`. Random weights without `grid` and `pos` are drawn at `img_size` itself, as timm's
constructor draws them.

What is stored is [CLS] and the patches: register and distillation tokens take part in everything,
the attention's softmax included, and are then left out. SigLIP and AIMv2 have no [CLS]: their row 0
is the mean of the patches. SigLIP's attention is that of its attention pool's query on the patches;
AIMv2 has none. Which token is [CLS], and whose attention is taken, is told in
`featcache.models.timm_wrapper`.

C-RADIO's positions are a grid of 128 x 128 that its authors resize at each input size, bilinearly;
timm does so when weights are loaded, so without `pos` the network is made at the input size asked
for. A file of BEiT v2's self-supervised pretraining has a final norm and one table of relative
positions: `beitv2-b16,use_fc_norm=false,use_rel_pos_bias=false,use_shared_rel_pos_bias=true`.

B batch, T tokens, P patches, D width, H heads, d width of a head, S input pixels.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from featcache.errors import UsageError, UserError, near
from featcache.models import (
    architecture,
    dino_names,
    position_embedding,
    transformers_folder,
    transformers_pixels,
)
from featcache.models.contract import REGISTERED, ModelCard, Option
from featcache.models.position_embedding import resolve_input_px
from featcache.models.timm_wrapper import (
    TimmVit,
    check_architecture,
    position_prefix,
    set_input_px,
    wrap,
)
from featcache.models.weights import (
    FilePart,
    build_seeded,
    fetch_pretrained,
    is_random,
    load_state,
    read_part,
    weights_file,
)

PREFIX = "timm"
_RADIO_PX = 512  # timm's own input size of C-RADIO


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


_NVIDIA = "nvidia-open-model-license"
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
    # DINOv2's network by another recipe; pixels are not normalised
    "tipsv2-b14": _card("vit_base_patch14_reg1_tipsv2.webli", 196, 768, 12, 85_678_848, 17.63),
    "tipsv2-l14": _card("vit_large_patch14_reg1_tipsv2.webli", 196, 1024, 24, 303_166_464, 61.84),
    "radiov3-b16": _card(
        "vit_base_patch16_radio_v3.c_radio", 224, 768, 12, 85_820_160, 18.21, _NVIDIA
    ),
    "radiov3-l16": _card(
        "vit_large_patch16_radio_v3.c_radio", 224, 1024, 24, 303_354_880, 63.81, _NVIDIA
    ),
    "radiov3-h16": _card(
        "vit_huge_patch16_radio_v3.c_radio", 224, 1280, 32, 630_923_520, 131.95, _NVIDIA
    ),
    "radiov4-so400m": _card(
        "vit_so400m_patch16_radio_v4.c_radio", 224, 1152, 27, 412_589_808, 87.49, _NVIDIA
    ),
    "radiov4-h16": _card(
        "vit_huge_patch16_radio_v4.c_radio", 224, 1280, 32, 630_926_080, 133.27, _NVIDIA
    ),
    "pe-core-b16": _card("vit_pe_core_base_patch16_224.fb", 224, 768, 12, 92_886_528, 17.56),
    "pe-core-l14": _card("vit_pe_core_large_patch14_336.fb", 196, 1024, 24, 315_713_536, 61.52),
    "pe-spatial-b16": _card("vit_pe_spatial_base_patch16_512.fb", 224, 768, 12, 85_797_888, 17.56),
    "pe-spatial-l14": _card(
        "vit_pe_spatial_large_patch14_448.fb", 196, 1024, 24, 303_116_288, 61.52
    ),
    "eva02-clip-b16": _card(
        "eva02_base_patch16_clip_224.merged2b", 224, 768, 12, 85_869_312, 17.56, "mit"
    ),
    "eva02-clip-l14": _card(
        "eva02_large_patch14_clip_224.merged2b", 196, 1024, 24, 303_256_512, 61.51, "mit"
    ),
    # Apple's own repositories say apple-amlr, for research alone, since March 2025; timm's copies
    # still say apple-ascl, as Apple's did before
    "aimv2-l14": _card(
        "aimv2_large_patch14_224.apple_pt", 196, 1024, 24, 309_136_384, 62.43, "apple-amlr"
    ),
    "aimv2-h14": _card(
        "aimv2_huge_patch14_224.apple_pt", 196, 1536, 24, 680_759_808, 136.19, "apple-amlr"
    ),
    "siglip-b16": _card("vit_base_patch16_siglip_224.webli", 224, 768, 12, 92_884_224, 17.47),
    "siglip2-b16": _card("vit_base_patch16_siglip_224.v2_webli", 224, 768, 12, 92_884_224, 17.47),
    # timm has no weights from before fine-tuning; these are the least tuned to a thousand classes
    "beitv2-b16": _card("beitv2_base_patch16_224.in1k_ft_in22k", 224, 768, 12, 85_761_984, 17.56),
    "beitv2-l16": _card(
        "beitv2_large_patch16_224.in1k_ft_in22k", 224, 1024, 24, 303_405_568, 61.55
    ),
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
    "lm_head.",
    "cls_pt_",
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
    if pos is None and _resizes_itself(arch):
        patch_px = int(constructor.get("patch_size", 16))
        constructor["img_size"] = resolve_input_px(name, options, patch_px, default) or _RADIO_PX
        options, default = {}, None
    elif drawn and "img_size" in options and not {"grid", "pos"} & options.keys():
        constructor["img_size"] = options["img_size"]
        options, default = {}, None
    if path:
        sized = {
            **constructor,
            **({"img_size": options["img_size"]} if "img_size" in options else {}),
        }
        vit, weights = _load_file(
            lambda: _create_model(arch, sized, pretrained=False), name, path, pos
        )
    elif drawn:
        vit = build_seeded(lambda: _create_model(arch, constructor, pretrained=False), weights)
    else:
        tag = arch.partition(".")[2] or "default"
        vit = fetch_pretrained(lambda: _create_model(arch, constructor, pretrained=True), name, tag)
    check_architecture(vit, name)
    px = resolve_input_px(name, options, int(vit.patch_embed.patch_size[0]), default)
    own = vit.pretrained_cfg
    mean, std = transformers_pixels.choose(path, name, lambda: (own["mean"], own["std"]))
    return wrap(vit, name, px, pos, weights or REGISTERED, mean, std)


def _load_file(
    make: Callable[[], nn.Module], name: str, path: str, pos: Option | None
) -> tuple[Any, str]:
    """Load a file's model at the input size of the file's own positions, and return what names its
    weights; timm renames other layouts of the same network, and resizes positions where that is its
    part."""
    vit: Any = build_seeded(make, None)
    check_architecture(vit, name)
    state, weights = _read(vit, path, name)
    side = None if pos is None and _resizes_itself(_arch(vit)) else _stored_side(vit, state)
    if side is not None:
        set_input_px(vit, side * int(vit.patch_embed.patch_size[0]))
    kept = vit.state_dict().keys()
    own = {
        k: v
        for k, v in _convert_names(state, vit, path, name).items()
        if k in kept or not k.startswith(_UNUSED)
    }
    load_state(vit, own, path, name)
    return vit, weights


def _read(vit: Any, path: str, name: str) -> FilePart:
    """Read a file's tensors, or those of a transformers' folder whose config fits the network."""
    if not transformers_folder.is_folder(path):
        return read_part(path, name)
    folder = transformers_folder.read_config(path, name, clip=False)
    state = transformers_folder.read_state(folder, name)
    block = vit.blocks[0]
    own = transformers_folder.Architecture(
        width=int(vit.embed_dim),
        depth=len(vit.blocks),
        heads=int(block.attn.num_heads),
        mlp_width=int(block.mlp.fc1.out_features),
        patch_px=int(vit.patch_embed.patch_size[0]),
        registers=0 if vit.reg_token is None else int(vit.reg_token.shape[1]),
        activation=transformers_folder.activation_of(block.mlp.act),
        layer_norm_eps=float(getattr(block.norm1, "eps", 0)),
    )
    eps = transformers_folder.check(folder, own, state.get("pos_embed"), name)
    transformers_folder.set_eps(vit, eps)
    return FilePart(state, path)


def _arch(vit: Any) -> str:
    return str(vit.pretrained_cfg.get("architecture", ""))


def _resizes_itself(arch: str) -> bool:
    """Tell whether timm resizes an architecture's positions as its authors do."""
    return "_radio_" in arch


def _stored_side(vit: Any, state: Mapping[str, Tensor]) -> int | None:
    """Return the patches a side of the grid that a file's positions are of, None where they do not
    tell."""
    by_name = {name.rpartition(".")[2]: value for name, value in reversed(list(state.items()))}
    table = by_name.get("relative_position_bias_table")
    if table is not None and table.ndim == 2:  # BEiT's: (2 side - 1)^2 offsets and three of [CLS]
        return (math.isqrt(max(table.shape[0] - 3, 0)) + 1) // 2 or None
    there = by_name.get("pos_embed", by_name.get("positional_embedding"))
    if there is None or vit.pos_embed is None or not 2 <= there.ndim <= 3:
        return None
    square = position_embedding.grid_side(there.shape[-2], (position_prefix(vit), 1, 0))
    return square[0] if square else None


def _convert_names(state: dict[str, Tensor], vit: Any, path: str, name: str) -> dict[str, Tensor]:
    """Rename a foreign project's tensors as timm does (DINOv2's registers, DINOv3, EVA, OpenAI's,
    open_clip's, RADIO's)."""
    own = vit.state_dict().keys()
    if state.keys() == own and not _resizes_itself(_arch(vit)):
        return state
    try:
        known = dino_names.unchunked(state)
        if type(vit).__name__ == "Eva":  # timm's class of DINOv3
            known = dino_names.without_zero_biases(known, own)
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints there of biases
            return dict(_timm_filter(vit)(known, vit))
    except Exception as error:  # it reads tensors by name and shape, and a foreign file has others
        raise UserError(
            f"weights {path!r} do not fit {name}: {type(error).__name__}: {error}; give the file "
            "of this architecture"
        ) from error


def _timm_filter(vit: Any) -> Callable[[dict[str, Tensor], Any], Mapping[str, Tensor]]:
    """Return the function by which timm takes files of an architecture."""
    from timm.models import beit, eva, vision_transformer

    arch = _arch(vit)
    if _resizes_itself(arch):  # as timm itself calls it for these, which it does not offer by name
        corners = any(part in arch for part in vision_transformer._RADIO_ALIGN_CORNERS)
        return partial(
            vision_transformer.checkpoint_filter_fn,
            interpolation="bilinear",
            antialias=False,
            align_corners=corners,
        )
    modules = {eva.Eva: eva, beit.Beit: beit}
    found: Any = modules.get(type(vit), vision_transformer)
    take: Callable[[dict[str, Tensor], Any], Mapping[str, Tensor]] = found.checkpoint_filter_fn
    return take


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
            f"timm model {arch!r} with options {options}: {str(error) or type(error).__name__}; "
            "give its constructor's arguments"
        ) from error
