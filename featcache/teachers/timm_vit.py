"""timm's vision transformers: DINO, DINOv2, DINOv3, SigLIP, MAE and DeiT by short names, others as
`timm:NAME[,key=value...]`.

Options: `img_size` in pixels or `grid` in patches a side; `pos`, how positions come onto another grid
(`featcache.models.position_embedding`); all others go to timm's constructor, so a small teacher of one's own is
`timm:vit_small_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4` with `--weights FILE`. Random
weights without `grid` and `pos` are drawn at `img_size` itself, as timm's constructor draws them.

What is stored is [CLS] and the patches: register and distillation tokens take part in everything, the attention's
softmax included, and are then left out. SigLIP has no [CLS]: its row 0 is the mean of the patches, and its attention is
that of its attention pool's query on the patches.

B batch, T tokens, P patches, D width, H heads, d width of a head, S input pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError, near
from featcache.models import position_embedding as positions
from featcache.targets import levels as targets

PREFIX = "timm"


def _row(arch: str, px: int, width: int, depth: int, params: int, gmac: float, licence: str = "apache-2.0") -> Any:
    return teachers.Row(f"timm {arch}", px, 196, width, depth, params, gmac, licence, hub=f"timm/{arch}")


NAMES = {
    "dino-b16": _row("vit_base_patch16_224.dino", 224, 768, 12, 85_798_656, 17.56),
    "dino-s16": _row("vit_small_patch16_224.dino", 224, 384, 12, 21_665_664, 4.6),
    "dinov2-s14": _row("vit_small_patch14_dinov2.lvd142m", 196, 384, 12, 21_605_760, 4.58),
    "dinov2-b14": _row("vit_base_patch14_dinov2.lvd142m", 196, 768, 12, 85_678_848, 17.54),
    "dinov2-l14": _row("vit_large_patch14_dinov2.lvd142m", 196, 1024, 24, 303_166_464, 61.52),
    "dinov2-b14-reg": _row("vit_base_patch14_reg4_dinov2.lvd142m", 196, 768, 12, 85_681_152, 17.91),
    "dinov2-l14-reg": _row("vit_large_patch14_reg4_dinov2.lvd142m", 196, 1024, 24, 303_169_536, 62.8),
    "dinov3-b16": _row("vit_base_patch16_dinov3.lvd1689m", 224, 768, 12, 85_641_216, 17.93, "dinov3-license"),
    "dinov3-l16": _row("vit_large_patch16_dinov3.lvd1689m", 224, 1024, 24, 303_079_424, 62.84, "dinov3-license"),
    "siglip-b16": _row("vit_base_patch16_siglip_224.webli", 224, 768, 12, 92_884_224, 17.47),
    "siglip2-b16": _row("vit_base_patch16_siglip_224.v2_webli", 224, 768, 12, 92_884_224, 17.47),
    "mae-b16": _row("vit_base_patch16_224.mae", 224, 768, 12, 85_798_656, 17.56, "cc-by-nc-4.0"),
    "mae-l16": _row("vit_large_patch16_224.mae", 224, 1024, 24, 303_301_632, 61.55, "cc-by-nc-4.0"),
    "deit-b16": _row("deit_base_patch16_224.fb_in1k", 224, 768, 12, 85_798_656, 17.56),
}
_UNUSED = (
    "head.",
    "head_dist.",
    "fc_norm.",
    "attn_pool.",
    "mask_token",
    "decoder_",
)  # of a file, where the model has none
DEFAULT_POS = "bicubic"


class TimmVit(nn.Module):
    """`vit`: a timm transformer, read through hooks. `prefix` tokens come before the patches, [CLS] first if there."""

    name = "timm"

    def __init__(self, vit: Any, weights: str, mean: Any = None, std: Any = None, shrink_from: int = 0) -> None:
        super().__init__()
        self.vit = vit
        self.weights = weights
        self._px, self._shrinks = int(vit.patch_embed.img_size[0]), bool(shrink_from)
        self.input_px = shrink_from or self._px
        self.patches = int(vit.patch_embed.num_patches)
        self.width, self.depth = int(vit.embed_dim), len(vit.blocks)
        self.pixel_mean = tuple(mean or vit.pretrained_cfg["mean"])
        self.pixel_std = tuple(std or vit.pretrained_cfg["std"])
        self.first_token = "mean" if vit.cls_token is None else "cls"
        self._attention = torch.empty(0)
        self._tap = teachers.Tap(vit.blocks)
        if vit.cls_token is None:
            vit.norm.register_forward_hook(self._see_normed)
        else:
            vit.blocks[-1].attn.register_forward_pre_hook(self._see_last, with_kwargs=True)

    def _see_last(self, attn: Any, inputs: tuple[Tensor, ...], more: Mapping[str, Any]) -> None:
        query, keys = _query_keys(attn, inputs[0], more.get("rope"))
        self._attention = targets.cls_attention(query, keys, attn.num_heads, self.vit.num_prefix_tokens)

    def _see_normed(self, norm: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> None:
        """The attention of the pool's own query on the final norm's output (B, T, D)."""
        pool = self.vit.attn_pool
        x = x if pool.pos_embed is None else x + pool.pos_embed
        size = pool.num_heads * pool.head_dim
        bias = None if pool.kv.bias is None else pool.kv.bias[:size]
        query = pool.q_norm(pool.q(pool.latent[:, :1]).unflatten(-1, (pool.num_heads, -1))).flatten(1)  # (1, D)
        keys = pool.k_norm(F.linear(x, pool.kv.weight[:size], bias).unflatten(-1, (pool.num_heads, -1))).flatten(2)
        query = query.expand(len(x), -1)
        self._attention = targets.cls_attention(query, keys, pool.num_heads, self.vit.num_prefix_tokens)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P)."""
        pixels = teachers.pixels(images, self.pixel_mean, self.pixel_std)
        self.vit.forward_features(positions.shrink(pixels, self._px) if self._shrinks else pixels)
        return [self._stored(y) for y in self._tap.take(levels)], self._attention

    def _stored(self, y: Tensor) -> Tensor:
        """(B, prefix + P, D) -> (B, 1 + P, D)."""
        prefix = self.vit.num_prefix_tokens
        patches = y[:, prefix:]
        if self.first_token == "mean":
            return torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return y if prefix == 1 else torch.cat([y[:, :1], patches], 1)

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Empty where the model has no final LayerNorm on its tokens (it then pools first)."""
        norm = self.vit.norm
        if not isinstance(norm, nn.LayerNorm):
            return {}
        parts = {"gamma": norm.weight, "beta": norm.bias, "eps": torch.tensor(norm.eps)}
        return {name: part.detach().cpu().float().numpy() for name, part in parts.items()}


def _query_keys(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normed tokens x (B, T, D) -> the [CLS] query (B, H d) and all keys (B, T, H d), normed and rotated."""
    (wq, bq), (wk, bk) = _projections(attn)
    query = attn.q_norm(F.linear(x[:, :1], wq, bq).unflatten(-1, (attn.num_heads, -1)))
    keys = attn.k_norm(F.linear(x, wk, bk).unflatten(-1, (-1, query.shape[-1])))  # (B, T, H, d)
    if rope is not None:  # prefix tokens, [CLS] and so the query among them, have no place and are not rotated
        from timm.layers import apply_rot_embed_cat

        prefix = attn.num_prefix_tokens
        patches = apply_rot_embed_cat(keys[:, prefix:].transpose(1, 2), rope, half=attn.rotate_half)
        keys = torch.cat([keys[:, :prefix], patches.transpose(1, 2).to(keys.dtype)], 1)
    shared = query.shape[2] // keys.shape[2]  # heads that share a key (grouped queries)
    return query.flatten(1), keys.repeat_interleave(shared, 2).flatten(2)


