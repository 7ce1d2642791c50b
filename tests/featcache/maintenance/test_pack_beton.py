"""A packed .beton: the bytes and pixels that went in, through our reader and through FFCV's own;
one file or none."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache import rng
from featcache.errors import UserError
from featcache.maintenance import pack_beton
from featcache.pictures.beton import import_ffcv
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError
from featcache.views import pixel_path
from tests.conftest import Ran, python

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(ffcv: None, featcache_command: Callable[..., Ran]) -> Run:
    """`featcache pack ARGS`: exit status, stdout and stderr."""

    def start(*arguments: object) -> tuple[int, str, str]:
        ran = featcache_command("pack", *arguments)
        return ran.status, ran.out, ran.err

    return start


def save(
    path: Path, size: tuple[int, int], phase: int, mode: str = "RGB", **options: object
) -> None:
    """A smooth picture of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = np.stack(
        [127 + 100 * np.sin(x / 9 + phase + c) * np.cos(y / (5 + c)) for c in range(3)], -1
    )
    Image.fromarray(waves.astype(np.uint8)).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; grey, RGB and CMYK JPEGs, one of them turned by EXIF, PNGs with and without
    alpha."""
    root = tmp_path / "photos"
    save(root / "cat" / "rgb.jpg", (50, 40), 0)
    save(root / "cat" / "grey.JPEG", (41, 33), 1, "L", quality=80)
    save(root / "cat" / "print.jpg", (30, 30), 2, "CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    save(root / "dog" / "turned.jpg", (60, 20), 3, exif=turned)
    save(root / "dog" / "plain.png", (25, 35), 4)
    save(root / "dog" / "clear.png", (25, 36), 5, "RGBA")
    return root


def test_bytes_of_jpegs_and_pixels_of_the_rest(folder: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "packed" / "train.beton"
    assert run(folder, out) == (
        0,
        f"6 pictures (2 classes) in {out}: 3 JPEGs as they are, 3 as pixels\n",
        "",
    )
    source, packed = open_source(folder), open_source(out)
    assert packed.classes == ["cat", "dog"]
    order = rng.permutation(6, 0, 0).tolist()
    assert packed.keys == [source.keys[row] for row in order]
    assert source.labels is not None
    assert packed.labels is not None
    assert packed.labels.tolist() == [int(source.labels[row]) for row in order]
    assert (out.parent / "train.beton.classes.json").read_text().split() == [
        "[",
        '"cat",',
        '"dog"',
        "]",
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "train.beton",
        "train.beton.classes.json",
    ]
    jpegs = {"cat/rgb": "rgb.jpg", "cat/grey": "grey.JPEG", "dog/turned": "turned.jpg"}
    for i, row in enumerate(order):
        if (name := jpegs.get(packed.keys[i])) is not None:
            assert packed.read(i) == (folder / packed.keys[i].partition("/")[0] / name).read_bytes()
        pixels = [np.asarray(decode(data)) for data in (packed.read(i), source.read(row))]
        assert np.array_equal(*pixels)


def test_an_orientation_that_pixels_cannot_state_is_said(tmp_path: Path, run: Run) -> None:
    """A JPEG keeps its bytes, and with them its EXIF block; of a PNG the pixels are stored."""
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "in/a.jpg", (60, 20), 0, exif=turned)
    save(tmp_path / "in/b.png", (60, 20), 0, exif=turned)
    status, _, err = run(tmp_path / "in", tmp_path / "x.beton")
    assert status == 0
    assert "note: 1 picture is stored as pixels, without the EXIF orientation" in err


def test_the_same_pictures_give_the_same_bytes_in_an_order_of_the_seed(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 3)):
        assert run(folder, tmp_path / f"{name}.beton", "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / f"{name}.beton").read_bytes() for name in "abc")
    assert a == b != c
    keys = [open_source(tmp_path / f"{name}.beton").keys for name in "ac"]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_tars_go_in_and_come_out_again(folder: Path, tmp_path: Path, run: Run) -> None:
    """Folder -> tars -> .beton -> tars: keys, labels and pixels stay."""
    assert run(folder, tmp_path / "tars", "--shard-size", 4)[0] == 0
    assert run(tmp_path / "tars", tmp_path / "x.beton")[0] == 0
    assert run(tmp_path / "x.beton", tmp_path / "again", "--shard-size", 6)[0] == 0
    before, after = open_source(folder), open_source(tmp_path / "again")
    assert sorted(after.keys) == sorted(before.keys)
    assert before.labels is not None
    assert after.labels is not None
    for i, key in enumerate(after.keys):
        j = before.keys.index(key)
        assert after.labels[i] == before.labels[j]
        pixels = [np.asarray(decode(data)) for data in (after.read(i), before.read(j))]
        assert np.array_equal(*pixels)


def test_ffcvs_own_loader_reads_it(folder: Path, tmp_path: Path, run: Run) -> None:
    """Images, labels and keys, by FFCV's loader in a process of its own."""
    assert run(folder, tmp_path / "x.beton")[0] == 0
    code = """
import json, os, sys
from ffcv.fields.decoders import BytesDecoder, CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
for os_cache in (True, False):
    pipelines = {
        "image": [CenterCropRGBImageDecoder((20, 20), 1)],
        "label": [IntDecoder()],
        "key": [BytesDecoder()],
    }
    loader = Loader(
        sys.argv[1],
        6,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        pipelines=pipelines,
    )
    image, label, key = (x.copy() for x in next(iter(loader)))
    # FFCV leaves what it found behind a shorter one
    keys = [bytes(row[:7]).decode() for row in key]
    print(json.dumps([keys, label[:, 0].tolist(), image.mean((1, 2, 3)).tolist()]), flush=True)
os._exit(0)  # FFCV's threads may wait for one another at the end
"""
    ran = python(code, tmp_path / "x.beton")
    assert ran.returncode == 0, ran.stderr
    mapped, paged = ran.stdout.splitlines()
    assert mapped == paged
    source = open_source(tmp_path / "x.beton")
    assert source.labels is not None
    names, labels, means = json.loads(mapped)
    assert names == [key[:7] for key in source.keys]
    assert labels == source.labels.tolist()
    for i, mean in enumerate(means):
        pixels = np.asarray(decode(source.read(i))).astype(float)
        side, (height, width) = min(pixels.shape[:2]), pixels.shape[:2]
        top, left = (height - side) // 2, (width - side) // 2
        assert abs(pixels[top : top + side, left : left + side].mean() - mean) < 2


