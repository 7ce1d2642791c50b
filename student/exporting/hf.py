"""hf: a folder that `transformers.ViTModel.from_pretrained(DIR)` loads, or
`ViTForImageClassification` where the run was fine-tuned on [CLS].

LayerScale is folded, biases that a network lacks are zeros (`models/plain_vit.py`). Names are those
of the hub's checkpoints, which transformers of all versions read. transformers' classifier has no
mean of patches; networks with relative positions or a head on that mean go to timm.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from featcache.errors import UserError
from student.features.comparison import Comparison
from student.features.exported import MODULE, TIMM_FAMILIES, Exported
from student.models.plain_vit import PlainVit, plain_vit

LIBRARY = "transformers"
FAMILIES = TIMM_FAMILIES
COMPARISON = Comparison("transformers")
_OTHERWISE = f"take --format timm, or {MODULE}"
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def check(given: Exported) -> None:
    """Refuse what transformers' ViT has not, and a missing transformers."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--format hf is read back by transformers; run `pip install transformers` (or `pip "
            "install 'featcache[hf]'`), or take --format timm"
        ) from error
    plain(given)


def plain(given: Exported) -> PlainVit:
    """Return the network as transformers' ViT."""
    found = plain_vit(given.net, "transformers' ViT", _OTHERWISE)
    if found.pool == "mean":
        raise UserError(
            "transformers' ViTForImageClassification cannot express a head on the mean of the "
            f"patches (pool=mean); {_OTHERWISE}"
        )
    return found


def write(given: Exported, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors."""
    found = plain(given)
    for name, value in (("config", _config(found)), ("preprocessor_config", _pixels(given))):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    save_file(state_dict(found), folder / "model.safetensors", metadata={"format": "pt"})


def _config(vit: PlainVit) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(vit.classes)}
    labels = {"id2label": names, "label2id": {text: int(i) for i, text in names.items()}}
    return {
        "architectures": ["ViTForImageClassification" if vit.classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.eps,
        "image_size": vit.img_px,
        "patch_size": vit.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
        "encoder_stride": vit.patch_px,
        **(labels if vit.classes else {}),
    }


def _pixels(given: Exported) -> dict[str, Any]:
    mean, std = given.pixels
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": given.img_size, "width": given.img_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def state_dict(vit: PlainVit) -> dict[str, Tensor]:
    """Return the weights under transformers' names; q, k and v apart."""
    state = {new: vit.state[old] for new, old in _TOP.items()}
    for i in range(vit.depth):
        here, there = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = vit.state[f"{there}.attn.qkv.{kind}"].chunk(3)
            for name, value in zip(("query", "key", "value"), parts, strict=True):
                state[f"{here}.attention.attention.{name}.{kind}"] = value.clone()
            for new, old in _BLOCK.items():
                state[f"{here}.{new}.{kind}"] = vit.state[f"{there}.{old}.{kind}"]
    if not vit.classes:
        return state
    head = {f"classifier.{kind}": vit.state[f"head.{kind}"] for kind in ("weight", "bias")}
    return {**{f"vit.{name}": value for name, value in state.items()}, **head}


def reload(folder: Path, classes: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Load the folder by transformers; a name too many or too few is an error."""
    from transformers import ViTForImageClassification, ViTModel

    kind: Any = ViTForImageClassification if classes else ViTModel
    extra = {} if classes else {"add_pooling_layer": False}
    with _no_bars():
        net, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **extra
        )
    wrong = [key for key in report if "keys" in key and report[key]]
    if wrong:
        raise ValueError(f"{wrong[0]}: {sorted(map(str, report[wrong[0]]))[:3]}")
    net = net.double().eval()

    def outputs(images: Tensor) -> dict[str, Tensor]:
        if not classes:
            return {"tokens": net(images).last_hidden_state}
        return {"tokens": net.vit(images).last_hidden_state, "logits": net(images).logits}

    return outputs


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def usage(given: Exported) -> str:
    """Return Python that loads the folder."""
    if given.classes:
        return (
            "from transformers import ViTForImageClassification\n\n"
            'model = ViTForImageClassification.from_pretrained("DIR")\n'
            "logits = model(images).logits  # (B, C)"
        )
    return (
        "from transformers import ViTModel\n\n"
        'model = ViTModel.from_pretrained("DIR", add_pooling_layer=False)\n'
        "tokens = model(images).last_hidden_state  # (B, 1 + P, D), after the final norm"
    )