def _projections(attn: Any) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Weight and bias of the query and of the key, however the layer keeps them."""
    if attn.qkv is None:
        return (attn.q_proj.weight, attn.q_proj.bias), (attn.k_proj.weight, attn.k_proj.bias)
    size = attn.num_heads * attn.head_dim
    weights = attn.qkv.weight.split(size)
    if getattr(attn, "q_bias", None) is not None:
        return (weights[0], attn.q_bias), (weights[1], attn.k_bias)
    biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(size)
    return (weights[0], biases[0]), (weights[1], biases[1])


def load(name: str, options: dict[str, teachers.Option], weights: str | None) -> TimmVit:
    """`weights` None is timm's registered tag; a file's classifier, decoder and mask token are not the teacher's."""
    row = NAMES.get(name)
    arch = row.hub.removeprefix("timm/") if row else name.removeprefix(f"{PREFIX}:")
    _check_name(arch)
    pos, constructor = options.get("pos"), {k: v for k, v in options.items() if k not in ("grid", "pos", "img_size")}
    path = teachers.file_weights(weights)
    drawn = bool(weights) and teachers.is_random(str(weights))
    if weights is not None and not path and not drawn:
        raise UsageError(
            f"weights {weights!r} of {name}: a file or random:SEED is allowed; a tag is part of timm's name"
        )
    default = row.input_px if row else None
    if drawn and "img_size" in options and not {"grid", "pos"} & options.keys():
        constructor["img_size"] = options["img_size"]
        options, default = {}, None
    if path:
        sized = {**constructor, **({"img_size": options["img_size"]} if "img_size" in options else {})}
        vit = _from_file(lambda: _create(arch, sized, pretrained=False), name, path)
    elif drawn:
        vit = teachers.build(lambda: _create(arch, constructor, pretrained=False), weights)
    else:
        tag = arch.partition(".")[2] or "default"
        vit = teachers.fetch(lambda: _create(arch, constructor, pretrained=True), name, tag)
    check_kind(vit, name)
    px = wanted_px(name, options, int(vit.patch_embed.patch_size[0]), default)
    return wrapped(vit, name, px, pos, weights or teachers.REGISTERED)


