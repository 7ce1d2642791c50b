"""An encoder becomes a classifier that is fine-tuned whole: pool, norm, head, at any picture size.

    mean   tokens of the patches -> mean -> fc_norm -> head     (MAE's and BEiT's fine-tuning)
    cls    tokens -> norm -> [CLS] -> head

Plain ViTs and BEiTs are timm's own classifiers, so that what was fine-tuned loads into
`timm.create_model(..., num_classes=C, global_pool="avg")` by name; the convolutional one is
`ConvClassifier`. Each may be given tables of relative positions, one a block, as CAE's and Feature
Distillation's fine-tuning has them.

B pictures, T tokens, D width, C classes, S pixels a side.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.errors import UsageError
from student.models import conv_vit, vit
from student.models.build import EncoderSettings, build_encoder, read_settings

POOLS = ("mean", "cls")
_TABLE = "relative_position_bias_table"
_SHARED = f"rel_pos_bias.{_TABLE}"
_NORMS = ("norm.", "fc_norm.")
_OWN_HEADS = ("attn_pool.", "head.")  # of a teacher, which another head replaces


class ClassifierSettings(EncoderSettings):
    """Hold what a run's settings say of its classifier; they lie in a file that others may have
    written."""

    classes: Annotated[int, Field(ge=2, le=10**6)]
    pool: Literal["mean", "cls"]
    rel_pos: bool
    drop_path: Annotated[float, Field(ge=0, lt=1)]


class ConvClassifier(conv_vit.ConvViT):
    """Classify by ConvMAE's encoder; of both stages only what the third reads is used, as in its
    released fine-tuning (Alpha-VL/ConvMAE models_convvit.py)."""

    fc_norm: nn.Module
    head: nn.Module

    def reset_classifier(self, classes: int, global_pool: str) -> None:
        """Give it a head, as timm's networks have this method."""
        self.global_pool = global_pool
        self.head, self.fc_norm = nn.Linear(self.embed_dim, classes), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B,3,S,S) -> logits (B,C)."""
        return self.forward_head(self.forward_features(images))

    def forward_head(self, x: Tensor) -> Tensor:
        """Map tokens (B,T,D) -> logits (B,C), as timm's networks have this method."""
        patches = x[:, self.num_prefix_tokens :].mean(1)
        return self.head(self.fc_norm(patches if self.global_pool == "avg" else x[:, 0]))


def is_meant(settings: Mapping[str, Any]) -> bool:
    """Return whether settings are of a classifier; a recipe of the user's own may have classes,
    too."""
    return {"classes", "pool", "rel_pos"} <= settings.keys()


def build(settings: Mapping[str, Any], family: str) -> nn.Module:
    """Build the classifier of a run's settings at its start values; its head is timm's."""
    given = read_settings(ClassifierSettings, settings)
    kind = ConvClassifier if family == conv_vit.FAMILY else None
    net: Any = build_encoder(
        dict(settings), family, drop_path=given.drop_path, rel_pos=given.rel_pos, conv=kind
    )
    # tokens before the patches may be registers alone
    has_cls = getattr(net, "cls_token", None) is not None
    check_pool(given.pool, has_cls, settings["encoder"])
    net.reset_classifier(given.classes, "avg" if given.pool == "mean" else "token")
    # a network that was made to be pooled has its last norm behind the pool already
    norm = next((each for each in (net.norm, net.fc_norm) if not _is_none(each)), None)
    norm = vit.NORM(net.embed_dim) if norm is None else norm
    net.norm, net.fc_norm = norm, nn.Identity()
    if given.pool == "mean":
        net.norm, net.fc_norm = nn.Identity(), norm
    return net


def _is_none(part: nn.Module) -> bool:
    return isinstance(part, nn.Identity)


def check_pool(pool: str, has_cls: bool, encoder: str) -> None:
    """Raise UsageError for [CLS] of an encoder that has none."""
    if pool == "cls" and not has_cls:
        raise UsageError(
            f"pool=cls: the encoder {encoder} has no [CLS] token; allowed: pool=mean; change it "
            "with --set pool=mean"
        )


# --- start values ---------------------------------------------------------------------------------


@torch.no_grad()
def init_head(net: Any, std: float, scale: float) -> None:
    """Draw the head's weights from a normal of this std cut at two, times `scale`; its bias is 0.

    MAE has std 2e-5, MILAN timm's 0.02, BEiT and CAE 0.02 times 0.001.
    """
    nn.init.trunc_normal_(net.head.weight, std=std)
    net.head.weight.mul_(scale)
    nn.init.zeros_(net.head.bias)


@torch.no_grad()
def load_encoder(net: Any, encoder: Any, *, fc_norm_from_norm: bool) -> None:
    """Take the weights of a trained encoder: everything but the head.

    Positions and tables of an encoder that saw another picture size are resized first, by timm's
    own functions. A table that all blocks shared is copied to each (Feature Distillation
    main_finetune's rule); without one the tables keep their zeros. The last norm becomes `fc_norm`
    (CAE), or is dropped and `fc_norm` starts at one (MAE, BEiT).
    """
    with warnings.catch_warnings():
        # torch complains of how timm indexes tables, which nothing here can answer
        warnings.filterwarnings("ignore", category=UserWarning, module="timm")
        encoder.set_input_size(img_size=(picture_px(net),) * 2)
    own, given = net.state_dict(), encoder.state_dict()
    state = {name: given[name] for name in given if not name.startswith((*_NORMS, *_OWN_HEADS))}
    state = _tables_for(state, own) | _norm_for(given, net, fc_norm_from_norm)
    fresh = {name for name in own if name.startswith(("head.", *_NORMS)) or _TABLE in name}
    strange = (own.keys() - state.keys() - fresh) | (state.keys() - own.keys())
    assert not strange, sorted(strange)  # both were built of the same settings
    net.load_state_dict(state, strict=False)


def _tables_for(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with a shared table copied to every block, where the network has tables
    of its blocks."""
    shared = state.get(_SHARED)
    if shared is None or _SHARED in own:
        return dict(state)
    kept = {name: value for name, value in state.items() if name != _SHARED}
    return kept | {name: shared for name in own if name.endswith(f".attn.{_TABLE}")}


def _norm_for(given: Mapping[str, Tensor], net: Any, from_norm: bool) -> dict[str, Tensor]:
    """Return the last norm under the name that the network has for it; nothing where `fc_norm`
    starts anew, at one and zero."""
    last = {
        name.removeprefix("fc_"): value for name, value in given.items() if name.startswith(_NORMS)
    }
    if _is_none(net.fc_norm):
        return last
    if from_norm:
        return {f"fc_{name}": value for name, value in last.items()}
    for name, parameter in net.fc_norm.named_parameters():
        nn.init.constant_(parameter, float(name == "weight"))
    return {}


def picture_px(net: Any) -> int:
    """Return S, the pixels a side that a network takes."""
    if isinstance(net, conv_vit.ConvViT):
        return net.grid * net.patch_px
    return int(net.patch_embed.img_size[0])
