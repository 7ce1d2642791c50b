"""The tests of the trainer share small pictures, a small cache, and both commands run in this
process.

The teacher is the synthetic one with 4 levels, 16 patches and width 24 on views of 32 pixels; the
student is a ViT of width 48 with 4 blocks, so that twenty steps take a third of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import featcache.cli
import student.cli
from featcache.extraction import target_folder
from featcache.reading.cache import Cache
from featcache.runtime import signals
from featcache.storage import checksums, manifest, zarr_store
from featcache.storage.store import Array, array_from_dict
from student.training import metrics

TEACHER = "synthetic:levels=4,tokens=16,width=24,size=32"
ENCODER = "vit_tiny_patch16_224,embed_dim=48,depth=4,num_heads=3"
PICTURES, VIEWS, SIZE = 24, 3, 32
DECODER = ("decoder_width=32", "decoder_depth=1", "decoder_heads=4")
COMMON = (f"encoder={ENCODER}", "warmup_epochs=0", "lr=0.003")
SMALL_BEIT = ("encoder=tiny,embed_dim=48,depth=4,num_heads=3", *COMMON[1:])
REGRESSOR = ("regressor_width=32", "regressor_depth=1", "regressor_heads=4")
RECIPES = {
    "maskalign": (*COMMON, "level_weights=top:3"),
    "mralign": (*COMMON, "level_weights=top:3", *DECODER),
    "mae": (*COMMON, *DECODER),
    "milan": (*COMMON, *DECODER, "target=f"),  # the synthetic teacher has no projection
    "kd": (*COMMON, "target=f"),
    "caev2": (*SMALL_BEIT, *REGRESSOR, "target=f"),
    "cae": (*SMALL_BEIT, *REGRESSOR, "decoder_depth=1", "token_field=token_ids", "vocabulary=16"),
    "fd": SMALL_BEIT,
    "mvp": (*SMALL_BEIT, "target=f"),
    "mrmae": (*COMMON, *DECODER),
}


@dataclass(frozen=True)
class Ran:
    """A command leaves its exit status and its two streams."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line of a user's mistake: the last one, after what was announced."""
        lines = self.err.splitlines()
        said = [line.startswith(("error: ", "stopped")) for line in lines]
        assert said == [False] * (len(lines) - 1) + [True], self.err
        assert "Traceback" not in self.err + self.out
        return lines[-1]


