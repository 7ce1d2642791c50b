"""The extraction: the same bytes whatever the workers, the batch or the moment it was killed;
numbers by a second way; what is refused; pictures that cannot be used.

The whole folder is compared, so anything that depends on time, order or chance anywhere is found.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import crc32c
import numpy as np
import pytest
import timm
import torch
import zarr
from PIL import Image

import featcache
from featcache import teachers
from featcache.errors import UserError
from featcache.extraction import extract, plan
from featcache.extraction.progress import ExtractProgress
from featcache.pictures.open_source import open_source
from featcache.storage import commit, json_file, manifest
from featcache.storage.store import STORES
from featcache.teachers.synthetic import Synthetic
from featcache.views.policy import Policy
from tests.conftest import copy_tree, files_below, flip, make_plan, undisturbed

NINE = "synthetic:levels=3,tokens=9,width=8,size=28"
VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


# ---------------------------------------------------------------- the same bytes


def noted_batch_size(files: dict[str, bytes], size: int) -> dict[str, bytes]:
    """The files of a cache as they would be had the manifest noted another batch size."""
    about = json.loads(files["manifest.json"])
    del about[json_file.CHECKSUM]
    about["provenance"]["batch_size"] = size
    text = (
        json.dumps({**about, json_file.CHECKSUM: json_file.digest(about)}, sort_keys=True, indent=1)
        + "\n"
    )
    return {**files, "manifest.json": text.encode(), "shards/manifest.copy.json": text.encode()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "batch_size"), [(1, 4), (3, 4), (1, 7), (3, 7), (2, 1), (2, 64)]
)
def test_workers_and_batch_size_change_no_byte(
    pictures: Path, tmp_path: Path, workers: int, batch_size: int
) -> None:
    """But for the note of the batch size itself."""
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=batch_size, workers=workers)
    assert files_below(tmp_path / "c") == noted_batch_size(undisturbed(pictures), batch_size)


def test_a_view_does_not_depend_on_how_many_there_are(pictures: Path, tmp_path: Path) -> None:
    extract.run(make_plan(pictures, views=1, rows_per_shard=100), tmp_path / "one", batch_size=4)
    undisturbed(pictures)
    with (
        featcache.open(tmp_path / "one") as one,
        featcache.open(pictures.parent / "undisturbed") as three,
    ):
        assert list(one.keys) == list(three.keys)
        for name in one.fields:
            a, b = (cache.read(range(len(one)), 0, [name])[name] for cache in (one, three))
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_running_again_does_nothing(pictures: Path, tmp_path: Path) -> None:
    undisturbed(pictures)
    out = Path(shutil.copytree(pictures.parent / "undisturbed", tmp_path / "c"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*/c.*")}
    progress = ExtractProgress()
    extract.run(make_plan(pictures), out, batch_size=4, progress=progress)
    assert (progress.total, progress.pictures) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*/c.*")} == times
    assert files_below(out) == undisturbed(pictures)


def test_lost_shards_are_made_again_and_only_they(pictures: Path, tmp_path: Path) -> None:
    undisturbed(pictures)
    out = Path(shutil.copytree(pictures.parent / "undisturbed", tmp_path / "c"))
    shutil.rmtree(out / "shards/000001.zarr")
    (out / "shards/000001.json").unlink()
    progress = ExtractProgress()
    extract.run(make_plan(pictures), out, batch_size=4, progress=progress)
    assert (progress.total, progress.pictures) == (5, 5)
    assert files_below(out) == undisturbed(pictures)


def test_an_interrupted_run_keeps_complete_shards_and_leaves_no_litter(
    pictures: Path, tmp_path: Path
) -> None:
    made = make_plan(pictures)

    def stop(progress: ExtractProgress) -> None:
        if progress.pictures >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract.run(made, tmp_path / "c", batch_size=4, progress=ExtractProgress(stop))
    left = files_below(tmp_path / "c")
    assert "shards/000000.json" in left
    assert not [name for name in left if "tmp" in name or "lease" in name]
    assert all(undisturbed(pictures)[name] == data for name, data in left.items())
    extract.run(made, tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


# ---------------------------------------------------------------- the numbers, by a second way


@functools.cache
def vit_cache(folder: Path) -> Path:
    made = make_plan(
        folder, VIT, "random:0", policy=Policy(size=40, seed=3), levels=(2, 3), views=2
    )
    out = folder.parent / "vit-of-extract"
    extract.run(made, out, batch_size=4)
    return out


def independent(picture: Path, crop: np.ndarray, flip: int) -> tuple[np.ndarray, np.ndarray]:
    """y_2 and y_3 (2, T, D) and the last block's [CLS] attention (P,), float64, from a picture and
    a stored box, with nothing of ours: PIL, timm and hooks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=3,
            num_classes=0,
        )
    vit = vit.double().eval()
    top, left, height, width = (int(n) for n in crop)
    view = Image.open(picture).convert("RGB").crop((left, top, left + width, top + height))
    view = view.resize((32, 32), Image.Resampling.BICUBIC)
    if flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x = (np.asarray(view).astype(np.float64) / 255 - 0.5) / 0.5  # this timm model's statistics
    seen: dict[str, torch.Tensor] = {}
    for k in (1, 2):
        vit.blocks[k].register_forward_hook(lambda _, __, y, k=k: seen.__setitem__(f"y{k}", y))
    vit.blocks[2].attn.qkv.register_forward_hook(lambda _, __, y: seen.__setitem__("qkv", y))
    with torch.no_grad():
        vit.forward_features(torch.from_numpy(x).permute(2, 0, 1)[None])
    q, k, _ = seen["qkv"][0].reshape(17, 3, 3, 8).permute(1, 2, 0, 3).numpy()  # (H, T, d) each
    logits = np.einsum("hd,htd->ht", q[:, 0], k) / 8**0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attention = (weights / weights.sum(-1, keepdims=True)).mean(0)[1:]
    return torch.cat([seen["y1"], seen["y2"]]).numpy(), attention


