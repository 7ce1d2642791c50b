"""mae: the names of MAE's released checkpoints, which its code and whoever reads those checkpoints
take.

    cls_token  pos_embed  patch_embed.proj  blocks.N.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1,
    mlp.fc2}  norm            fine-tuned by the mean: fc_norm in place of norm; head

LayerScale is folded, biases that a network lacks are zeros (`models/plain_vit.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from student.features.comparison import Comparison
from student.features.exported import MODULE, TIMM_FAMILIES, Exported
from student.models.plain_vit import PlainVit, plain_vit

LIBRARY = "pytorch"
FAMILIES = TIMM_FAMILIES
COMPARISON = Comparison("timm's VisionTransformer by MAE's names")
_OTHERWISE = f"take --format timm, or {MODULE}"
# as MAE's models_vit and timm's VisionTransformer call them
_SIZES = {
    "img_size": "img_px",
    "patch_size": "patch_px",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "num_classes": "classes",
}


def check(given: Exported) -> None:
    """Refuse what MAE's ViT has not."""
    plain(given)


def plain(given: Exported) -> PlainVit:
    """Return the network as MAE's ViT."""
    return plain_vit(given.net, "MAE's ViT", _OTHERWISE)


def write(given: Exported, folder: Path) -> None:
    """Write model.safetensors, and config.json with the sizes, eps and pixels."""
    found = plain(given)
    sizes = {key: getattr(found, name) for key, name in _SIZES.items()}
    mean, std = given.pixels
    config = {
        **sizes,
        "mlp_ratio": found.mlp_width / found.width,
        "qkv_bias": True,
        "layer_norm_eps": found.eps,
        "pool": found.pool,
        "mean": list(mean),
        "std": list(std),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(found.state, folder / "model.safetensors", metadata={"format": "pt"})


def reload(folder: Path, classes: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Load the weights strictly into timm's VisionTransformer, the class that MAE's is one of."""
    config = json.loads((folder / "config.json").read_text())
    net: Any = VisionTransformer(
        **{key: config[key] for key in _SIZES},
        mlp_ratio=config["mlp_ratio"],
        global_pool="avg" if config["pool"] == "mean" else "token",
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
    )
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net = net.double().eval()

    def outputs(images: Tensor) -> dict[str, Tensor]:
        tokens = net.forward_features(images)
        return {"tokens": tokens, **({"logits": net.forward_head(tokens)} if classes else {})}

    return outputs


def usage(given: Exported) -> str:
    """Return Python that makes the checkpoint file that MAE's code reads."""
    return (
        "import torch\nfrom safetensors.torch import load_file\n\n"
        'state = load_file("DIR/model.safetensors")  # the names of MAE\'s ViT\n'
        'torch.save({"model": state}, "mae_vit.pth")  # as main_finetune.py --finetune reads it'
    )
