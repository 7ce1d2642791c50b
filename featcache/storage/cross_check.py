"""The fields of a manifest are compared with one another: each may be of the right kind, and they
may still not be of one cache.

L levels, T tokens, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from featcache.errors import UserError, counted
from featcache.storage import checksums, picture_lists
from featcache.storage.store import Array, array_from_dict, hash_dtype
from featcache.targets import codec_names

_ROW_VIEW = ("row", "view")
_ITEM_BYTES = 1 << 31
# the dimensions of the arrays that the code knows by name; a codec may have others beside them
_DIMENSIONS = {
    "features": (*_ROW_VIEW, "level", "token"),
    "feature_stats": (*_ROW_VIEW, "level", "token", "mean_std"),
    "attention": (*_ROW_VIEW, "patch"),
    "mask_order": (*_ROW_VIEW, "rank"),
    "token_ids": (*_ROW_VIEW, "patch"),
    "crop": (*_ROW_VIEW, "top_left_height_width"),
    "flip": _ROW_VIEW,
    "area": _ROW_VIEW,
    "jitter": (*_ROW_VIEW, "brightness_contrast_saturation_order"),
    "pixel_hash": _ROW_VIEW,
    "thumbnail": (*_ROW_VIEW, "y", "x", "rgb"),
    "pixels": (*_ROW_VIEW, "y", "x", "rgb"),
    "source_size": ("row", "height_width"),
    "file_digest": ("row", "digest_byte"),
}
_DTYPES = {
    "feature_stats": ("<f4",),
    "attention": ("<f4",),
    "mask_order": ("|u1", "<u2"),
    "token_ids": ("<u2",),
    "crop": ("<i4",),
    "flip": ("|u1",),
    "area": ("<f4",),
    "jitter": ("<f4",),
    "pixel_hash": ("<u8", "<i8"),
    "thumbnail": ("|u1",),
    "pixels": ("|u1",),
    "source_size": ("<i4",),
    "file_digest": ("|u1",),
}
# a store's own arrays, by format
_RESERVED = {
    3: ("key", "key_offsets"),
    4: ("key", "key_bytes", "key_offsets", "level", "view"),
}
_MOST_FILES = 1 << 20  # of a shard
_FILE = ".safetensors"
# the fields of a measurement, which are there together
_MEASURED = (
    ("views", "cosine", "mse", "worst", "added_loss"),
    ("batch_mse", "batch_added_loss"),
    ("precision", "precision_mse", "precision_added_loss"),
)


def cross_problem(manifest: Mapping[str, Any]) -> str:
    """Say what does not fit together in a manifest whose fields are each of their kind; empty where
    all does."""
    identity = manifest["identity"]
    arrays = [array_from_dict(name, facts) for name, facts in manifest["arrays"].items()]
    return next(
        (
            problem
            for found in (
                _form_problems(manifest),
                _identity_problems(identity),
                _file_problems(manifest),
                _distortion_problems(manifest),
                _shard_problems(manifest["shards"], identity),
                _array_problems(arrays, manifest),
                _codec_problems(arrays, identity),
                _checksum_problems(arrays, identity),
            )
            for problem in found
        ),
        "",
    )


def _form_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """A hash is signed or not by the format; Zarr alone knows compressed rows."""
    dtype = hash_dtype(manifest["format"])
    if manifest["arrays"].get("pixel_hash", {"dtype": dtype})["dtype"] != dtype:
        yield f"arrays.pixel_hash is not {dtype}, as in format {manifest['format']}"
    if "compression" in manifest and manifest["identity"]["store"] != "zarr":
        yield f"a cache in the {manifest['identity']['store']} store is not compressed"


def _identity_problems(identity: Mapping[str, Any]) -> Iterator[str]:
    teacher, levels = identity["teacher"], identity["levels"]
    if sorted(set(levels)) != levels or levels[-1] > teacher["depth"]:
        yield f"identity.levels are not ascending blocks of {teacher['depth']}"
    if "keep" in identity and (
        identity["keep"] > teacher["patches"] or identity["tokens"] != "ranked"
    ):
        yield (
            f"identity.keep is {identity['keep']} of "
            f"{counted(teacher['patches'], 'patch', 'patches')}"
        )
    for name in ("scale", "ratio"):
        if identity["policy"][name][0] > identity["policy"][name][1]:
            yield f"identity.policy.{name} has its larger end first"
    if not isinstance(identity["pixel_path"].get("decoder"), str):
        yield "identity.pixel_path.decoder is missing"


def _file_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The end of a teacher is NAME.safetensors, the state of its codec NAME.CODEC.safetensors."""
    codec, names = manifest["identity"]["codec"], sorted(manifest["files"], key=len)
    if codec not in codec_names.NAMES:
        return
    if len(names) > (1 if codec == codec_names.LOSSLESS else 2):
        yield f"files are {len(names)}, codec {codec} has fewer"
    elif len(names) == 2 and names[1] != f"{names[0].removesuffix(_FILE)}.{codec}{_FILE}":
        yield f"files: {names[1]} is no state of codec {codec} beside {names[0]}"