def test_features_equal_an_independent_recomputation(photos: Path) -> None:
    """The store opened with plain zarr, the crop replayed by hand, timm run directly."""
    out = vit_cache(photos)
    checked = 0
    for shard in sorted((out / "shards").glob("*.zarr")):
        group = zarr.open_group(shard, mode="r")
        stored = {
            name: group[name][:]
            for name in ("features", "feature_stats", "attention", "crop", "flip")
        }
        for row, key in enumerate(group["key"][:].tolist()):
            # plain PIL clips 16 bits; tests/featcache/pictures/test_open_source.py has the formula
            if key == "grey16":
                continue
            path = next(photos.glob(f"{key}.*"))
            for view in range(2):
                ys, attention = independent(
                    path, stored["crop"][row, view], stored["flip"][row, view]
                )
                mean, std = ys.mean(-1, keepdims=True), np.sqrt(ys.var(-1, keepdims=True) + 1e-5)
                h = (ys - mean) / std
                got = stored["features"][row, view].astype(np.float64)
                relative = np.linalg.norm(got - h, axis=-1) / np.linalg.norm(h, axis=-1)
                assert relative.max() < 1e-3, (key, view)
                stats = np.concatenate([mean, std], -1)
                np.testing.assert_allclose(
                    stored["feature_stats"][row, view], stats, rtol=1e-4, atol=1e-5
                )
                difference = np.abs(stored["attention"][row, view] - attention).max()
                assert difference / attention.max() < 1e-5, (key, view)
                checked += 1
    assert checked == 20


def test_stored_orders_and_checksums_derive_from_what_is_stored(photos: Path) -> None:
    from featcache import rng
    from featcache.targets.attention import mask_order

    crcs = [
        zarr.open_group(path, mode="r")["row_crc"][:]
        for path in sorted(vit_cache(photos).glob("shards/*.zarr"))
    ]
    with featcache.open(vit_cache(photos)) as cache:
        rows = range(len(cache))
        for view in range(2):
            got = cache.read(rows, view, ("features", "feature_stats", "attention", "mask_order"))
            order = mask_order("attentive", got["attention"], rng.key_digests(cache.keys), view, 3)
            np.testing.assert_array_equal(got["mask_order"], order)
            sums = [[crc32c.crc32c(level.tobytes()) for level in row] for row in got["features"]]
            assert np.concatenate(crcs)[:, view].tolist() == sums
            assert ((got["attention"].sum(1) > 0) & (got["attention"].sum(1) < 1)).all()
            h = got["features"].astype(np.float64)
            assert np.abs(h.mean(-1)).max() < 1e-3
            # the divisor holds eps, so var is a little below 1
            std = got["feature_stats"][..., 1].astype(np.float64)
            np.testing.assert_allclose(h.var(-1), 1 - 1e-5 / std**2, atol=2e-3)


