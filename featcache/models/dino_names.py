"""DINOv2's and DINOv3's own checkpoints have what timm's networks have not, and timm would leave
out without a word, or refuse.

    blocks.CHUNK.I.*      DINOv2 trained in chunks of blocks (FSDP); I counts through all of them
                          (facebookresearch/dinov2 models/vision_transformer.py)
    attn.qkv.bias         DINOv3's, zero in the distilled networks: timm has a network with these
                          biases (`..._qkvb`) and one without

D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from torch import Tensor

_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_BIASES = re.compile(r"blocks\.\d+\.attn\.(qkv\.bias|q_bias|v_bias)")
_OWN = ("q_bias", "q_proj.bias", "qkv.bias")  # of which a network with such biases has one


def unchunked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with blocks counted through; ValueError where two get one name, as where
    each chunk counts for itself."""
    found = {_CHUNKED.sub(r"blocks.\1.", name): value for name, value in state.items()}
    if len(found) != len(state):
        raise ValueError("its blocks lie in chunks, and those of two have one number")
    return found


def without_zero_biases(state: Mapping[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """Leave out the biases of queries and values that a network, whose tensors are `own`, has not:
    they must be zero. A qkv.bias (3D,) has the keys' in its middle, which DINOv3 masks."""
    found = dict(state)
    for name, value in state.items():
        match = _BIASES.fullmatch(name)
        block = name.rpartition("attn.")[0]
        if match is None or own & {f"{block}attn.{part}" for part in _OWN}:
            continue
        parts = value.chunk(3)[::2] if match[1] == "qkv.bias" else (value,)
        if any(bool(part.any()) for part in parts):
            raise ValueError(
                f"{name} is not zero, and this network has no such bias; give the one that has it, "
                "as timm:vit_base_patch16_dinov3_qkvb"
            )
        del found[name]
    return found
