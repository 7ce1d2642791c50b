"""Zarr's metadata of a shard is made by zarr-python, and joined into one document for each group.

A shard is a group. Beside its arrays of rows it has coordinates, from format 4 on: `level` and
`view` (their numbers) and `key` (strings), so that xarray labels what it opens. The cache and its
`shards/` are groups too, with attributes that say what the numbers are.

n rows, V views.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featcache.storage import chunk_index, compression
from featcache.storage.store import SHARDS, Array, ShardForm

DOCUMENT = "zarr.json"
SHARDED = 4  # the first format with the sharding codec, and with what is here for other libraries


def shard_metadata(
    arrays: Sequence[Array], views: int, form: ShardForm, rows: int, lengths: Mapping[str, int]
) -> dict[str, bytes]:
    """Return the document of the group and of each of its arrays, by their paths. `lengths`: rows
    of the arrays that have other than n; arrays without rows have no chunk."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    # in memory: zarr would make a folder again that was moved away meanwhile
    made: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(made), zarr_format=3)
    for array in arrays:
        count = lengths.get(array.name, rows)
        per_view = [views] if array.per_view else []
        group.create_array(
            array.name,
            shape=(count, *per_view, *array.item),
            dtype=array.dtype,
            filters=None,
            fill_value=float("nan") if np.dtype(array.dtype).kind == "f" else 0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=array.dimensions,
            config={"write_empty_chunks": True},
            **_chunks(array, form, count, views),
        )
    if form.format >= SHARDED:
        group.create_array(
            "key",
            shape=(rows,),
            chunks=(max(rows, 1),),
            dtype="string",
            filters=None,
            compressors=[Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("row",),
        )
    names = [array.name for array in arrays] + ["key"] * (form.format >= SHARDED)
    documents = {f"{name}/{DOCUMENT}": made[f"{name}/{DOCUMENT}"].to_bytes() for name in names}
    if form.format < SHARDED:
        return {DOCUMENT: made[DOCUMENT].to_bytes(), **documents}
    inner = {name: json.loads(documents[f"{name}/{DOCUMENT}"]) for name in sorted(names)}
    # xarray takes what `coordinates` names for a label, not for data
    attributes = {**form.attributes, "coordinates": "key"}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": inner}
    return {DOCUMENT: _group(attributes, consolidated_metadata=consolidated), **documents}


def _chunks(array: Array, form: ShardForm, count: int, views: int) -> dict[str, Any]:
    """Return how an array lies in files: one chunk and Zarr's crc32c, or for split ones from format
    4 on a file for each view, of chunks with an index."""
    from zarr.codecs import Crc32cCodec

    edges = max(count, 1), *([1 if array.split else views] if array.per_view else [])
    item = tuple(max(edge, 1) for edge in array.item)
    if not is_chunked(array, form):
        return {"chunks": (*edges, *item), "compressors": [Crc32cCodec()]}
    inner = tuple(max(edge, 1) for edge in chunk_index.chunk_item(array))
    codecs = (
        [compression.zarr_codec(form.compression, np.dtype(array.dtype).itemsize)]
        if form.compression
        else None
    )
    return {"shards": (*edges, *item), "chunks": (1, 1, *inner), "compressors": codecs}


def is_chunked(array: Array, form: ShardForm) -> bool:
    """Tell whether an array's files are chunks with an index; those of an archive always are."""
    return array.split and (form.format >= SHARDED or form.compression != "")


def coordinate_arrays(arrays: Sequence[Array], form: ShardForm) -> list[Array]:
    """Return the arrays of numbers along dimensions that an array of the shard has."""
    if form.format < SHARDED:
        return []
    held = {dimension for array in arrays for dimension in array.dimensions}
    return [
        Array(name, "<i8", (), (name,), per_view=False)
        for name in sorted(form.coordinates.keys() & held)
    ]


def root_files(form: ShardForm) -> dict[str, bytes]:
    """Return the documents of the groups above the shards. Written by us: the same manifest gives
    the same bytes, whatever version of Zarr is there."""
    if form.format < SHARDED:
        return {}
    document = _group({**form.attributes, "created_by": form.created_by})
    return {DOCUMENT: document, f"{SHARDS}/{DOCUMENT}": document}


def _group(attributes: Mapping[str, Any], **more: Any) -> bytes:
    about = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes), **more}
    return json.dumps(about, indent=2, sort_keys=True).encode()
