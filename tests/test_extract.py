"""The extraction: the same bytes whatever the workers, the batch or the moment it was killed; numbers by a second way;
what is refused; pictures that cannot be used.

The whole folder is compared, so anything that depends on time, order or chance anywhere is found.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import zarr
from PIL import Image

import featcache
from featcache import extract, images, manifest, plan, teachers, views
from featcache.errors import IdentityError, UsageError, UserError
from featcache.teachers.synthetic import Synthetic
from tests.conftest import SYNTHETIC, make_photos, python
from tests.store_contract import files_below

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eleven photos, a truncated JPEG in their midst, and a text that calls itself a picture."""
    root = make_photos(tmp_path_factory.mktemp("extract") / "pictures")
    whole = (root / "photo1.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "lie.png").write_text("not a picture")
    return root


def make_plan(folder: Path, teacher: str = SYNTHETIC, weights: str | None = None, **changes: object) -> plan.Plan:
    loaded = teachers.load(teacher, weights)
    policy = changes.pop("policy", views.Policy(size=28))
    options = {"views": 3, "levels": (1, loaded.depth), "rows_per_shard": 5, **changes}
    return plan.Plan(images.open_source(folder), loaded, policy, **options)


@functools.cache
def undisturbed(folder: Path) -> dict[str, bytes]:
    """Every file of a cache that was made in one go."""
    out = folder.parent / "undisturbed"
    extract.run(make_plan(folder), out, batch_size=4, workers=2)
    return files_below(out)


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 4), (3, 4), (1, 7), (3, 7), (2, 1), (2, 64)])
def test_workers_and_batch_size_change_no_byte(pictures: Path, tmp_path: Path, workers: int, batch_size: int) -> None:
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=batch_size, workers=workers)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


