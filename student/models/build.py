"""An encoder is built from a run's settings, whatever its family."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from featcache.errors import UserError
from featcache.models.architecture import MAX_PX
from student.models import vit


class EncoderSettings(BaseModel):
    """Hold what a run's settings say of its encoder; they lie in a file that others may have
    written."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    encoder: Annotated[str, Field(max_length=1000)]
    img_size: Annotated[int, Field(gt=0, le=MAX_PX)]
    patch_size: Annotated[int, Field(gt=0, le=MAX_PX)]
    conv_cls: bool = False


def build_encoder(settings: dict[str, Any], family: str) -> nn.Module:
    """Build the encoder of a run's settings, at its start values."""
    from student.models import beit, conv_vit  # which most runs do without

    given = _read(settings)
    img_size, patch_size = given.img_size, given.patch_size
    if family == "mae":
        return vit.build(given.encoder, img_size=img_size, patch_size=patch_size)
    if family in (*beit.FAMILIES,):
        return beit.build(given.encoder, family, img_size=img_size, patch_size=patch_size)
    if family == conv_vit.FAMILY:
        return conv_vit.build(
            given.encoder, img_size=img_size, patch_size=patch_size, cls_token=given.conv_cls
        )
    known = ", ".join(("mae", *beit.FAMILIES, conv_vit.FAMILY))
    raise UserError(f"cannot build the run's encoder: family {str(family)[:80]!r}; known: {known}")


def _read(settings: dict[str, Any]) -> EncoderSettings:
    try:
        given = EncoderSettings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(
            f"cannot build the run's encoder: {key} is {repr(settings.get(key))[:80]} "
            f"({first['msg']}); the settings of a run are needed"
        ) from None
    if given.img_size % given.patch_size:
        raise UserError(
            f"cannot build the run's encoder: img_size={given.img_size} is no multiple of "
            f"patch_size={given.patch_size}"
        )
    return given
