"""An encoder is built from a run's settings, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from featcache.errors import UsageError, UserError
from featcache.models.architecture import MAX_PX
from featcache.runtime.field_words import field_reason
from student.models import vit

if TYPE_CHECKING:
    from student.models import conv_vit


class EncoderSettings(BaseModel):
    """Hold what a run's settings say of its encoder; they lie in a file that others may have
    written."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    encoder: Annotated[str, Field(max_length=1000)]
    img_size: Annotated[int, Field(gt=0, le=MAX_PX)]
    patch_size: Annotated[int, Field(gt=0, le=MAX_PX)]
    conv_cls: bool = False


def build_encoder(
    settings: Mapping[str, Any],
    family: str,
    *,
    drop_path: float = 0.0,
    rel_pos: bool = False,
    conv: type[conv_vit.ConvViT] | None = None,
) -> nn.Module:
    """Build the encoder of a run's settings, at its start values.

    `rel_pos` gives each block of a BEiT a table of relative positions of its own; `conv` is the
    class of a convolutional one.
    """
    # which most runs do without
    from student.models import beit, conv_vit, timm_network

    given = read_settings(EncoderSettings, settings)
    known = ("mae", *beit.FAMILIES, conv_vit.FAMILY, timm_network.FAMILY)
    if family not in known:
        raise UserError(
            f"cannot build the run's encoder: family {str(family)[:80]!r}; known: "
            f"{', '.join(known)}"
        )
    sizes: Any = {"img_size": given.img_size, "patch_size": given.patch_size}
    if rel_pos and family not in beit.FAMILIES:
        raise UsageError(
            f"rel_pos=true: encoders of family {str(family)[:80]!r} have no relative positions; "
            f"known: {', '.join(beit.FAMILIES)}; change it with --set rel_pos=false"
        )
    if family == "mae":
        return vit.build(given.encoder, drop_path=drop_path, **sizes)
    if family in beit.FAMILIES:
        return beit.build(given.encoder, family, drop_path=drop_path, rel_pos=rel_pos, **sizes)
    if family == conv_vit.FAMILY:
        return conv_vit.build(
            given.encoder,
            drop_path=drop_path,
            cls_token=given.conv_cls,
            network=conv,
            **sizes,
        )
    return timm_network.build(given.encoder, drop_path=drop_path, **sizes)


Kind = TypeVar("Kind", bound=EncoderSettings)


def read_settings(kind: type[Kind], settings: Mapping[str, Any]) -> Kind:
    """Read and check the settings of an encoder. Raises UserError for what cannot be meant."""
    try:
        given = kind.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(
            f"cannot build the run's encoder: {key} is {repr(settings.get(key))[:80]} "
            f"({field_reason(first)}); the settings of a run are needed"
        ) from None
    if given.img_size % given.patch_size:
        raise UserError(
            f"cannot build the run's encoder: img_size={given.img_size} is no multiple of "
            f"patch_size={given.patch_size}"
        )
    return given
