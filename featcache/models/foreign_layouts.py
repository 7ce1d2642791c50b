"""Weights of another kind of network are told by their tensors' names, so that the refusal can say
whose they are and what to give instead."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable

# a pattern that some name must match -> whose layout that is, what to do; the first that fits
_LAYOUTS = (
    (r"lora_([AB]|down|up)\.", "a LoRA adapter (PEFT)", "merge it into its network and save that"),
    (r"(^|\.)bottom_up\.|proposal_generator\.", "a Detectron2 detector", "save its ViT alone"),
    (
        r"encoderblock_\d|MultiHeadDotProductAttention",
        "big_vision (JAX)",
        "give the weights that timm made of them (timm:NAME), as --weights of its .safetensors",
    ),
    (
        r"(^|\.)(storage_tokens|rope_embed\.periods)$|attn\.qkv\.bias_mask$",
        "DINOv3",
        "give --teacher dinov3-b16, dinov3-l16 or timm:vit_..._dinov3",
    ),
    (
        r"attn\.inner_attn_ln\.|mlp\.ffn_ln\.|mlp\.w[12]\.|rope\.freqs_(cos|sin)$",
        "EVA-02",
        "give --teacher eva02-clip-b16, eva02-clip-l14 or timm:eva02_...",
    ),
    (
        r"(^|\.)register_tokens$|mlp\.w(12|3)\.|(^|\.)blocks\.\d+\.ls1\.gamma$",
        "DINOv2, with registers, SwiGLU or LayerScale",
        "give --teacher dinov2-b14, dinov2-b14-reg or timm:vit_giant_patch14_dinov2",
    ),
    (r"down_blocks\.\d|\.attn1\.to_q\.", "a diffusers network", "give those of a vision tower"),
    (
        r"^(text_model|vision_model)\.|encoder\.layers?\.\d+\.(attention|layer_norm1|self_attn)\b"
        r"|(^|\.)layer\.\d+\.(attention|layer_scale1)\.",
        "transformers",
        "give the folder, with its config.json",
    ),
)


def describe(names: Iterable[str]) -> str:
    """Return whose layout the names are of and what to do, or an empty text.

    >>> describe(["base_model.model.blocks.0.attn.qkv.lora_A.weight"])
    'its names are those of a LoRA adapter (PEFT): merge it into its network and save that'
    """
    names = list(names)
    for pattern, whose, remedy in _LAYOUTS:
        if any(re.search(pattern, name) for name in names):
            return f"its names are those of {whose}: {remedy}"
    return ""


def check_form(path: str) -> None:
    """Raise ValueError, which says whose it is and what to do, for a file of numpy's arrays
    (.npz)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError(
            "it is numpy's .npz, as big_vision (JAX) publishes: let timm.create_model(NAME, "
            "checkpoint_path=FILE) read it"
        )