def test_a_view_does_not_depend_on_how_many_there_are(pictures: Path, tmp_path: Path) -> None:
    extract.run(make_plan(pictures, views=1, rows_per_shard=100), tmp_path / "one", batch_size=4)
    undisturbed(pictures)
    with featcache.open(tmp_path / "one") as one, featcache.open(pictures.parent / "undisturbed") as three:
        assert list(one.keys) == list(three.keys)
        for name in one.fields:
            a, b = (cache.read(range(len(one)), 0, [name])[name] for cache in (one, three))
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_running_again_does_nothing(pictures: Path, tmp_path: Path) -> None:
    undisturbed(pictures)
    out = Path(shutil.copytree(pictures.parent / "undisturbed", tmp_path / "c"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*/c.*")}
    progress = extract.Progress()
    extract.run(make_plan(pictures), out, batch_size=4, progress=progress)
    assert (progress.total, progress.pictures) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*/c.*")} == times
    assert files_below(out) == undisturbed(pictures)


def test_lost_shards_are_made_again_and_only_they(pictures: Path, tmp_path: Path) -> None:
    undisturbed(pictures)
    out = Path(shutil.copytree(pictures.parent / "undisturbed", tmp_path / "c"))
    shutil.rmtree(out / "shards/000001.zarr")
    (out / "shards/000001.json").unlink()
    progress = extract.Progress()
    extract.run(make_plan(pictures), out, batch_size=4, progress=progress)
    assert (progress.total, progress.pictures) == (5, 5)
    assert files_below(out) == undisturbed(pictures)


# Each stage: the function that the killed process enters for the n-th time, and dies in.
STAGES = {
    "before the manifest": ("manifest.write_json", 1),
    "half a manifest": ("manifest.os.fsync", 1),
    "after the manifest": ("manifest.sync_folder", 1),
    "before the tail": ("manifest.write_file", 2),
    "decode": ("images.decode", 8),
    "render": ("views.render", 20),
    "teacher": ("extract.compute", 5),
    "encode": ("targets.mask_order", 6),
    "append": ("zarr_store._RowFile.append", 70),
    "metadata": ("zarr_store.ZarrShardWriter._write_metadata", 2),
    "inner record": ("manifest.write_json", 3),
    "before the renames": ("zarr_store._publish", 2),
    "between the renames": ("zarr_store._publish_record", 2),
    "after the first shard": ("zarr_store.ZarrShardWriter.__init__", 2),
    "quarantine report": ("extract._report_quarantine", 1),
}
# Forks from a process that has loaded everything and run nothing: two seconds in all instead of three for each.
KILLED = """
import importlib, json, os, signal, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from featcache import extract, images, plan, teachers, views
import featcache.zarr_store
import zarr
teachers.modules()

def patch(target, call):
    module, *path = target.split(".")
    place = importlib.import_module("featcache." + module)
    *holders, name = path
    for holder in holders:
        place = getattr(place, holder)
    original, lock, calls = getattr(place, name), threading.Lock(), []
    def dies(*args, **kwargs):
        with lock:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(place, name, dies)

folder, root, teacher, stages = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
children = {}
for stage, (target, call) in stages.items():
    children[stage] = os.fork()
    if children[stage] == 0:
        patch(target, call)
        loaded = teachers.load(teacher)
        levels, policy = (1, loaded.depth), views.Policy(size=28)
        made = plan.Plan(images.open_source(folder), loaded, policy, 3, levels, rows_per_shard=5)
        extract.run(made, root / stage, batch_size=4, workers=2)
        os._exit(0)
for stage, child in children.items():
    _, status = os.waitpid(child, 0)
    print(stage, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", flush=True)
"""


@pytest.fixture(scope="module")
def killed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    root = tmp_path_factory.mktemp("killed")
    ran = python(KILLED, pictures, root, SYNTHETIC, json.dumps(STAGES))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{stage} 9" for stage in STAGES], ran.stdout + ran.stderr
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_run_again_gives_the_same_bytes(pictures: Path, killed: Path, stage: str) -> None:
    before = files_below(killed / stage) if (killed / stage).exists() else {}
    assert before != undisturbed(pictures)
    extract.run(make_plan(pictures), killed / stage, batch_size=4, workers=2)
    after = files_below(killed / stage)
    assert after.keys() == undisturbed(pictures).keys()
    assert after == undisturbed(pictures)


def test_an_interrupted_run_keeps_complete_shards_and_leaves_no_litter(pictures: Path, tmp_path: Path) -> None:
    made = make_plan(pictures)

    def stop(progress: extract.Progress) -> None:
        if progress.pictures >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract.run(made, tmp_path / "c", batch_size=4, progress=extract.Progress(stop))
    left = files_below(tmp_path / "c")
    assert "shards/000000.json" in left
    assert not [name for name in left if "tmp" in name]
    assert all(undisturbed(pictures)[name] == data for name, data in left.items())
    extract.run(made, tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


# ---------------------------------------------------------------- the numbers, by a second way


@functools.cache
def vit_cache(folder: Path) -> Path:
    made = make_plan(folder, VIT, "random:0", policy=views.Policy(size=40, seed=3), levels=(2, 3), views=2)
    out = folder.parent / "vit"
    extract.run(made, out, batch_size=4)
    return out


def independent(picture: Path, crop: np.ndarray, flip: int) -> tuple[np.ndarray, np.ndarray]:
    """y_2 and y_3 (2, T, D) and the last block's [CLS] attention (P,), float64, from a picture and a stored box, with
    nothing of ours: PIL, timm and hooks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0
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
        offsets, blob = group["key_offsets"][:], group["key"][:].tobytes()
        stored = {name: group[name][:] for name in ("features", "feature_stats", "attention", "crop", "flip")}
        for row in range(len(offsets) - 1):
            key = blob[offsets[row] : offsets[row + 1]].decode()
            if key == "grey16":  # plain PIL clips 16 bits; tests/test_images.py has the formula
                continue
            path = next(photos.glob(f"{key}.*"))
            for view in range(2):
                ys, attention = independent(path, stored["crop"][row, view], stored["flip"][row, view])
                mean, std = ys.mean(-1, keepdims=True), np.sqrt(ys.var(-1, keepdims=True) + 1e-5)
                h = (ys - mean) / std
                got = stored["features"][row, view].astype(np.float64)
                relative = np.linalg.norm(got - h, axis=-1) / np.linalg.norm(h, axis=-1)
                assert relative.max() < 1e-3, (key, view)
                stats = np.concatenate([mean, std], -1)
                np.testing.assert_allclose(stored["feature_stats"][row, view], stats, rtol=1e-4, atol=1e-5)
                difference = np.abs(stored["attention"][row, view] - attention).max()
                assert difference / attention.max() < 1e-5, (key, view)
                checked += 1
    assert checked == 20


def test_stored_views_are_the_policys_and_proofs_are_at_its_size(photos: Path) -> None:
    """The teacher sees 32 pixels, the policy says 40: hash and thumbnail are of the 40-pixel view."""
    source = images.open_source(photos)
    policy = views.Policy(size=40, seed=3)
    from featcache import rng

    with featcache.open(vit_cache(photos)) as cache:
        assert list(cache.keys) == list(source.keys)
        for row, key in enumerate(source.keys):
            picture = images.decode(source.read(row))
            assert cache.read([row], 0, ["source_size"])["source_size"].tolist() == [[picture.height, picture.width]]
            size = np.array([[picture.height, picture.width]])
            drawn = views.draw(policy, rng.key_digests([key]), size, range(2))
            for view in range(2):
                got = cache.read([row], view, [*views.Drawn._fields, "pixel_hash", "thumbnail"])
                for name in views.Drawn._fields:
                    np.testing.assert_array_equal(got[name][0], getattr(drawn, name)[0, view])
                box = (drawn.crop[0, view], drawn.flip[0, view], drawn.jitter[0, view])
                pixels = views.render(picture, *box, 40, "bicubic")
                assert int(got["pixel_hash"][0]) == views.pixel_hash(pixels)
                np.testing.assert_array_equal(got["thumbnail"][0], views.thumbnail(pixels))


def test_stored_orders_and_checksums_derive_from_what_is_stored(photos: Path) -> None:
    from featcache import rng, targets

    with featcache.open(vit_cache(photos)) as cache:
        rows = range(len(cache))
        for view in range(2):
            got = cache.read(rows, view, ("features", "feature_stats", "attention", "mask_order", "row_crc"))
            order = targets.mask_order("attentive", got["attention"], rng.key_digests(cache.keys), view, 3)
            np.testing.assert_array_equal(got["mask_order"], order)
            import crc32c

            crcs = [[crc32c.crc32c(level.tobytes()) for level in row] for row in got["features"]]
            assert got["row_crc"].tolist() == crcs
            assert ((got["attention"].sum(1) > 0) & (got["attention"].sum(1) < 1)).all()
            h = got["features"].astype(np.float64)
            assert np.abs(h.mean(-1)).max() < 1e-3
            std = got["feature_stats"][..., 1].astype(np.float64)  # the divisor holds eps, so var is a little below 1
            np.testing.assert_allclose(h.var(-1), 1 - 1e-5 / std**2, atol=2e-3)


def test_a_real_network_agrees_across_batch_sizes(photos: Path, tmp_path: Path) -> None:
    made = make_plan(photos, VIT, "random:0", policy=views.Policy(size=40, seed=3), levels=(2, 3), views=2)
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


class Watched(Synthetic):
    """The synthetic teacher, noting the batches it is given."""

    def __init__(self) -> None:
        super().__init__(3, 4, 8, 28)
        self.batches: list[np.ndarray] = []
        self.name = "watched"

    def forward(self, batch: torch.Tensor, levels: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
        self.batches.append(batch.numpy().copy())
        return super().forward(batch, levels)


def test_batches_never_cross_a_shard_and_the_last_is_padded(photos: Path, tmp_path: Path) -> None:
    """11 pictures x 2 views in shards of 5: 10, 10 and 2 views in batches of 4 are 3 + 3 + 1 full batches."""
    teacher = Watched()
    made = plan.Plan(images.open_source(photos), teacher, views.Policy(size=28), 2, (3,), rows_per_shard=5)
    extract.run(made, tmp_path / "c", batch_size=4)
    assert [batch.shape for batch in teacher.batches] == [(4, 3, 28, 28)] * 7
    assert teacher.batches[0].dtype == np.uint8
    for last, used in ((2, 2), (5, 2), (6, 2)):
        for i in range(used, 4):
            np.testing.assert_array_equal(teacher.batches[last][i], teacher.batches[last][used - 1])


class Broken(Synthetic):
    """Level 3 of the seventh view that it sees is not finite."""

    def __init__(self, value: float) -> None:
        super().__init__(3, 4, 8, 28)
        self.value, self.seen, self.name = value, 0, "broken"

    def forward(self, batch: torch.Tensor, levels: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
        ys, attention = super().forward(batch, levels)
        if self.seen <= 6 < self.seen + len(batch):
            ys[levels.index(3)][6 - self.seen, 0, 5] = self.value
        self.seen += len(batch)
        return ys, attention


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_that_is_not_finite_is_told_by_key_view_and_level(photos: Path, tmp_path: Path, value: float) -> None:
    """Views 0, 1 of picture 0, ...: the seventh is picture 3's first."""
    source = images.open_source(photos)
    made = plan.Plan(source, Broken(value), views.Policy(size=28), 2, (1, 3), rows_per_shard=5)
    with pytest.raises(UserError) as caught:
        extract.run(made, tmp_path / "c", batch_size=4)
    for part in ("non-finite", repr(source.keys[3]), "view 0", "level 3"):
        assert part in str(caught.value)
    assert not [name for name in files_below(tmp_path / "c") if name.startswith("shards/")]


# ---------------------------------------------------------------- pictures that cannot be used


def test_bad_pictures_are_listed_and_the_rest_extracted(pictures: Path) -> None:
    undisturbed(pictures)
    out = pictures.parent / "undisturbed"
    report = manifest.read_json(out / "quarantine.json")
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
        extract.run(make_plan(pictures), tmp_path / "c", strict=True)
    assert not [name for name in files_below(tmp_path / "c") if "tmp" in name]
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


def test_a_picture_that_vanishes_stops_by_name_and_can_come_back(photos: Path, tmp_path: Path) -> None:
    """Quarantine is for pictures that were read and are bad: a complete shard is never made again."""
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
    """Too many open files, or an input/output error, says nothing about the picture: quarantining would drop good data
    for ever, because a complete shard is never made again."""
    import errno

    made = make_plan(photos)

    def read(self: object, index: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(images.FolderSource, "read", read)
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
    assert len(manifest.read_json(tmp_path / "c/quarantine.json")["pictures"]) == 3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": views.Policy(size=28, seed=1)}, "identity.policy.seed (fatal): 1 here, 0 there"),
        ({"policy": views.Policy(size=29)}, "identity.policy.size (fatal)"),
        ({"views": 2}, "identity.views (fatal): 2 here, 3 there"),
        ({"levels": (3,)}, "identity.levels (fatal)"),
        ({"order": "uniform"}, "identity.order (fatal)"),
        ({"rows_per_shard": 6}, "identity.rows_per_shard"),
        ({"teacher": SYNTHETIC.replace("width=8", "width=9")}, "identity.teacher.name (fatal)"),
    ],
    ids=str,
)
def test_another_cache_in_out_is_refused_by_field(pictures: Path, change: dict, field: str) -> None:
    before = undisturbed(pictures)
    with pytest.raises(IdentityError) as caught:
        extract.run(make_plan(pictures, **change), pictures.parent / "undisturbed")
    assert field in str(caught.value)
    assert "--out" in str(caught.value)
    assert files_below(pictures.parent / "undisturbed") == before


def test_other_weights_and_other_pictures_are_refused(photos: Path, tmp_path: Path) -> None:
    out = vit_cache(photos)
    options = {"policy": views.Policy(size=40, seed=3), "levels": (2, 3), "views": 2}
    with pytest.raises(IdentityError, match=r"identity\.teacher\.weight_hash \(fatal\)"):
        extract.run(make_plan(photos, VIT, "random:1", **options), out)
    fewer = Path(shutil.copytree(photos, tmp_path / "fewer"))
    (fewer / "rgb.png").unlink()
    with pytest.raises(IdentityError, match=r"identity\.pictures"):
        extract.run(make_plan(fewer, VIT, "random:0", **options), out)
    renamed = Path(shutil.copytree(photos, tmp_path / "renamed"))
    (renamed / "rgb.png").rename(renamed / "rgc.png")
    with pytest.raises(IdentityError, match=r"identity\.pictures\.keys_digest"):
        extract.run(make_plan(renamed, VIT, "random:0", **options), out)
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    extract.run(make_plan(moved, VIT, "random:0", **options), out)  # the same pictures elsewhere are the same


def test_out_that_is_something_else_is_left_alone(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no cache"):
        extract.run(make_plan(photos), tmp_path / "docs")
    assert files_below(tmp_path / "docs") == {"letter.txt": b"dear"}
    with pytest.raises(UserError, match="exists and is no cache"):
        extract.run(make_plan(photos), tmp_path / "docs/letter.txt")


def test_a_damaged_tail_is_written_again(photos: Path, tmp_path: Path) -> None:
    """`Cache.tail` advises to run the same extraction again; that must help."""
    out = tmp_path / "c"
    extract.run(make_plan(photos), out)
    tail = next(out.glob("*.safetensors"))
    good = tail.read_bytes()
    tail.write_bytes(good[:-1] + b"\xff")
    with featcache.open(out) as cache, pytest.raises(UserError, match=r"\.safetensors"):
        cache.tail()
    extract.run(make_plan(photos), out)
    assert tail.read_bytes() == good


def test_too_little_space_is_told_before_the_work(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.1 GB, 0\.0 GB are free.*--views"):
        extract.run(make_plan(photos), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_announced_bytes_are_the_written_ones(pictures: Path) -> None:
    """Within the side arrays that are not per view, metadata and checksums."""
    made = make_plan(pictures)
    data = sum(len(content) for name, content in undisturbed(pictures).items() if "/c." in name)
    per_view = made.view_bytes * 3 * 11
    assert 0 <= data - per_view < 11 * 40 + 3 * 20 * 4
    assert made.view_bytes == 2 * 5 * 8 * 2 + 2 * 5 * 2 * 4 + 2 * 4 + 4 * 4 + 4 + 16 + 1 + 4 + 16 + 8 + 588


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("last:1", (12,)),
        ("last:5", (8, 9, 10, 11, 12)),
        ("last:12", tuple(range(1, 13))),
        ("all", tuple(range(1, 13))),
        ("8,10,12", (8, 10, 12)),
        ("12,3", (3, 12)),
        ("7", (7,)),
    ],
)
def test_levels(text: str, levels: tuple[int, ...]) -> None:
    assert plan.parse_levels(text, 12) == levels


@pytest.mark.parametrize(
    "text",
    ["", "last", "last:", "last:0", "last:13", "last:-1", "0", "13", "1,1", "01,1", "1,,2", "a", "1.5", "first:3"],
)
def test_impossible_levels(text: str) -> None:
    with pytest.raises(UsageError, match=r"--levels.*last:N.*1 to 12"):
        plan.parse_levels(text, 12)


@pytest.mark.parametrize("name", ["workers", "batch_size"])
def test_impossible_counts(photos: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        extract.run(make_plan(photos), tmp_path / "c", **{name: 0})
    with pytest.raises(UsageError, match="at least 1"):
        make_plan(photos, views=0)


def test_progress_counts_and_names_the_slowest_stage(pictures: Path, tmp_path: Path) -> None:
    seen = []
    progress = extract.Progress(lambda p: seen.append((p.pictures, p.total, p.slowest)))
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4, progress=progress)
    assert progress.pictures == progress.total == 13
    assert [count for count, _, _ in seen] == sorted(count for count, _, _ in seen)
    assert {total for _, total, _ in seen} == {13}
    assert set(progress.busy) == {"decode", "teacher", "encode", "write"}
    assert all(seconds > 0 for seconds in progress.busy.values())
    assert progress.rate > 0
    progress.busy.update(decode=4.0, teacher=3.0, encode=0.0, write=0.0)
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
    assert {n: d for n, d in a.items() if n != "manifest.json"} == {n: d for n, d in b.items() if n != "manifest.json"}
    assert manifest.read(tmp_path / "tar")["id"] == manifest.read(tmp_path / "folder")["id"]
