"""A plan is decided before the work: identity, what is refused, levels, kept patches, bytes, and
room for them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extract, target_folder
from featcache.extraction.options import parse_keep, parse_levels
from featcache.storage import commit, identity, manifest
from featcache.storage.row_file import RowFile
from featcache.storage.store import STORES
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, files_below, make_plan, undisturbed

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"

# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": Policy(size=28, seed=1)}, "identity.policy.seed (fatal): 1 here, 0 there"),
        ({"policy": Policy(size=29)}, "identity.policy.size (fatal)"),
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
    options = {"levels": (2, 3), "views": 2}
    out = tmp_path / "c"
    extract.run(make_plan(photos, VIT, "random:0", **options), out)
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
    # the same pictures elsewhere are the same
    extract.run(make_plan(moved, VIT, "random:0", **options), out)


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
    with pytest.raises(UserError, match=r"needs 0\.1 GB more, 0\.0 GB are free.*--views"):
        extract.run(make_plan(photos), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_announced_bytes_are_the_written_ones(pictures: Path) -> None:
    """Within the side arrays that are not per view, metadata and checksums."""
    made = make_plan(pictures)
    data = sum(len(content) for name, content in undisturbed(pictures).items() if "/c." in name)
    per_view = made.view_bytes * 3 * 11
    index = 16 * 3 * 11 * (2 + 1)  # of two levels of features, and of statistics
    labels = 3 * (2 * 4 + 8 * (2 + 3)) + 3 * 8 + 11 * 12  # levels, views, keys as strings
    assert index < data - per_view < index + labels + 11 * (40 + 16) + 3 * 20 * 4
    checksums = 4 * (2 + 2 + 10)  # of two levels of features, two of statistics, ten arrays whole
    assert (
        made.view_bytes
        == 2 * 5 * 8 * 2 + 2 * 5 * 2 * 4 + 4 * 4 + 4 + 16 + 1 + 4 + 16 + 8 + 588 + checksums
    )


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
        ("-1", (12,)),
        ("-1,-3", (10, 12)),
        ("-12,-11", (1, 2)),
        ("1,-1", (1, 12)),
    ],
)
def test_levels(text: str, levels: tuple[int, ...]) -> None:
    assert parse_levels(text, 12) == levels


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last",
        "last:",
        "last:0",
        "last:13",
        "last:-1",
        "0",
        "13",
        "1,1",
        "01,1",
        "1,,2",
        "a",
        "1.5",
        "first:3",
    ],
)
def test_impossible_levels(text: str) -> None:
    with pytest.raises(UsageError, match=r"--levels.*last:N.*1 to 12"):
        parse_levels(text, 12)


@pytest.mark.parametrize("text", ["-0", "-13", "12,-1", "-1,-1", "--1", "-1,", "-", "-1.0"])
def test_impossible_levels_from_the_end(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"--levels.*names no block twice.*or -1 to -12 from the end"
    ):
        parse_levels(text, 12)


@pytest.mark.parametrize("name", ["workers", "batch_size"])
def test_impossible_counts(photos: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        extract.run(make_plan(photos), tmp_path / "c", **{name: 0})
    with pytest.raises(UsageError, match="at least 1"):
        make_plan(photos, views=0)


# ---------------------------------------------------------------- kept patches


@pytest.mark.parametrize(
    ("text", "patches", "kept"),
    [
        (None, 196, None),
        ("58", 196, 58),
        ("196", 196, 196),
        ("0.3", 196, 59),
        ("0.25", 196, 49),
        ("1.0", 196, 196),
        ("0.07", 100, 7),
        ("0.28", 100, 28),
        ("1e-1", 100, 10),
        ("0.001", 196, 1),
    ],
)
def test_kept_patches(text: str | None, patches: int, kept: int | None) -> None:
    """A share is rounded up, and is the decimal fraction that was written."""
    assert parse_keep(text, patches) == kept


@pytest.mark.parametrize("text", ["", "x", "inf", "nan", "1/0", "0.3.1", "58,", "½"])
def test_what_keeps_nothing(text: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"--keep '.*a number of patches from 1 to 196, or a share of them such as 0\.3",
    ):
        parse_keep(text, 196)


@pytest.mark.parametrize("text", ["1.5", "0", "0.0", "-0.3", "-58", "197"])
def test_what_cannot_be_kept_is_echoed_as_it_was_given(text: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^--keep {text}: a number of patches from 1 to 196, or a share of them"
    ):
        parse_keep(text, 196)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": "sorted"}, "raster or ranked"),
        ({"keep": 2}, "give --tokens ranked"),
        ({"keep": 0, "tokens": "ranked"}, "1 to 4"),
        ({"keep": 5, "tokens": "ranked"}, "1 to 4"),
        ({"keep": -1, "tokens": "ranked"}, "1 to 4"),
        ({"rows_per_shard": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_plans(photos: Path, options: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make_plan(photos, **options)


def test_kept_tokens_are_the_bytes_that_are_saved(photos: Path) -> None:
    """L 2, T 5, D 8: features, statistics, and checksums of prefixes shrink; attention and order
    stay whole."""
    whole, kept = (make_plan(photos, tokens="ranked", keep=keep) for keep in (None, 2))
    assert (whole.stored_tokens, kept.stored_tokens) == (5, 3)
    assert whole.view_bytes - kept.view_bytes == 2 * 2 * (8 * 2 + 2 * 4 + 4)
    shapes = {array.name: array.item for array in kept.arrays}
    assert shapes["features"] == (2, 3, 8)
    assert shapes["mask_order"] == shapes["attention"] == (4,)
    assert "prefix_crc" in shapes
    assert "prefix_crc" not in {array.name for array in make_plan(photos).arrays}


def test_unused_options_leave_no_trace_in_the_identity(photos: Path) -> None:
    """So that an option that comes later does not change the ids of caches without it."""
    plain = make_plan(photos).manifest()["identity"]
    assert not {"keep", "pixels", "first_view"} & plain.keys()
    assert "precision" not in plain["teacher"]
    ids = [
        make_plan(photos, **change).manifest()["id"]
        for change in ({}, {"pixels": True}, {"first_view": 3})
    ]
    assert len(set(ids)) == 3
    assert ids[0] == "7c236b752a9cae0e"  # as the first release wrote it


@pytest.mark.parametrize(
    ("count", "sizes"), [(11, [11]), (5, [5, 5, 1]), (1, [1] * 11), (1000, [11])]
)
def test_shards_are_ranges_of_the_source(photos: Path, count: int, sizes: list[int]) -> None:
    shards = make_plan(photos, rows_per_shard=count).shards
    assert [shard["count"] for shard in shards] == sizes
    assert [shard["first"] for shard in shards] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [shard["name"] for shard in shards] == [f"{i:06d}" for i in range(len(sizes))]


def test_the_manifest_and_its_copy_are_there_before_any_shard(photos: Path, tmp_path: Path) -> None:
    made = make_plan(photos)
    target_folder.prepare_folder(made, tmp_path / "c", 4)
    files = files_below(tmp_path / "c")
    assert files["manifest.json"] == files["shards/manifest.copy.json"]
    assert len(files) == 5  # and the teacher's tail, and two groups of Zarr
    target_folder.prepare_folder(made, tmp_path / "c", 9)  # which is a matter of the first call
    assert files_below(tmp_path / "c") == files


# ---------------------------------------------------------------- options

BASE = (
    "--teacher",
    SYNTHETIC,
    "--size",
    28,
    "--levels",
    "last:2",
    "--batch-size",
    4,
    "--workers",
    2,
)
# Every option of `extract` that says what a cache is: what it puts into the manifest.
SAYS = {
    "--teacher": ("synthetic:levels=3,tokens=9,width=8,size=28", "teacher.patches", 9),
    "--views": ("2", "views", 2),
    "--levels": ("1", "levels", [1]),
    "--policy": ("fd", "policy.filter", "bilinear"),
    "--size": ("30", "policy.size", 30),
    "--scale": ("0.3,0.9", "policy.scale", [0.3, 0.9]),
    "--ratio": ("1,1", "policy.ratio", [1.0, 1.0]),
    "--filter": ("lanczos", "policy.filter", "lanczos"),
    "--flip": ("0", "policy.flip", 0.0),
    "--jitter": ("0.1", "policy.jitter", 0.1),
    "--seed": ("5", "policy.seed", 5),
    "--order": ("topk", "order", "topk"),
    "--store": ("webdataset", "store", "webdataset"),
    "--tokens": ("ranked", "tokens", "ranked"),
    "--keep": ("0.5", "keep", 2),
    "--pixels": ("raw", "pixels", "raw"),
    "--precision": ("bf16", "teacher.precision", "bf16"),
    "--rows-per-shard": ("4", "rows_per_shard", 4),
}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("option", SAYS)
def test_no_option_does_nothing(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path, option: str
) -> None:
    """Each changes the id that a dry run tells, and the identity that is written."""
    value, field, wanted = SAYS[option]
    plain = (
        "extract",
        *BASE[2:],
        "--images",
        photos,
        *(("--tokens", "ranked") if option == "--keep" else ()),
    )
    teacher = () if option == "--teacher" else BASE[:2]
    both = ((*plain, *BASE[:2]), (*plain, *teacher, option, value))
    ids = [json.loads(featcache_command(*each, "--dry-run", "--json").out)["id"] for each in both]
    assert ids[0] != ids[1]
    ran = featcache_command(*both[1], "--out", tmp_path / "c")
    assert ran.status == 0, ran.err
    about = manifest.read(tmp_path / "c")
    assert about["id"] == ids[1]
    assert dict(identity.flatten(about["identity"]))[field] == wanted


# ---------------------------------------------------------------- no room


def fill_up(monkeypatch: pytest.MonkeyPatch, record: Path) -> None:
    """No row finds room any more some time after the shard of `record` is complete."""
    left, write = iter(range(30)), os.write

    def limited(fd: int, data: bytes) -> int:
        if record.is_file() and next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", limited)


def test_a_full_disk_keeps_what_is_complete_and_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fill_up(patched, tmp_path / "c/shards/000000.json")
        with pytest.raises(
            UserError, match=r"No space left.* 1 of 3 shards are complete and kept.*same command"
        ):
            extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    left = files_below(tmp_path / "c")
    assert "shards/000000.json" in left
    assert all(undisturbed(pictures)[name] == data for name, data in left.items())
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


@pytest.mark.parametrize("what", ["begin_shard", "__init__"])
def test_no_room_for_a_new_file_is_a_full_disk_too(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A folder or a file can be the first thing that finds no room; the lease is given back."""
    owner: Any = commit if what == "begin_shard" else RowFile
    calls, original = [], getattr(owner, what)

    def full(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if what == "begin_shard" else 30):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, what, full)
        with pytest.raises(UserError, match=r"No space left.* 1 of 3 shards are complete"):
            extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    left = files_below(tmp_path / "c")
    assert all(undisturbed(pictures)[name] == data for name, data in left.items())
    assert not list((tmp_path / "c/shards").glob("*.tmp"))
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["stopped", "full"]
)
def test_a_stop_while_files_are_opened_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, error: BaseException
) -> None:
    calls: list[int] = []
    original = RowFile.__init__

    def stopped(self: RowFile, path: Path) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error
        original(self, path)

    monkeypatch.setattr(RowFile, "__init__", stopped)
    with pytest.raises((KeyboardInterrupt, UserError)):
        extract.run(make_plan(photos, store=store), tmp_path / "c", batch_size=4)
    left = {path.name for path in (tmp_path / "c/shards").iterdir()}
    assert left == {"manifest.copy.json", *(["zarr.json"] if store == "zarr" else [])}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte, where this machine lets us have one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(
    photos: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete shards stay; with room made, the same call goes on."""
    monkeypatch.setattr(target_folder, "_SPARE_BYTES", 0)
    made = make_plan(photos)
    extract.run(make_plan(photos), small_disk.parent / "whole", batch_size=4)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    # room for one shard and a half: files take whole pages
    filler.write_bytes(bytes(free - 220_000))
    with monkeypatch.context() as patched:
        patched.setattr(target_folder, "check_space", lambda *_: None)
        with pytest.raises(UserError, match=r"No space left.*of 3 shards are complete and kept"):
            extract.run(made, small_disk / "c", batch_size=4)
    assert not list((small_disk / "c/shards").glob("*.tmp"))
    filler.unlink()
    extract.run(made, small_disk / "c", batch_size=4)
    assert files_below(small_disk / "c") == files_below(small_disk.parent / "whole")