def test_a_real_network_agrees_across_batch_sizes(photos: Path, tmp_path: Path) -> None:
    made = make_plan(
        photos, VIT, "random:0", policy=Policy(size=40, seed=3), levels=(2, 3), views=2
    )
    extract.run(made, tmp_path / "c", batch_size=7, workers=1)
    with featcache.open(tmp_path / "c") as a, featcache.open(vit_cache(photos)) as b:
        for view in range(2):
            x, y = (c.read(range(11), view)["features"].astype(np.float64) for c in (a, b))
            assert (np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)).max() < 1e-3


def test_the_tail_turns_h_into_the_networks_output(photos: Path) -> None:
    with featcache.open(vit_cache(photos)) as cache:
        tail = cache.tail()
        vit = teachers.load(VIT, "random:0").vit
        np.testing.assert_array_equal(tail["gamma"], vit.norm.weight.numpy())
        np.testing.assert_array_equal(tail["beta"], vit.norm.bias.numpy())
        assert tail["eps"] == np.float32(1e-6)


class Broken(Synthetic):
    """Level 3 of the seventh view that it sees is not finite."""

    def __init__(self, value: float) -> None:
        super().__init__(3, 4, 8, 28)
        self.value, self.seen, self.name = value, 0, "broken"

    def forward(
        self, batch: torch.Tensor, levels: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        ys, attention = super().forward(batch, levels)
        if self.seen <= 6 < self.seen + len(batch):
            ys[levels.index(3)][6 - self.seen, 0, 5] = self.value
        self.seen += len(batch)
        return ys, attention


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_that_is_not_finite_is_told_by_key_view_and_level(
    photos: Path, tmp_path: Path, value: float
) -> None:
    """Views 0, 1 of picture 0, ...: the seventh is picture 3's first."""
    source = open_source(photos)
    made = plan.Plan(
        source=source,
        teacher=Broken(value),
        policy=Policy(size=28),
        views=2,
        levels=(1, 3),
        rows_per_shard=5,
    )
    with pytest.raises(UserError) as caught:
        extract.run(made, tmp_path / "c", batch_size=4)
    for part in ("non-finite", repr(source.keys[3]), "view 0", "level 3"):
        assert part in str(caught.value)
    assert [name for name in sorted(files_below(tmp_path / "c")) if "shards/" in name] == [
        "shards/manifest.copy.json",
        "shards/zarr.json",
    ]


def test_progress_counts_and_names_the_slowest_stage(pictures: Path, tmp_path: Path) -> None:
    seen = []
    progress = ExtractProgress(lambda p: seen.append((p.pictures, p.total, p.slowest)))
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4, progress=progress)
    assert progress.pictures == progress.total == 13
    assert [count for count, _, _ in seen] == sorted(count for count, _, _ in seen)
    assert {total for _, total, _ in seen} == {13}
    assert list(progress.busy) == ["decode", "copy", "teacher", "encode", "write"]
    assert all(seconds > 0 for seconds in progress.busy.values())
    assert progress.rate > 0
    progress.busy.update(decode=4.0, copy=1.0, teacher=3.0, encode=0.0, write=0.0)
    progress.workers = 2
    assert progress.slowest == "teacher"  # two threads share the four seconds


def test_tars_and_folders_of_the_same_pictures_agree(photos: Path, tmp_path: Path) -> None:
    """The key, not the container, decides: only provenance may differ."""
    import tarfile

    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    extract.run(make_plan(tmp_path / "p.tar"), tmp_path / "tar", batch_size=4)
    extract.run(make_plan(photos), tmp_path / "folder", batch_size=4)
    a, b = files_below(tmp_path / "tar"), files_below(tmp_path / "folder")
    assert a.keys() == b.keys()
    assert {n for n in a if a[n] != b[n]} == {"manifest.json", "shards/manifest.copy.json"}
    assert manifest.read(tmp_path / "tar")["id"] == manifest.read(tmp_path / "folder")["id"]


# ---------------------------------------------------------------- ranked tokens


@functools.cache
def ranked_cache(folder: Path, keep: int | None) -> Path:
    out = folder.parent / f"ranked-{keep}"
    extract.run(
        make_plan(folder, NINE, tokens="ranked", keep=keep, levels=(1, 3)), out, batch_size=4
    )
    return out