@functools.cache
def root() -> Path:
    """A folder for this process, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="student-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def save_pictures(folder: Path, count: int = PICTURES, seed: int = 0, classes: int = 0) -> Path:
    """`count` smooth colour PNGs of different sizes, in class folders when `classes` is given."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"c{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = draw.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        if classes:  # a colour of its own
            coarse[..., i % classes % 3] //= 4
        Image.fromarray(coarse).resize((44 + i % 5, 40 + i % 7), Image.Resampling.BICUBIC).save(
            place / f"p{i:02d}.png"
        )
    return folder


@functools.cache
def pictures() -> Path:
    return save_pictures(root() / "pictures")


@functools.cache
def cache_path() -> Path:
    """24 pictures x 3 views, levels 2 to 4; outside every home, so that no search finds it."""
    out = root() / "cache"
    extract(pictures(), out)
    return out


@functools.cache
def ranked_path() -> Path:
    """The same pictures, views and levels, with patches in mask order and the views' pixels
    stored."""
    return extract(pictures(), root() / "ranked", "--tokens", "ranked", "--pixels", "raw")


@functools.cache
def kept_path() -> Path:
    """The same again, of which only the first 5 of 16 patches are stored."""
    return extract(pictures(), root() / "kept", "--tokens", "ranked", "--keep", "5")


@functools.cache
def token_path() -> Path:
    """The same rows with one array more, `token_ids`: of each of 4 x 4 patches, two bits of red and
    two of green at its middle. Written through the store's own contract, as a tokenizer would."""
    out = root() / "tokens"
    with Cache(cache_path()) as cache:
        about = dict(cache.manifest)
        plain = [
            array_from_dict(name, facts)
            for name, facts in about["arrays"].items()
            if name not in checksums.NAMES
        ]
        rows, view = np.repeat(np.arange(len(cache)), VIEWS), np.tile(np.arange(VIEWS), len(cache))
        items = cache.read(rows, view, [spec.name for spec in plain])
        keys, tail = [cache.keys[row] for row in rows], next(iter(about["files"]))
    middle = np.array([1, 5, 8, 12])  # of the 14 x 14 thumbnail
    colours = items["thumbnail"][:, middle][:, :, middle].reshape(-1, 16, 3) // 64
    items["token_ids"] = (colours[..., 0] + 4 * colours[..., 1]).astype("<u2")
    arrays = [*plain, Array("token_ids", "<u2", (16,), ("row", "view", "patch"))]
    arrays += checksums.checksum_arrays(arrays, len(about["identity"]["levels"]), 17, ranked=False)
    out.mkdir()
    shutil.copy(cache_path() / tail, out / tail)
    about["arrays"] = {spec.name: spec.as_dict() for spec in arrays}
    target_folder.begin_folder(out, about, {})
    writer = zarr_store.writer(
        out, about["shards"][0]["name"], arrays, VIEWS, manifest.shard_form(about)
    )
    writer.append(keys, {**items, **checksums.compute_checksums(arrays, items)})
    writer.finish([], {})
    return out


def cache_of(recipe: str) -> Path:
    """A cache that serves the recipe's small settings."""
    return token_path() if recipe == "cae" else cache_path()


@functools.cache
def policy_file() -> Path:
    path = root() / "policy.json"
    path.write_text(json.dumps({"size": SIZE}))
    return path


def extract(
    images: Path, out: Path, *options: str, teacher: str = TEACHER, home: Path | None = None
) -> Path:
    args = (
        "--teacher",
        teacher,
        "--images",
        str(images),
        "--size",
        str(SIZE),
        "--views",
        str(VIEWS),
    )
    ran = feat("extract", *args, "--levels", "last:3", "--out", str(out), *options, home=home)
    assert ran.status == 0, ran.err
    return out


def feat(*args: str, home: Path | None = None) -> Ran:
    return _call("featcache", featcache.cli.main, args, home)


def stud(*args: Any, home: Path | None = None) -> Ran:
    fresh_state()
    return _call("student", student.cli.main, tuple(map(str, args)), home)


def fresh_state() -> None:
    """Accelerate keeps one state a process; a new command starts without one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(
    recipe: str,
    out: Path,
    *options: str | Path,
    home: Path | None = None,
    sets: tuple[str, ...] = (),
) -> Ran:
    """`student train` with the recipe's small settings."""
    settings = [part for text in (*RECIPES[recipe], *sets) for part in ("--set", text)]
    return stud(
        "train", "--recipe", recipe, "--out", out, "--device", "cpu", *settings, *options, home=home
    )


def good(ran: Ran) -> Ran:
    assert ran.status == 0, ran.err
    return ran


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final model, read from the newest checkpoint file by hand."""
    newest = max((run / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, map_location="cpu", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def open_cache() -> Cache:
    return Cache(cache_path())


def environment(home: Path | None = None) -> dict[str, str]:
    """This process's variables with the given home, no default pictures, one thread."""
    rest = {
        key: value
        for key, value in os.environ.items()
        if key not in ("FEATCACHE_IMAGES", "ACCELERATE_USE_CPU")
    }
    return {**rest, "FEATCACHE_HOME": str(home or root() / "home"), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def _as_command(name: str, args: tuple[str, ...], home: Path | None) -> Iterator[None]:
    before, argv, given = dict(os.environ), sys.argv, environment(home)
    handlers = {number: signal.getsignal(number) for number in signals.NOTICES}
    os.environ.clear()
    os.environ.update(given)
    sys.argv = [name, *args]
    try:
        yield
    finally:
        sys.argv = argv
        for number, handler in handlers.items():  # as a command leaves them that has stopped
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(before)


def _call(name: str, main: Callable[[], None], args: tuple[str, ...], home: Path | None) -> Ran:
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        _as_command(name, args, home),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Ran(status, out.getvalue(), err.getvalue())
