"""An encoder is built from a run's settings, whatever its family."""

from __future__ import annotations

from typing import Any

from torch import nn

from featcache.errors import UserError
from student.models import vit


def build_encoder(settings: dict[str, Any], family: str) -> nn.Module:
    """Build the encoder of a run's settings, at its start values."""
    from student.models import beit, conv_vit  # which most runs do without

    img_size, patch_size = settings["img_size"], settings["patch_size"]
    if family == "mae":
        return vit.build(settings["encoder"], img_size=img_size, patch_size=patch_size)
    if family in beit.FAMILIES:
        return beit.build(settings["encoder"], family, img_size=img_size, patch_size=patch_size)
    if family == conv_vit.FAMILY:
        cls_token = bool(settings.get("conv_cls"))
        return conv_vit.build(
            settings["encoder"], img_size=img_size, patch_size=patch_size, cls_token=cls_token
        )
    known = ", ".join(("mae", *beit.FAMILIES, conv_vit.FAMILY))
    raise UserError(f"cannot build the run's encoder: family {family!r}; known: {known}")
