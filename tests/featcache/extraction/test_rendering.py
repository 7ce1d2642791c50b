"""From pictures to what the teacher sees: views and proofs, stored pixels, batches, pictures that
cannot be used."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import featcache
from featcache import rng, teachers
from featcache.errors import UserError
from featcache.extraction import extract, plan, rendering
from featcache.pictures.decode import decode
from featcache.pictures.folder import FolderSource
from featcache.pictures.open_source import open_source
from featcache.storage import json_file
from featcache.teachers.synthetic import Synthetic
from featcache.views.draw import DrawnViews, draw_views
from featcache.views.fingerprint import pixel_hash, thumbnail
from featcache.views.policy import Policy
from featcache.views.render import render
from tests.conftest import files_below, make_plan, undisturbed


def test_stored_views_are_the_policys_and_proofs_are_at_its_size(
    photos: Path, tmp_path: Path
) -> None:
    """The teacher sees 28 pixels, the policy says 40: hash and thumbnail are of the 40-pixel
    view."""
    source = open_source(photos)
    policy = Policy(size=40, seed=3)
    extract.run(make_plan(photos, policy=policy, views=2), tmp_path / "c", batch_size=4)
    with featcache.open(tmp_path / "c") as cache:
        assert list(cache.keys) == list(source.keys)
        for row, key in enumerate(source.keys):
            picture = decode(source.read(row))
            assert cache.read([row], 0, ["source_size"])["source_size"].tolist() == [
                [picture.height, picture.width]
            ]
            size = np.array([[picture.height, picture.width]])
            drawn = draw_views(policy, rng.key_digests([key]), size, range(2))
            for view in range(2):
                got = cache.read([row], view, [*DrawnViews._fields, "pixel_hash", "thumbnail"])
                for name in DrawnViews._fields:
                    np.testing.assert_array_equal(got[name][0], getattr(drawn, name)[0, view])
                box = (drawn.crop[0, view], drawn.flip[0, view], drawn.jitter[0, view])
                pixels = render(picture, *box, 40, "bicubic")
                assert int(got["pixel_hash"][0]) == pixel_hash(pixels)
                np.testing.assert_array_equal(got["thumbnail"][0], thumbnail(pixels))


# ---------------------------------------------------------------- stored pixels


def by_hand(picture: Path, crop: list[int], flip: int, size: int) -> np.ndarray:
    """The view by Pillow alone: whole picture to RGB, the box, bicubic, then mirrored."""
    top, left, height, width = crop
    view = Image.open(picture).convert("RGB").crop((left, top, left + width, top + height))
    view = view.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def test_stored_pixels_are_the_views_and_change_nothing_else(photos: Path, tmp_path: Path) -> None:
    """At the policy's size, whatever the teacher's; plain Zarr, plain Pillow."""
    made = make_plan(photos, policy=Policy(size=40, seed=3), views=2, pixels=True)
    assert made.manifest()["identity"]["pixels"] == "raw"
    extract.run(made, tmp_path / "raw", batch_size=4)
    extract.run(replace(made, pixels=False), tmp_path / "plain", batch_size=4)
    checked = flipped = 0
    for shard in sorted((tmp_path / "raw/shards").glob("*.zarr")):
        group = zarr.open_group(shard, mode="r")
        pixels, crop, flip = (group[name][:] for name in ("pixels", "crop", "flip"))
        size = (shard / "pixels/c.0.1.0.0.0").stat().st_size
        assert size == len(pixels) * (40 * 40 * 3 + 16) + 4  # and the index
        for row, key in enumerate(group["key"][:].tolist()):
            for view in range(2) if key != "grey16" else ():  # plain PIL clips 16 bits
                wanted = by_hand(
                    next(photos.glob(f"{key}.*")), crop[row, view].tolist(), flip[row, view], 40
                )
                np.testing.assert_array_equal(pixels[row, view], wanted, err_msg=key)
                checked, flipped = checked + 1, flipped + int(flip[row, view])
    assert checked == 20
    assert 0 < flipped < 20
    with featcache.open(tmp_path / "raw") as raw, featcache.open(tmp_path / "plain") as plain:
        assert set(raw.fields) - set(plain.fields) == {"pixels"}
        for name in plain.fields:
            a, b = (cache.read(range(11), 1, [name])[name] for cache in (raw, plain))
            np.testing.assert_array_equal(a, b, err_msg=name)
        hashes = raw.read(range(11), 1, ["pixels", "pixel_hash"])
        assert [pixel_hash(each) for each in hashes["pixels"]] == hashes["pixel_hash"].tolist()


# -------------------------------------------------------------- what must not be taken for the same

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


def test_features_of_a_flipped_view_are_not_flipped_features(photos: Path, tmp_path: Path) -> None:
    """A network knows left from right. The same crops, none of them mirrored and all of them:
    pixels are each other's mirror image, features are the mirrored pixels' own."""
    found = []
    for flip in (0.0, 1.0):
        made = make_plan(
            photos,
            VIT,
            "random:0",
            policy=Policy(size=32, flip=flip),
            levels=(3,),
            views=1,
            pixels=True,
        )
        extract.run(made, tmp_path / str(flip), batch_size=4)
        with featcache.open(tmp_path / str(flip)) as cache:
            found.append(cache.read(range(11), 0, ["features", "pixels", "crop", "flip"]))
    plain, mirrored = found
    assert (plain["flip"].tolist(), mirrored["flip"].tolist()) == ([0] * 11, [1] * 11)
    np.testing.assert_array_equal(plain["crop"], mirrored["crop"])
    np.testing.assert_array_equal(plain["pixels"][:, :, ::-1], mirrored["pixels"])
    patches = plain["features"][:, 0, 1:].astype(np.float64).reshape(11, 4, 4, 24)
    shortcut = patches[:, :, ::-1].reshape(11, 16, 24)
    wanted = mirrored["features"][:, 0, 1:].astype(np.float64)
    away = np.linalg.norm(wanted - shortcut, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert away.min() > 0.01
    assert away.mean() > 0.1
    teacher = teachers.load(VIT, "random:0")
    seen: list[torch.Tensor] = []
    teacher.vit.blocks[2].register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        x = torch.from_numpy(plain["pixels"][:, :, ::-1].copy()).permute(0, 3, 1, 2)
        teacher.vit.forward_features((x / 255 - 0.5) / 0.5)
    y = seen[0][:, 1:].double().numpy()
    own = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    assert (np.linalg.norm(wanted - own, axis=-1) / np.linalg.norm(own, axis=-1)).max() < 1e-3


def test_a_crop_replayed_at_196_is_the_direct_crop(photos: Path, tmp_path: Path) -> None:
    """From the stored box to 196 pixels in one step; by way of the policy's 224 pixels it would be
    another."""
    teacher = Watched(tokens=196, size=196)
    source = open_source(photos)
    made = plan.Plan(
        source=source, teacher=teacher, policy=Policy(), views=2, levels=(3,), pixels=True
    )
    extract.run(made, tmp_path / "c", batch_size=22)
    (batch,) = teacher.batches
    with featcache.open(tmp_path / "c") as cache:
        for row, key in enumerate(cache.keys):
            for view in range(2) if key != "grey16" else ():  # plain PIL clips 16 bits
                stored = cache.read([row], view, ["crop", "flip", "pixels"])
                path, box = (
                    next(photos.glob(f"{key}.*")),
                    (stored["crop"][0].tolist(), int(stored["flip"][0])),
                )
                seen = batch[2 * row + view].transpose(1, 2, 0)
                np.testing.assert_array_equal(seen, by_hand(path, *box, 196), err_msg=key)
                np.testing.assert_array_equal(
                    stored["pixels"][0], by_hand(path, *box, 224), err_msg=key
                )
                detour = Image.fromarray(stored["pixels"][0]).resize(
                    (196, 196), Image.Resampling.BICUBIC
                )
                if key != "bits":
                    assert (np.asarray(detour) != seen).any(), key


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(("count", "window"), [(0, 3), (2, 3), (9, 3), (9, 1)])
def test_work_ahead_is_bounded_and_in_order(count: int, window: int) -> None:
    """Decoded pictures wait in memory: no more of them than the window says."""
    started: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        for taken, (item, future) in enumerate(
            rendering.prefetch(pool, started.append, range(count), window)
        ):
            assert item == taken
            future.result()
            assert len(started) <= taken + window
    assert sorted(started) == list(range(count))


class Watched(Synthetic):
    """The synthetic teacher, noting the batches it is given."""

    def __init__(self, tokens: int = 4, size: int = 28) -> None:
        super().__init__(3, tokens, 8, size)
        self.batches: list[np.ndarray] = []
        self.name = "watched"

    def forward(
        self, batch: torch.Tensor, levels: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        self.batches.append(batch.numpy().copy())
        return super().forward(batch, levels)


def test_batches_never_cross_a_shard_and_the_last_is_padded(photos: Path, tmp_path: Path) -> None:
    """11 pictures x 2 views in shards of 5: 10, 10 and 2 views in batches of 4 are 3 + 3 + 1 full
    batches."""
    teacher = Watched()
    made = plan.Plan(
        source=open_source(photos),
        teacher=teacher,
        policy=Policy(size=28),
        views=2,
        levels=(3,),
        rows_per_shard=5,
    )
    extract.run(made, tmp_path / "c", batch_size=4)
    assert [batch.shape for batch in teacher.batches] == [(4, 3, 28, 28)] * 7
    assert teacher.batches[0].dtype == np.uint8
    for last, used in ((2, 2), (5, 2), (6, 2)):
        for i in range(used, 4):
            np.testing.assert_array_equal(teacher.batches[last][i], teacher.batches[last][used - 1])


# ---------------------------------------------------------------- pictures that cannot be used


def test_bad_pictures_are_listed_and_the_rest_extracted(pictures: Path) -> None:
    undisturbed(pictures)
    out = pictures.parent / "undisturbed"
    report = json_file.read_json(out / "quarantine.json")
    assert [row["key"] for row in report["pictures"]] == ["half", "lie"]
    assert "truncated" in report["pictures"][0]["reason"]
    assert report["pictures"][1]["reason"] == "not a readable picture"
    with featcache.open(out) as cache:
        assert len(cache) == 11
        assert cache.quarantined == report["pictures"]
        assert cache.keys.find(["half", "lie"]).tolist() == [-1, -1]
        assert cache.manifest["identity"]["pictures"]["count"] == 13


def test_strict_stops_at_the_first(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'half' cannot be used.*--strict"):
        extract.run(make_plan(pictures), tmp_path / "c", batch_size=4, strict=True)
    assert not [name for name in files_below(tmp_path / "c") if "tmp" in name]
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


def test_a_picture_that_vanishes_stops_by_name_and_can_come_back(
    photos: Path, tmp_path: Path
) -> None:
    """Quarantine is for pictures that were read and are bad: a complete shard is never made
    again."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    made = make_plan(folder)
    (folder / "rgb.png").unlink()
    with pytest.raises(UserError, match=r"'rgb' cannot be read.*No such file"):
        extract.run(made, tmp_path / "c")
    shutil.copy(photos / "rgb.png", folder)
    extract.run(made, tmp_path / "c")
    with featcache.open(tmp_path / "c") as cache:
        assert len(cache) == 11
        assert cache.quarantined == []


def test_a_failing_disk_is_not_taken_for_bad_pictures(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, or an input/output error, says nothing about the picture: quarantining
    would drop good data for ever, because a complete shard is never made again."""
    made = make_plan(photos)

    def read(self: object, index: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(FolderSource, "read", read)
    with pytest.raises((OSError, UserError), match="Too many open files"):
        extract.run(made, tmp_path / "c")
    assert not (tmp_path / "c/shards/000000.json").exists()


def test_no_usable_picture_at_all_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of 3 pictures could be used.*quarantine\.json"):
            extract.run(make_plan(folder), tmp_path / "c")
    assert len(json_file.read_json(tmp_path / "c/quarantine.json")["pictures"]) == 3
