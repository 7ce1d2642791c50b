"""Weights of another kind of network are told by their tensors' names, so that the refusal can say
whose they are and what to give instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

# a pattern that some name must match -> whose layout that is, what to do; the first that fits
_LAYOUTS = (
    (r"lora_([AB]|down|up)\.", "a LoRA adapter (PEFT)", "merge it into its network and save that"),
    (r"(^|\.)bottom_up\.|proposal_generator\.", "a Detectron2 detector", "save its ViT alone"),
    (r"down_blocks\.\d|\.attn1\.to_q\.", "a diffusers network", "give those of a vision tower"),
    (
        r"^(text_model|vision_model)\.|encoder\.layers?\.\d+\.(attention|layer_norm1|self_attn)\b",
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
