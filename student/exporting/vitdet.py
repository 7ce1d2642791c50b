"""vitdet: the names of detectron2's ViTDet, whose backbone is a plain ViT below a feature pyramid.

    backbone.net.{pos_embed, patch_embed.proj, blocks.N.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1,
    mlp.fc2}}                     (facebookresearch/detectron2 modeling/backbone/vit.py)

pos_embed keeps the position of [CLS], which detectron2 leaves out when it reads it
(`pretrain_use_cls_token=True`). Its ViT has no [CLS], no final norm and no head, so those of the
run stay behind, and tokens are those of the patches alone. Its relative positions are products with
the queries, which no table of biases can be written as. LayerScale is folded, biases that a network
lacks are zeros (`models/plain_vit.py`).

B pictures, S pixels a side, P patches, D width.
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

LIBRARY = "detectron2"
FAMILIES = TIMM_FAMILIES
PREFIX = "backbone.net."
_OTHERWISE = f"take --format timm, or {MODULE}"
_LEFT = ("cls_token", "norm.", "fc_norm.", "head.")  # what ViTDet's backbone has not
# as the ViT of detectron2 calls its arguments
_SIZES = {
    "pretrain_img_size": "img_px",
    "patch_size": "patch_px",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
}


def _expected(given: Exported, images: Tensor) -> dict[str, Tensor]:
    """Return the tokens (B,P,D) of the run's own blocks for patches alone, before the final
    norm."""
    net: Any = given.net
    x = net.patch_embed(images) + net.pos_embed[:, 1:]
    for block in net.blocks:
        x = block(x)
    return {"tokens": x}


COMPARISON = Comparison(
    "timm's VisionTransformer by ViTDet's names (detectron2 itself was not run)",
    expected=_expected,
    tokens="tokens of the patches, without [CLS] and before the final norm,",
    logits=False,
)


def check(given: Exported) -> None:
    """Refuse what ViTDet's ViT has not."""
    plain(given)


def plain(given: Exported) -> PlainVit:
    """Return the network as the ViT that ViTDet is begun from."""
    return plain_vit(given.net, "detectron2's ViT", _OTHERWISE)


def write(given: Exported, folder: Path) -> None:
    """Write model.safetensors, and config.json with the arguments of detectron2's ViT, eps and
    pixels."""
    found = plain(given)
    mean, std = given.pixels
    config = {
        **{key: getattr(found, name) for key, name in _SIZES.items()},
        "mlp_ratio": found.mlp_width / found.width,
        "qkv_bias": True,
        "pretrain_use_cls_token": True,
        "layer_norm_eps": found.eps,
        # detectron2 normalises pixels of 0 to 255
        "pixel_mean": [255 * value for value in mean],
        "pixel_std": [255 * value for value in std],
        "input_format": "RGB",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state_dict(found), folder / "model.safetensors", metadata={"format": "pt"})


def state_dict(vit: PlainVit) -> dict[str, Tensor]:
    """Return the weights under ViTDet's names."""
    return {
        f"{PREFIX}{name}": value for name, value in vit.state.items() if not name.startswith(_LEFT)
    }


def reload(folder: Path, classes: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Load the weights strictly, by name, into timm's VisionTransformer without [CLS] and final
    norm; of the positions those of the patches."""
    config = json.loads((folder / "config.json").read_text())
    sizes = {key: config[key] for key in _SIZES if key != "pretrain_img_size"}
    net: Any = VisionTransformer(
        **sizes,
        img_size=config["pretrain_img_size"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=0,
        class_token=False,
        global_pool="",
        final_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
    )
    state = load_file(folder / "model.safetensors")
    if strange := [name for name in state if not name.startswith(PREFIX)]:
        raise ValueError(f"names without {PREFIX}: {strange[:3]}")
    own = {name.removeprefix(PREFIX): value for name, value in state.items()}
    net.load_state_dict({**own, "pos_embed": own["pos_embed"][:, 1:]})
    net = net.double().eval()
    return lambda images: {"tokens": net.forward_features(images)}


def usage(given: Exported) -> str:
    """Return Python that makes the checkpoint file that detectron2 reads, and what its config has
    to say."""
    found = plain(given)
    return (
        "import torch\nfrom safetensors.torch import load_file\n\n"
        'state = load_file("DIR/model.safetensors")  # names of ViTDet: backbone.net. ...\n'
        'torch.save({"model": state}, "vitdet.pth")  # read by DetectionCheckpointer\n\n'
        '# in the config of projects/ViTDet: train.init_checkpoint = "vitdet.pth"; model.backbone.'
        "net has\n"
        f"# embed_dim={found.width}, depth={found.depth}, num_heads={found.heads}, "
        f"patch_size={found.patch_px}, pretrain_img_size={found.img_px},\n"
        "# pretrain_use_cls_token=True and norm_layer=partial(nn.LayerNorm, "
        f"eps={found.eps:g}); model has pixel_mean,\n"
        "# pixel_std and input_format as config.json has them. Its feature pyramid, and relative\n"
        "# positions where use_rel_pos=True, begin at detectron2's own start values."
    )