def wanted_px(name: str, options: Mapping[str, teachers.Option], patch: int, default: int | None) -> int | None:
    """Input pixels by `img_size` or `grid`, or the default; None leaves the model's own."""
    asked = {key: options[key] for key in ("img_size", "grid") if key in options}
    if len(asked) == 2:
        raise UsageError(f"teacher {name!r}: img_size={asked['img_size']} and grid={asked['grid']}; give one of them")
    for key, value in asked.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"teacher {name!r}: {key}={value!r}; a whole number from 1 is needed")
        px = value * patch if key == "grid" else value
        if px % patch:
            below = max(1, px // patch) * patch
            raise UsageError(
                f"teacher {name!r}: img_size={px} is no multiple of its {patch}-pixel patches; give {below} or "
                f"{below + patch}"
            )
        return px
    return default


def wrapped(
    vit: Any, name: str, px: int | None, pos: teachers.Option | None, weights: str, mean: Any = None, std: Any = None
) -> TimmVit:
    """The teacher at `px` input pixels, positions resized as `pos` says."""
    check_kind(vit, name)
    native = int(vit.patch_embed.img_size[0])
    px = px or native
    shrink_from = positions.shrinks_from(name, pos, native, px)
    if pos not in (None, "tensor-bicubic") and vit.pos_embed is None:
        raise UsageError(f"teacher {name!r}: pos={pos}, but its positions are rotary, none are resized; leave pos out")
    if px != native:
        _resize(vit, px, str(pos or DEFAULT_POS))
    return TimmVit(vit, weights, mean, std, shrink_from)


def _resize(vit: Any, px: int, mode: str) -> None:
    """Another input size: timm adapts the grid and what is rotary, the learned positions are resized by our rule."""
    before = None if vit.pos_embed is None else vit.pos_embed.detach().clone()
    vit.set_input_size(img_size=(px, px))
    if before is not None:
        prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
        resized = positions.resize(before, int(vit.patch_embed.grid_size[0]), mode, prefix)
        vit.pos_embed = nn.Parameter(resized, requires_grad=False)


def _from_file(make: Callable[[], nn.Module], name: str, path: str) -> Any:
    """The model at the input size of the file's own positions; timm renames other layouts of the same network."""
    vit: Any = teachers.build(make, None)
    check_kind(vit, name)
    state = teachers.read_state(path, name)
    there = next((v for k, v in state.items() if k.rpartition(".")[2] in ("pos_embed", "positional_embedding")), None)
    if there is not None and vit.pos_embed is not None and 2 <= there.ndim <= 3:
        prefixes = (0 if vit.no_embed_class else vit.num_prefix_tokens, 1, 0)
        square = positions.side_of(there.shape[-2], prefixes)
        if square is not None:
            vit.set_input_size(img_size=(square[0] * int(vit.patch_embed.patch_size[0]),) * 2)
    kept = vit.state_dict().keys()
    own = {k: v for k, v in _renamed(state, vit, path, name).items() if k in kept or not k.startswith(_UNUSED)}
    teachers.load_state(vit, own, path, name)
    return vit


def _renamed(state: dict[str, Tensor], vit: Any, path: str, name: str) -> dict[str, Tensor]:
    """timm's own reading of other projects' names (DINOv2's registers, DINOv3, OpenAI's, open_clip's)."""
    from timm.models import eva, vision_transformer

    if state.keys() == vit.state_dict().keys():
        return state
    module = eva if isinstance(vit, eva.Eva) else vision_transformer
    try:
        return dict(module.checkpoint_filter_fn(dict(state), vit))
    except Exception as error:  # it reads tensors by name and shape, and a foreign file has others
        raise UserError(
            f"weights {path!r} do not fit {name}: {type(error).__name__}: {error}; give the file of this architecture"
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

    return near(bare, timm.list_models("vit_*"))[:200] + " ... (timm.list_models('vit_*') lists all)"


def check_kind(vit: Any, name: str) -> None:
    """Only layers whose attention is known here: another kind would be read wrongly, and nobody would notice."""
    from timm.layers.attention import Attention, AttentionRope
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    known = (
        (VisionTransformer, Block, Attention), (VisionTransformerDistilled, Block, Attention),
        (Eva, EvaBlock, EvaAttention), (Eva, EvaBlock, AttentionRope),
    )  # fmt: skip
    last = vit.blocks[-1] if len(getattr(vit, "blocks", ())) else None
    plain = (type(vit), type(last), type(getattr(last, "attn", None))) in known and vit.in_chans == 3
    if not plain or (vit.cls_token is None and not _pools(vit)):
        raise UserError(
            f"teacher {name!r} is a timm {type(vit).__name__} without what is read here: a VisionTransformer or Eva "
            "with plain attention, three colours, and a [CLS] token or an attention pool is needed, such as "
            "vit_base_patch16_224"
        )


def _pools(vit: Any) -> bool:
    """Whether one query of an attention pool looks at the tokens."""
    from timm.layers import AttentionPoolLatent

    return type(vit.attn_pool) is AttentionPoolLatent and vit.attn_pool.latent_len == 1


def _create(arch: str, options: dict[str, teachers.Option], *, pretrained: bool) -> nn.Module:
    import timm

    try:
        if not pretrained:
            return timm.create_model(arch, num_classes=0, **options)  # type: ignore[arg-type]
        vit: Any = timm.create_model(arch, pretrained=True, **options)  # type: ignore[arg-type]
        vit.reset_classifier(0)  # only now: without its head timm would load a file that lacks tensors, silently
        return vit
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # timm hands options to the constructor
        raise UsageError(
            f"timm model {arch!r} with options {options}: {error}; give its constructor's arguments"
        ) from error
