"""Exports are read in the tests by code that is not the command's: each library, and for MAE and
ViTDet plain torch by names alone."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import finetuning as ft
from tests import student_fixtures as fx
from tests.teacher_reference import photographs

TEACHER = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3"
# run, and for each format the word that a refusal holds; empty: it is exported
_TABLES = {"mae": "relative positions", "vitdet": "relative positions"}
_ALL = dict.fromkeys(("timm", "hf", "mae", "vitdet", "onnx"), "")
_PLAIN = dict.fromkeys(("timm", "hf", "mae", "vitdet"), "")
TABLE: dict[str, dict[str, str]] = {
    "mae": _ALL,
    "mralign": _PLAIN,
    "cae": _ALL,
    "fd": {**_ALL, **_TABLES, "hf": "relative positions"},
    "conv": {**dict.fromkeys(("timm", "hf", "mae", "vitdet"), "'conv_vit'"), "onnx": ""},
    "conv cls": {"onnx": ""},
    "mae tuned": {**_ALL, "hf": "pool=mean"},
    "mae tuned cls": _PLAIN,
    "cae tuned": {**_ALL, **_TABLES, "hf": "relative positions"},
    "fd tuned": {**_ALL, **_TABLES, "hf": "relative positions"},
    "conv tuned": {"onnx": ""},
    "teacher tuned": _ALL,
}
GOOD = [(run, form) for run, row in TABLE.items() for form, why in row.items() if not why]
BAD = [(run, form, why) for run, row in TABLE.items() for form, why in row.items() if why]


@functools.cache
def run_of(name: str) -> Path:
    """A small run, or a fine-tuned one."""
    recipe, _, how = name.partition(" ")
    if how in ("", "cls"):
        return ft.pretrained(name)
    out = fx.root() / f"tuned-{name.replace(' ', '-')}"
    sets = ("pool=cls",) if how.endswith("cls") or recipe == "teacher" else ()
    if recipe != "teacher":
        fx.good(ft.finetune(recipe, out, sets=sets))
        return out
    settings = [part for text in (*ft.SETS, *sets) for part in ("--set", text)]
    pictures = ("--images", ft.train_pictures(), "--test", ft.test_pictures())
    weights = ("--teacher", TEACHER, "--weights", "random:0", "--device", "cpu")
    fx.good(fx.stud("eval", "finetune", *weights, *pictures, "--out", out, *ft.SMALL, *settings))
    return out


def export(run: Path, form: str, out: Path, *options: Any) -> fx.Ran:
    return fx.stud("export", run, "--format", form, "--out", out, *options)


def images(size: int) -> Tensor:
    """Three photographs (3,3,S,S) float32, normalised by ImageNet's mean and std."""
    return ((photographs(size).double() / 255 - _triple(MEAN)) / _triple(STD)).float()


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _triple(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def reference(net: Any, x: Tensor, form: str) -> Tensor:
    """Return what a format's tokens are in the run's own network."""
    if form != "vitdet":
        return net.forward_features(x)
    tokens = net.patch_embed(x) + net.pos_embed[:, 1:]
    for block in net.blocks:
        tokens = block(tokens)
    return tokens


def by_timm(folder: Path) -> Any:
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda x: (net.forward_features(x), net(x))


def by_transformers(folder: Path) -> Any:
    from transformers import AutoModel, AutoModelForImageClassification

    if "classifier.weight" in load_file(folder / "model.safetensors"):
        net = AutoModelForImageClassification.from_pretrained(folder).eval()
        return lambda x: (net.vit(x).last_hidden_state, net(x).logits)
    net = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return lambda x: (net(x).last_hidden_state, None)


def by_hand(folder: Path) -> Any:
    """MAE's ViT in plain torch from names alone, eps from config.json."""
    w = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    eps, heads, patch = about["layer_norm_eps"], about["num_heads"], about["patch_size"]

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(
            x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(x: Tensor, name: str) -> Tensor:
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + linear(nn.functional.gelu(hidden), f"{name}.mlp.fc2")

    def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
        conv = nn.functional.conv2d(
            x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch
        )
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), conv.flatten(2).transpose(1, 2)], 1)
        x = x + w["pos_embed"]
        for i in range(about["depth"]):
            x = block(x, f"blocks.{i}")
        if "fc_norm.weight" in w:
            return x, linear(norm(x[:, 1:].mean(1), "fc_norm"), "head")
        x = norm(x, "norm")
        return x, linear(x[:, 0], "head") if "head.weight" in w else None

    return run


class Attention(nn.Module):
    """detectron2's attention over a map (B,H,W,D), without its relative positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhid,bhjd->bhij", q / q.shape[-1] ** 0.5, k).softmax(-1)
        return self.proj(torch.einsum("bhij,bhjd->bihd", weights, v).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Detector(nn.Module):
    """A detector of detectron2 as far as its plain backbone goes: `backbone.net`."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        width, patch = about["embed_dim"], about["patch_size"]
        places = 1 + (about["pretrain_img_size"] // patch) ** 2
        self.backbone = nn.Module()
        self.backbone.net = net = nn.Module()
        net.pos_embed = nn.Parameter(torch.zeros(1, places, width))
        net.patch_embed = nn.Module()
        net.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        hidden, eps = int(width * about["mlp_ratio"]), about["layer_norm_eps"]
        net.blocks = nn.ModuleList(
            Block(width, about["num_heads"], hidden, eps) for _ in range(about["depth"])
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the last map (B,D,H,W)."""
        net: Any = self.backbone.net
        x = net.patch_embed.proj(images).permute(0, 2, 3, 1)
        x = x + net.pos_embed[:, 1:].unflatten(1, x.shape[1:3])
        for block in net.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def by_vitdet(folder: Path) -> Any:
    net = Detector(json.loads((folder / "config.json").read_text()))
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return lambda x: (net(x).flatten(2).transpose(1, 2), None)


def by_onnxruntime(folder: Path) -> Any:
    """Run on pixels of 0 to 1, the first picture alone and the rest together."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    about = json.loads((folder / "config.json").read_text())
    mean, std = (_triple(about[f"built_in_{name}"]) for name in ("mean", "std"))

    def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = (x.double() * std + mean).float()
        parts = [session.run(None, {"images": part.numpy()}) for part in (pixels[:1], pixels[1:])]
        found = [
            torch.cat([torch.from_numpy(y) for y in each]) for each in zip(*parts, strict=True)
        ]
        return found[0], found[1] if len(found) > 1 else None

    return run


READERS = {
    "timm": by_timm,
    "hf": by_transformers,
    "mae": by_hand,
    "vitdet": by_vitdet,
    "onnx": by_onnxruntime,
}
