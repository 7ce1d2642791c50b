"""The arrays of a part are listed: what an extraction stores of each view."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.models.tokenizer import FIELD, LARGEST
from featcache.pictures.file_digest import DIGEST_BYTES
from featcache.storage.store import Array, hash_dtype
from featcache.targets.codecs import get_codec
from featcache.views.fingerprint import THUMBNAIL

FILE_DIGEST = Array("file_digest", "|u1", (DIGEST_BYTES,), ("row", "digest_byte"), per_view=False)


def view_arrays(format: int, *, file_digests: bool) -> list[Array]:
    """Return the arrays that every part of a format stores of the views themselves, and what the
    first one stores of files (`file_digests`)."""
    row_view = ("row", "view")
    return [
        Array("crop", "<i4", (4,), (*row_view, "top_left_height_width")),
        Array("flip", "|u1", (), row_view),
        Array("area", "<f4", (), row_view),
        Array("jitter", "<f4", (4,), (*row_view, "brightness_contrast_saturation_order")),
        Array("pixel_hash", hash_dtype(format), (), row_view),
        Array("thumbnail", "|u1", (THUMBNAIL, THUMBNAIL, 3), (*row_view, "y", "x", "rgb")),
        Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
        *([FILE_DIGEST] if file_digests else []),
    ]


def level_arrays(codec: str, width: int, levels: int, tokens: int) -> list[Array]:
    """Return the arrays of the tokens of levels: those of a codec, and their statistics."""
    coded = {
        **get_codec(codec).arrays(width),
        "feature_stats": ("<f4", (2,), ("mean_std",)),
    }
    dimensions = ("row", "view", "level", "token")
    return [
        Array(name, dtype, (levels, tokens, *item), (*dimensions, *names), split=True)
        for name, (dtype, item, names) in coded.items()
    ]


def token_ids_array(patches: int) -> Array:
    return Array(FIELD, "<u2", (patches,), ("row", "view", "patch"))


def checked_token_ids(ids: npt.NDArray[Any], vocabulary: int, name: str) -> npt.NDArray[np.uint16]:
    """Return ids (n, P) as they are stored; numbers outside the vocabulary are a UserError."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= min(vocabulary, LARGEST) or ids.dtype.kind not in "iu":
        raise UserError(
            f"tokenizer {name!r} gave {ids.dtype} from {low} to {high}; whole numbers from 0 to "
            f"{min(vocabulary, LARGEST) - 1} are needed: check the weights"
        )
    return ids.astype(np.uint16)
