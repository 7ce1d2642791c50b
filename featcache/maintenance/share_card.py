"""The card of a shared cache says what it is, whose weights made it, how large it is, and how it is
read, with this package or without."""

from __future__ import annotations

from typing import Any

from featcache import teachers
from featcache.catalog import recipe_needs, serves
from featcache.catalog.recipe_needs import RecipeNeeds
from featcache.errors import command_line, counted, one_line
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.storage.object_listing import CARD_START


def card(cache: Cache, address: str) -> str:
    """Write the card of a cache that lies at an address, as Markdown."""
    identity = cache.identity
    rows = [
        *(
            (f"teacher {i}", each)
            for i, each in enumerate(map(_teacher_of(cache), cache.teachers), 1)
        ),
        ("pictures", f"{len(cache)}, which are not here; keys are in each shard"),
        ("views", f"{cache.views} of each: {_words(identity['policy'])}"),
        ("levels", ", ".join(map(str, cache.levels))),
        (
            "tokens",
            identity["tokens"] + (f", the first {identity['keep']}" if "keep" in identity else ""),
        ),
        ("codec", identity["codec"]),
        ("bytes", f"{cache.bytes:,}"),
        ("format", f"{cache.manifest['format']}, {identity['store']} store"),
        ("id", cache.manifest["id"]),
    ]
    if manifest.is_random(cache.manifest):
        rows.insert(1, ("**warning**", "the weights were random: these features mean nothing"))
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows)
    head = _cell(f"{cache.teachers[0]}: targets of {counted(len(cache), 'picture')}")
    return f"""{CARD_START}# {head}

What a frozen teacher says of augmented views of pictures, for students to learn from.

| | |
|---|---|
{table}

## With featcache

    pip install 'featcache[remote]'
    {command_line("featcache", "pull", address)}
{_training(cache, address)}
## Without it

{_plain(cache, address)}
`manifest.json` names all arrays and shards; `shards/NAME.json` has the checksum of every file.
"""


def _training(cache: Cache, address: str) -> str:
    """Write the line that trains by the first recipe that the cache serves as it is; nothing where
    there is none."""
    known = recipe_needs.installed()
    served = [
        name
        for name, why in serves.recipe_support(cache).items()
        if not why and isinstance(needs := known[name], RecipeNeeds) and needs.fields
    ]
    recipe = "mralign" if "mralign" in served else next(iter(served), "")
    words = ("train", "--recipe", recipe, "--cache", address, "--images", "train/")
    return f"    {command_line('student', *words)}\n" if recipe else ""


def _plain(cache: Cache, address: str) -> str:
    shard = cache.shard_names[0] if cache.shard_names else "000000"
    if cache.identity["store"] == "zarr":
        return f"""Each shard is a Zarr group (version 3):

    import zarr
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    store = ObjectStore(from_url({address!r}), read_only=True)
    group = zarr.open_group(store, path="shards/{shard}.zarr", mode="r")
    group["features"]  # pictures x views x levels x tokens x channels
"""
    return f"""Each shard is a folder of tars, one a view, as webdataset reads them:

    import webdataset

    webdataset.WebDataset("v0.tar").decode()  # of {address}/shards/{shard}.webdataset
"""


def _teacher_of(cache: Cache) -> Any:
    def words(name: str) -> str:
        about = cache.manifest_of(name)
        known = teachers.model_cards().get(name.partition(":")[0].partition(",")[0])
        licence = (known.licence if known else "") or "unknown: ask who shared this"
        weights = about["provenance"]["weights"].rpartition("/")[2]
        return f"{name}, weights {weights}; licence of the weights: {licence}"

    return words


def _words(policy: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in policy.items())


def _cell(text: str) -> str:
    """Write a stranger's text so that it stays within its cell, and is no markup."""
    return "".join(f"\\{char}" if char in "|[]<>`*_\\" else char for char in one_line(text))