def test_pictures_larger_than_a_page_make_larger_pages(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's writer would hang: its workers die, and it waits. Pages of FFCV's least size here, 2
    MiB."""
    monkeypatch.setattr(pack_beton, "_PAGE_BYTES", 1 << 21)
    save(folder / "cat" / "large.png", (1000, 800), 6)  # 2.4 MB of pixels
    assert run(folder, tmp_path / "x.beton")[0] == 0
    source, packed = open_source(folder), open_source(tmp_path / "x.beton")
    i, j = packed.keys.index("cat/large"), source.keys.index("cat/large")
    assert np.array_equal(np.asarray(decode(packed.read(i))), np.asarray(decode(source.read(j))))


def test_many_pages(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that fill a page to its last byte and pictures that do not fit into the rest of
    one."""
    monkeypatch.setattr(pack_beton, "_PAGE_BYTES", 1 << 21)
    for i in range(6):
        Image.fromarray(np.full((512 - i, 512, 3), 40 * i, np.uint8)).save(
            folder / "dog" / f"m{i}.png"
        )
    assert run(folder, tmp_path / "x.beton")[0] == 0
    packed = open_source(tmp_path / "x.beton")
    for i in range(6):
        pixels = np.asarray(decode(packed.read(packed.keys.index(f"dog/m{i}"))))
        assert pixels.shape == (512 - i, 512, 3)
        assert (pixels == 40 * i).all()


def test_one_picture_without_a_class(tmp_path: Path, run: Run) -> None:
    save(tmp_path / "p" / "one.jpg", (20, 20), 0)
    assert run(tmp_path / "p", tmp_path / "x.beton")[1].endswith(
        "1 JPEGs as they are, 0 as pixels\n"
    )
    packed = open_source(tmp_path / "x.beton")
    assert (packed.keys, packed.labels) == (["one"], None)
    assert packed.read(0) == (tmp_path / "p" / "one.jpg").read_bytes()


def test_resized_pictures_are_those_of_the_tars(folder: Path, tmp_path: Path, run: Run) -> None:
    assert run(folder, tmp_path / "tars", "--shard-size", 10, "--resize", 16)[0] == 0
    assert run(folder, tmp_path / "x.beton", "--resize", 16)[0] == 0
    tars, packed = open_source(tmp_path / "tars"), open_source(tmp_path / "x.beton")
    for i, key in enumerate(packed.keys):
        pixels = [
            np.asarray(decode(data)) for data in (packed.read(i), tars.read(tars.keys.index(key)))
        ]
        assert min(pixels[0].shape[:2]) == 16
        assert np.array_equal(*pixels)


# ------------------------------------------------------------ what is refused


def test_a_picture_without_sizes_is_named_before_anything_is_written(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    (folder / "cat" / "lie.jpg").write_text("not a picture")
    status, _, said = run(folder, tmp_path / "x.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "packing 'cat/lie' of" in said
    assert "pack into tars" in said
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_broken_png_has_no_pixels_to_store(folder: Path, tmp_path: Path, run: Run) -> None:
    data = (folder / "dog" / "plain.png").read_bytes()
    (folder / "dog" / "plain.png").write_bytes(data[: len(data) // 2])
    status, _, said = run(folder, tmp_path / "x.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "packing 'dog/plain' of" in said
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_broken_jpeg_is_left_to_the_extraction_as_in_tars(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    data = (folder / "cat" / "rgb.jpg").read_bytes()
    (folder / "cat" / "rgb.jpg").write_bytes(data[: 3 * len(data) // 4])
    assert run(folder, tmp_path / "x.beton")[0] == 0
    for decoder in pixel_path.DECODERS:
        packed = pixel_path.open_with_decoder(tmp_path / "x.beton", decoder)
        with pytest.raises(PictureError):
            pixel_path.decode_picture(packed, packed.keys.index("cat/rgb"))


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (
            ["--shard-size", 4],
            2,
            "--shard-size 4: x.beton is one file without shards; leave --shard-size out",
        ),
        (
            ["--name", "train"],
            2,
            "--name train: x.beton is one file without shards; leave --name out",
        ),
        (["--resize", 0], 2, "--resize 0: the shorter side has 1 pixel or more"),
    ],
)
def test_options_of_tars_alone(
    folder: Path, tmp_path: Path, run: Run, options: list[object], status: int, words: str
) -> None:
    got, _, said = run(folder, tmp_path / "x.beton", *options)
    assert (got, said.count("\n")) == (status, 1)
    assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_nothing_is_overwritten(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "x.beton").write_text("mine")
    status, _, said = run(folder, tmp_path / "x.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "is there already and is never overwritten" in said
    (tmp_path / ".y.beton.packing").write_text("another run's")
    status, _, said = run(folder, tmp_path / "y.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "another run is at work or was killed" in said
    assert (tmp_path / "x.beton").read_text() == "mine"
    assert (tmp_path / ".y.beton.packing").read_text() == "another run's"


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = import_ffcv("memory_allocator").MemoryAllocator

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(allocator, "flush_page", full)
    status, _, said = run(folder, tmp_path / "x.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_short_write_is_found(
    folder: Path, tmp_path: Path, ffcv: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's writer does not look at how much was written: what is cut off gets no name."""
    writer = import_ffcv("writer").DatasetWriter
    finalize = writer.finalize

    def cut(self: object, allocations: list[object]) -> None:
        finalize(self, allocations[:-1])

    monkeypatch.setattr(writer, "finalize", cut)
    with pytest.raises(UserError, match="is cut off"):
        pack_beton.pack(open_source(folder), tmp_path / "x.beton", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_sides_that_ffcv_has_no_room_for(folder: Path, tmp_path: Path, run: Run) -> None:
    Image.new("L", (65536, 1)).save(folder / "cat" / "long.png")
    status, _, said = run(folder, tmp_path / "x.beton")
    assert (status, said.count("\n")) == (1, 1)
    assert "65536 x 1 pixels, FFCV stores sides of up to 65535" in said


def test_a_jpeg_in_memory_is_stored_with_the_size_of_its_own_header(
    ffcv: None, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (17, 9)).save(file, "JPEG")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "odd.png").write_bytes(file.getvalue())  # a JPEG under another suffix
    each = pack_beton.item(open_source(tmp_path / "p"), None, 0)
    assert each == (0, 9, 17, file.getvalue())