@functools.cache
def raster_cache(folder: Path) -> Path:
    extract.run(make_plan(folder, NINE, levels=(1, 3)), folder.parent / "raster", batch_size=4)
    return folder.parent / "raster"


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("keep", [None, 4, 1, 9])
def test_ranked_tokens_are_the_raster_ones_in_the_stored_order(
    photos: Path, keep: int | None
) -> None:
    """[CLS], then patches as the mask order ranks them, the first `keep` of them; all else is the
    same."""
    count = 1 + (9 if keep is None else keep)
    with featcache.open(raster_cache(photos)) as a, featcache.open(ranked_cache(photos, keep)) as b:
        for view in range(3):
            x, y = (cache.read(range(11), view, cache.fields) for cache in (a, b))
            assert x.keys() == y.keys()
            order = x["mask_order"].astype(int)
            assert len({tuple(row) for row in order.tolist()}) > 5
            for name in ("features", "feature_stats"):
                for row in range(11):
                    wanted = x[name][row][:, [0, *(1 + order[row])[: count - 1]]]
                    np.testing.assert_array_equal(y[name][row], wanted)
            for name in x.keys() - {"features", "feature_stats"}:
                np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.mark.parametrize("keep", [None, 4])
def test_prefixes_of_ranked_rows_are_the_first_tokens(photos: Path, keep: int | None) -> None:
    with featcache.open(ranked_cache(photos, keep)) as cache:
        fields = ("features", "feature_stats")
        whole = cache.read(range(11), 1, fields)
        for tokens in range(1, cache.arrays["features"].item[1] + 1):
            some = cache.read(range(11), 1, fields, tokens=tokens)
            for name in fields:
                np.testing.assert_array_equal(some[name], whole[name][:, :, :tokens])


@pytest.mark.parametrize("tokens", [1, 3, 6, None])
def test_a_flip_is_caught_where_the_prefix_reaches_it(
    photos: Path, tmp_path: Path, tokens: int | None
) -> None:
    """Row 2, view 1, second level, token 4: byte 7 of it."""
    out = copy_tree(ranked_cache(photos, None), tmp_path / "c")
    path = out / "shards/000000.zarr/features/c.0.1.0.0.0"
    item, level, token = 2 * 10 * 8 * 2, 10 * 8 * 2, 8 * 2
    flip(path, 2 * item + level + 4 * token + 7)
    with featcache.open(out) as cache:
        if tokens is not None and tokens <= 4:
            cache.read([2], 1, tokens=tokens)
            cache.read([2], 1, tokens=tokens, levels=[3])
            return
        cache.read([2], 1, tokens=tokens, levels=[1])
        cache.read([1, 3], 1, tokens=tokens)
        for levels in (None, [3]):
            with pytest.raises(UserError) as caught:
                cache.read([2], 1, tokens=tokens, levels=levels)
            assert str(path) in str(caught.value)


def test_a_flip_in_the_prefixes_own_checksums_names_their_file(
    photos: Path, tmp_path: Path
) -> None:
    out = copy_tree(ranked_cache(photos, None), tmp_path / "c")
    path = out / "shards/000000.zarr/prefix_crc/c.0.0.0.0"
    flip(path, 4 * 2 * (3 - 1))  # row 0, view 0, the first three tokens, level 1
    with featcache.open(out) as cache:
        cache.read(range(5), 0)
        for tokens in (2, 3):
            with pytest.raises(UserError) as caught:
                cache.read(range(5), 0, tokens=tokens)
            assert str(path) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_a_cache_that_is_moved_away_is_not_begun_anew(
    photos: Path, tmp_path: Path, store: str
) -> None:
    """Complete shards move with it; with its new path the same command continues."""
    out, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    plan = make_plan(photos, store=store, rows_per_shard=4)

    def move(now: ExtractProgress) -> None:
        if now.pictures >= 6 and out.exists():  # in the second shard
            out.rename(elsewhere)

    with pytest.raises((UserError, OSError)) as caught:
        extract.run(plan, out, batch_size=2, progress=ExtractProgress(move))
    assert str(out) in str(caught.value)
    assert not out.exists()
    # their process, we, is not dead
    for path in (*elsewhere.glob("shards/*.tmp"), *elsewhere.glob("shards/*.lease")):
        commit.remove_path(path)
    extract.run(plan, elsewhere, batch_size=2)
    extract.run(plan, tmp_path / "undisturbed", batch_size=2)
    assert files_below(elsewhere) == files_below(tmp_path / "undisturbed")