def _distortion_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What was measured is there as a whole; numbers of levels are one for each."""
    levels = len(manifest["identity"]["levels"])
    facts = manifest["provenance"].get("distortion", {})
    for group in _MEASURED:
        lacking = [name for name in group if name not in facts]
        if 0 < len(lacking) < len(group):
            yield f"provenance.distortion.{lacking[0]} is missing"
    for name, values in facts.items():
        if isinstance(values, list) and len(values) != levels:
            yield (
                f"provenance.distortion.{name} has {len(values)} numbers for "
                f"{counted(levels, 'level')}"
            )


def _shard_problems(shards: list[dict[str, Any]], identity: Mapping[str, Any]) -> Iterator[str]:
    rows = identity["rows_per_shard"]
    for shard in shards:
        if shard["count"] > rows:
            yield (
                f"shard {shard['name']} has {counted(shard['count'], 'picture')} of at most {rows}"
            )
    for here, there in pairwise(shards):
        if here["name"] >= there["name"] or here["first"] + here["count"] != there["first"]:
            yield f"shard {there['name']} does not begin where {here['name']} ends"
    if (count := picture_lists.count(identity)) > sum(shard["count"] for shard in shards):
        yield f"identity.pictures.count is {count}, its shards have fewer"
    if picture_lists.APPENDED in identity and not picture_lists.is_computed(shards, identity):
        yield "identity.appended: its shards are not those of its lists of pictures"


def _array_problems(arrays: list[Array], manifest: Mapping[str, Any]) -> Iterator[str]:
    identity, reserved = manifest["identity"], _RESERVED[manifest["format"]]
    sizes = _sizes(identity)
    if identity["views"] * sum(spec.split for spec in arrays) > _MOST_FILES:
        yield (
            f"arrays: {counted(identity['views'], 'view')} of so many are more files "
            "than a shard has"
        )
    for spec in arrays:
        own = ("row", "view") if spec.per_view else ("row",)
        if spec.name in reserved or spec.dimensions[: len(own)] != own:
            yield f"arrays.{spec.name} is no array of rows"
        elif len(spec.dimensions) != len(own) + len(spec.item) or spec.split > spec.per_view:
            yield f"arrays.{spec.name} has {len(spec.dimensions)} dimensions, its item others"
        elif math.prod(spec.item) * np.dtype(spec.dtype).itemsize > _ITEM_BYTES:
            yield f"arrays.{spec.name} has items of more than {_ITEM_BYTES} bytes"
        elif not _is_as_known(spec):
            yield f"arrays.{spec.name} is not as this version knows it"
        else:
            named = zip(spec.dimensions[len(own) :], spec.item, strict=True)
            for dimension, size in named:
                wanted = sizes.get(f"{spec.name}.{dimension}", sizes.get(dimension, size))
                if size != wanted:
                    yield f"arrays.{spec.name} has {size} of {dimension}, the identity {wanted}"


def _codec_problems(arrays: list[Array], identity: Mapping[str, Any]) -> Iterator[str]:
    """Levels are stored as their codec writes them: its loops go by the width of a token."""
    forms, width = codec_names.ARRAYS.get(identity["codec"]), identity["teacher"]["width"]
    stored = {spec.name: spec for spec in arrays}
    if forms is None or "features" not in stored:
        return
    try:
        wanted = forms(width)
    except UserError as error:
        yield f"identity.codec: {error}"
        return
    for name, (dtype, item, _) in wanted.items():
        spec = stored.get(name)
        if spec is None or (spec.dtype, spec.item[2:]) != (dtype, item):
            given = f"{spec.dtype} {list(spec.item[2:])}" if spec else "missing"
            yield f"arrays.{name} is {given}, codec {identity['codec']} has {dtype} {list(item)}"


def _is_as_known(spec: Array) -> bool:
    dimensions = _DIMENSIONS.get(spec.name, spec.dimensions)
    return (
        spec.dimensions[: len(dimensions)] == dimensions
        and (spec.name == "features" or len(spec.dimensions) == len(dimensions))
        and spec.dtype in _DTYPES.get(spec.name, (spec.dtype,))
    )


def _sizes(identity: Mapping[str, Any]) -> dict[str, int]:
    """Return the size that the identity gives a dimension, under its name or ARRAY.NAME."""
    teacher, px = identity["teacher"], identity["policy"]["size"]
    tokens = _tokens(identity)
    return {
        "level": len(identity["levels"]),
        "token": tokens,
        "channel": teacher["width"],
        "patch": teacher["patches"],
        "rank": teacher["patches"],
        "mean_std": 2,
        "top_left_height_width": 4,
        "brightness_contrast_saturation_order": 4,
        "height_width": 2,
        "digest_byte": 16,
        "rgb": 3,
        "pixels.y": px,
        "pixels.x": px,
        "thumbnail.y": 14,
        "thumbnail.x": 14,
    }


def _tokens(identity: Mapping[str, Any]) -> int:
    patches: int = identity["teacher"]["patches"]
    return 1 + int(identity.get("keep", patches))


def _checksum_problems(arrays: list[Array], identity: Mapping[str, Any]) -> Iterator[str]:
    plain = [spec for spec in arrays if spec.name not in checksums.NAMES]
    wanted = checksums.checksum_arrays(
        plain, len(identity["levels"]), _tokens(identity), ranked=identity["tokens"] == "ranked"
    )
    if {spec.name: spec for spec in arrays if spec not in plain} != {
        spec.name: spec for spec in wanted
    }:
        yield f"arrays: the checksums {', '.join(checksums.NAMES)} are not those of the others"
