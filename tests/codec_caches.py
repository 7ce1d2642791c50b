"""Caches in the codecs of `featcache.targets.codecs`, made once for each folder of pictures, and
what numpy alone says of their state and their features.

The synthetic teacher has a width of 64, the smallest that a rotation takes, and 5 levels of 16
patches; another one 3 levels of 4 patches and a width of 128.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from safetensors.numpy import load_file

from featcache import Cache
from featcache.extraction import extend, extract
from featcache.extraction.plan import Plan
from featcache.storage import json_file, manifest
from tests.conftest import make_plan

WIDE = "synthetic:levels=5,tokens=16,width=64,size=28"  # L 5, P 16, D 64
OTHER = "synthetic:levels=3,tokens=4,width=128,size=28"  # L 3, P 4, D 128
VIT = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=64,depth=2,num_heads=2"
LOSSY = ("q8", "t4", "t3")
LAYOUTS: dict[str, dict[str, Any]] = {
    "raster": {},
    "ranked": {"tokens": "ranked"},
    "kept": {"tokens": "ranked", "keep": 5},
}
# of normal numbers a token loses 0.006, 0.075 and 0.145 of its length without the mean, on average
ERRORS = {"q8": 0.013, "t4": 0.15, "t3": 0.29}


def plan(folder: Path, teacher: str = WIDE, **changes: Any) -> Plan:
    """Three views, levels 2 and 5, shards of five, unless changed."""
    depths = {WIDE: (2, 5), OTHER: (3,), VIT: (1, 2)}
    weights = "random:0" if teacher == VIT else None
    return make_plan(folder, teacher, weights, **{"levels": depths[teacher], **changes})


def extracted(folder: Path, out: Path, teacher: str = WIDE, **changes: Any) -> Path:
    extract.run(plan(folder, teacher, **changes), out, batch_size=4)
    return out


@functools.cache
def _made(folder: Path, changes: str) -> Path:
    options = json.loads(changes)
    if "levels" in options:
        options["levels"] = tuple(options["levels"])
    count = len(list((folder.parent).glob("made-*")))
    return extracted(folder, folder.parent / f"made-{count}", **options)


def made(folder: Path, **changes: Any) -> Path:
    """A cache of these pictures, made once; not to be written into."""
    return _made(folder, json.dumps(changes, sort_keys=True))


def add(folder: Path, out: Path, teacher: str = WIDE, **changes: Any) -> Path:
    """Add what `out` lacks of a plan; returns the part."""
    part = extend.plan_part(plan(folder, teacher, **changes), out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return part.out


def state_path(part: Path) -> Path:
    codec = manifest.read(part)["identity"]["codec"]
    (path,) = part.glob(f"*.{codec}.safetensors")
    return path


def state(part: Path) -> dict[str, np.ndarray]:
    return load_file(state_path(part))


def by_zarr(cache: Path, name: str) -> np.ndarray:
    """(n, V, ...) of one array of a cache's own shards, read by zarr-python."""
    shards = sorted((cache / "shards").glob("*.zarr"))
    return np.concatenate([zarr.open_group(shard, mode="r")[name][...] for shard in shards])


def mean_of(fp16: Path, views: int = 256) -> np.ndarray:
    """(L, D) float32: of the first views of an fp16 cache, in (row, view) order, in float64. A sum
    of so few half-precision numbers of at most 8 is exact there, in whatever order."""
    values = by_zarr(fp16, "features")
    values = values.reshape(-1, *values.shape[2:])[:views].astype(np.float64)
    return (values.sum((0, 2)) / (len(values) * values.shape[2])).astype(np.float32)


def levels_of(cache: Path, level: int, view: int, **options: Any) -> np.ndarray:
    """(n, T, D): one level, decoded."""
    with Cache(cache) as opened:
        return opened.derive("h", view=view, level=level, **options)


def assert_near(got: np.ndarray, exact: np.ndarray, codec: str, mean: np.ndarray) -> None:
    """Each token is as near to the exact one as its codec promises, and not the same."""
    exact = exact.astype(np.float64)
    assert got.shape == exact.shape
    lost = np.linalg.norm(got - exact, axis=-1)
    size = np.linalg.norm(exact - mean, axis=-1)
    assert (lost <= ERRORS[codec] * size + 1e-5).all(), (lost / size).max()
    assert lost.max() > 0.001 * size.max()


def rewrite_manifest(part: Path, about: dict[str, Any]) -> None:
    """Write a manifest and its copy, with a checksum of their own."""
    for path in (part / "manifest.json", part / "shards/manifest.copy.json"):
        json_file.write_json(path, about)


def correct_state(part: Path) -> None:
    """Let the manifest say of the state's file what it is now, and the copy be the same."""
    path, about = state_path(part), manifest.read(part)
    about["files"] |= manifest.file_facts({path.name: path.read_bytes()})
    (part / "shards/state.copy.safetensors").write_bytes(path.read_bytes())
    rewrite_manifest(part, about)
