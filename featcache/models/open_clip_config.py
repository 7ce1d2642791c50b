"""A config of open_clip's is read from a file that others wrote; it asks for a network and no more.

open_clip fetches what a config names: a text tower of the Hugging Face hub, timm's weights of the
picture tower. The text tower is never run here, so a fetched one is left out; weights come from
--weights. What remains are sizes and switches, which are checked before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from featcache.errors import UserError, near
from featcache.models.architecture import MAX_DEPTH, MAX_PX, MAX_WIDTH
from featcache.runtime import strict_json

NAME = "open_clip_config.json"  # lies beside weights that open_clip saved
_MODEL = (
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text",
    "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype", "output_dict",
)  # fmt: skip
_TOWER = (
    "layers", "width", "mlp_ratio", "ls_init_value", "final_ln_after_pool", "pool_type",
    "output_tokens", "act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn",
    "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc",
)  # fmt: skip
_VISION = (
    *_TOWER, "head_width", "patch_size", "image_size", "patch_dropout", "attentional_pool",
    "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type", "timm_model_name",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path",
)  # fmt: skip
_TEXT = (
    *_TOWER, "context_length", "vocab_size", "heads", "embed_cls", "pad_id", "eos_id",
    "no_causal_mask", "proj_bias", "proj_type", "hf_tokenizer_name", "tokenizer_mode",
    "tokenizer_kwargs", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    "dim_head", "n_queries", "attn_pooler_heads", "mlp_ratio",
)  # fmt: skip
_LARGEST = {
    "layers": MAX_DEPTH, "width": MAX_WIDTH, "embed_dim": MAX_WIDTH, "image_size": MAX_PX,
    "mlp_ratio": 64,
}  # fmt: skip
_ANY_LARGEST = 1 << 20  # a vocabulary is the largest of the others
# in the place of a text tower that would be fetched; it is built and never run
_NO_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read {"model_cfg": {...}, ...} of open_clip_config.json, or of one of open_clip's bare model
    configs. A file that is none, or asks for more than a network, is a UserError."""
    what = f"teacher {name!r}: config {str(path)!r}"
    try:
        about = strict_json.read_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read: {error}; JSON is needed") from error
    about = about if isinstance(about, dict) and "model_cfg" in about else {"model_cfg": about}
    model = about["model_cfg"]
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(
            f"{what} lacks embed_dim, vision_cfg or text_cfg; one of open_clip's model configs is "
            "needed"
        )
    return {"model_cfg": _checked_model(model, what), "preprocess_cfg": _statistics(about, what)}


def has_text(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config that was read describes a text tower, with a tokenizer that
    open_clip brings along."""
    text = config["model_cfg"]["text_cfg"] if config else {}
    return text != _NO_TEXT and not text.get("hf_tokenizer_name")


def _checked_model(model: dict[str, Any], what: str) -> dict[str, Any]:
    _check_keys(model, _MODEL, what)
    vision = _tower(model, "vision_cfg", _VISION, what)
    text = _tower(model, "text_cfg", _TEXT, what)
    more = {}
    if "multimodal_cfg" in model:
        more["multimodal_cfg"] = _tower(model, "multimodal_cfg", _TEXT, what)
    timm_name = vision.get("timm_model_name")
    if timm_name is not None:
        if not isinstance(timm_name, str) or not re.fullmatch(r"\w[\w.-]*", timm_name, re.ASCII):
            raise UserError(
                f"{what}: timm_model_name is {timm_name!r}; the name of one of timm's networks is "
                "needed, without a place to fetch it from"
            )
        vision["timm_model_pretrained"] = False  # the weights come with --weights
    if text.get("hf_model_name") is not None:
        text = dict(_NO_TEXT)
    return {**model, "vision_cfg": vision, "text_cfg": text, **more}


def _tower(model: dict[str, Any], key: str, known: tuple[str, ...], what: str) -> dict[str, Any]:
    tower = model[key]
    if not isinstance(tower, dict):
        raise UserError(f"{what}: {key} is {str(tower)[:80]!r}; an object is needed")
    what = f"{what}: {key}"
    _check_keys(tower, known, what)
    layers, width = tower.get("layers", 12), tower.get("width", 512)
    depth = sum(layers) if isinstance(layers, list) else layers
    memory = psutil.virtual_memory().total
    if isinstance(depth, int) and isinstance(width, int) and 48 * depth * width**2 > memory:
        raise UserError(
            f"{what}: {depth} layers of width {width} do not fit into the {memory >> 30} GiB of "
            "this machine; give smaller sizes"
        )
    return dict(tower)


def _check_keys(values: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    """Refuse a key that is none of open_clip's, and a number out of its range."""
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{what}: unknown key {key[:80]!r}; {near(key[:80], known)}")
        largest = _LARGEST.get(key, _ANY_LARGEST)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not -_ANY_LARGEST <= each <= largest:
                raise UserError(f"{what}: {key} is {str(each)[:40]}; {largest} is the largest")
            if isinstance(each, int) and key in _LARGEST and each < 1:
                raise UserError(f"{what}: {key} is {each}; a number from 1 is needed")


def _statistics(about: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the part on pixels: mean and std are three numbers each, std above 0, or absent."""
    pixels = about.get("preprocess_cfg")
    if pixels is None:
        return {}
    if not isinstance(pixels, dict):
        raise UserError(f"{what}: preprocess_cfg is no object")
    for key in ("mean", "std"):
        values = pixels.get(key)
        if values is not None and not _are_three(values, above_0=key == "std"):
            raise UserError(
                f"{what}: its {key} of pixels is {str(values)[:80]}; three numbers are needed"
                f"{' above 0' * (key == 'std')}"
            )
    return pixels


def _are_three(values: Any, *, above_0: bool) -> bool:
    if not isinstance(values, list) or len(values) != 3:
        return False
    numbers = all(type(value) in (int, float) and abs(value) < 256 for value in values)
    return numbers and (not above_0 or min(values) > 0)
