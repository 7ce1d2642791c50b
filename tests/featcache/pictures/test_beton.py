"""Files of FFCV's own writer: their bytes, keys and labels; and every way in which a file is
none."""

from __future__ import annotations

import pickle
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import UserError
from featcache.pictures import beton
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError, Source
from tests.conftest import python
from tests.ffcv_files import COUNT, photo


def decoded(source: Source, index: int) -> np.ndarray:
    return np.asarray(decode(source.read(index)))


# ------------------------------------------------------------ what it reads


def test_pictures_stored_as_pixels_keep_every_pixel(ffcv_files: Path) -> None:
    source = open_source(ffcv_files / "raw.beton")
    assert len(source) == COUNT
    assert source.keys == ["a/b0", "a/b1", "a/b2", "a/b3", "a/b4"]
    assert source.labels is not None
    assert source.labels.tolist() == [7, 6, 5, 4, 3]
    assert source.classes is None
    for i in range(COUNT):
        assert np.array_equal(decoded(source, i), photo(i))


def test_jpegs_come_as_the_bytes_that_ffcv_wrote(ffcv_files: Path) -> None:
    """The same encoder on the same picture, called here: OpenCV's at quality 85, which takes
    BGR."""
    import cv2

    source = open_source(ffcv_files / "jpg.beton")
    assert source.keys == [f"a/ä{i}" for i in range(COUNT)]  # a JSONField
    assert source.labels is None
    for i in range(COUNT):
        wanted = cv2.imencode(".jpg", photo(i)[..., ::-1], [int(cv2.IMWRITE_JPEG_QUALITY), 85])[
            1
        ].tobytes()
        assert source.read(i) == wanted


def test_without_keys_a_picture_is_its_files_digest_and_its_number(
    ffcv_files: Path, tmp_path: Path
) -> None:
    """A copy has the same keys; a file with the same tables and other pixels has others."""
    keys = list(open_source(ffcv_files / "nokey.beton").keys)
    digests = {key.partition("/")[0] for key in keys}
    assert len(digests) == 1
    assert len(digests.pop()) == 16
    assert [key.partition("/")[2] for key in keys] == [
        "00000000",
        "00000001",
        "00000002",
        "00000003",
        "00000004",
    ]
    copy = shutil.copy(ffcv_files / "nokey.beton", tmp_path / "elsewhere.beton")
    assert open_source(copy).keys == keys
    assert not set(open_source(ffcv_files / "otherkey.beton").keys) & set(keys)


def test_a_source_goes_to_other_processes(ffcv_files: Path) -> None:
    source = open_source(ffcv_files / "raw.beton")
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)


# ------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("noimage", "0 of its fields label, key are RGBImageFields"),
        ("twoimages", "2 of its fields one, two, key are RGBImageFields"),
        ("intkey", "field key is IntField, BytesField or JSONField is allowed"),
        ("double", "the key 'k0' is used by two pictures, 'picture [0-9]+' and 'picture"),
        ("own", "custom field x"),
        ("emptykey", "the key of picture 3 is empty"),
    ],
)
def test_fields_that_cannot_be_used(ffcv_files: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_source(ffcv_files / f"{name}.beton")
    assert f"{name}.beton" in str(caught.value)


def test_labels_below_zero_are_refused_where_they_are_asked_for(ffcv_files: Path) -> None:
    source = open_source(ffcv_files / "negative.beton")
    with pytest.raises(UserError, match=r"-4 is given, numbers from 0 on are allowed"):
        _ = source.labels


def test_a_label_beyond_the_names_beside_the_file_is_refused(
    ffcv_files: Path, tmp_path: Path
) -> None:
    shutil.copy(ffcv_files / "raw.beton", tmp_path)
    source = open_source(tmp_path / "raw.beton")
    (tmp_path / "raw.beton.classes.json").write_text('["ant", "bee"]')
    with pytest.raises(UserError, match=r"its classes\.json has 2 names"):
        _ = source.labels


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.3, 0.7, 0.999999])
def test_a_file_that_is_cut_off_anywhere(ffcv_files: Path, tmp_path: Path, share: float) -> None:
    data = (ffcv_files / "raw.beton").read_bytes()
    (tmp_path / "cut.beton").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cut\.beton' (is cut off|is no FFCV file|cannot be read)"):
        open_source(tmp_path / "cut.beton")


def test_every_length_short_of_the_table_of_allocations(ffcv_files: Path, tmp_path: Path) -> None:
    """Whole rows of the table may lack too: a picture without a place is found by its absence. (The
    last row is of a key, whose place and size its picture's row states as well.)"""
    data = (ffcv_files / "raw.beton").read_bytes()
    for lacking in (1, 8, 23, 48, 10 * 24):  # five pictures and five keys
        (tmp_path / "cut.beton").write_bytes(data[:-lacking])
        with pytest.raises(UserError, match="is cut off, or its writer was stopped"):
            open_source(tmp_path / "cut.beton")


def test_a_file_whose_writer_was_stopped(ffcv_files: Path, tmp_path: Path) -> None:
    """FFCV writes the header last: until then it says that the table of allocations begins at 0."""
    data = bytearray((ffcv_files / "raw.beton").read_bytes())
    data[16:24] = bytes(8)
    (tmp_path / "half.beton").write_bytes(data)
    with pytest.raises(UserError, match="its writer was stopped"):
        open_source(tmp_path / "half.beton")


def test_other_files_under_this_name(ffcv: None, tmp_path: Path) -> None:
    Image.new("RGB", (300, 300)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.beton")
    with pytest.raises(UserError, match="is no FFCV file of version 2"):
        open_source(tmp_path / "x.beton")
    (tmp_path / "noise.beton").write_bytes(b"\x02\0\x01\0" + np.random.default_rng(0).bytes(5000))
    with pytest.raises(UserError, match="noise"):
        open_source(tmp_path / "noise.beton")


def test_damaged_sizes_are_told_by_the_number_of_the_picture(
    ffcv_files: Path, tmp_path: Path
) -> None:
    source = open_source(ffcv_files / "nokey.beton")
    data = bytearray((ffcv_files / "nokey.beton").read_bytes())
    place = data.index(np.array([44, 36], "<u2").tobytes())  # width, height of picture 2 in its row
    assert source.sizes[2].tolist() == [36, 44]  # type: ignore[attr-defined]
    data[place : place + 2] = np.array([45], "<u2").tobytes()
    (tmp_path / "bad.beton").write_bytes(data)
    with pytest.raises(
        UserError, match=r"picture 2 of .*: mode 1, 36 x 45 pixels and 4752 bytes do not agree"
    ):
        open_source(tmp_path / "bad.beton")


def test_a_file_that_shrinks_later_is_an_error_of_the_disk(
    ffcv_files: Path, tmp_path: Path
) -> None:
    path = shutil.copy(ffcv_files / "raw.beton", tmp_path / "x.beton")
    source = open_source(path)
    with open(path, "r+b") as file:  # noqa: PTH123
        file.truncate(1000)
    with pytest.raises(OSError, match="ends within it"):
        source.read(0)


def forged(source: Path, target: Path, changes: dict[int, bytes]) -> Path:
    """A copy of a file with other bytes at some places."""
    data = bytearray(source.read_bytes())
    for place, value in changes.items():
        data[place : place + len(value)] = value
    target.write_bytes(data)
    return target


def u8(value: int) -> bytes:
    return value.to_bytes(8, "little")


def rows_at(path: Path, fields: int) -> int:
    """Where the rows of samples begin: after a header of 24 bytes and descriptors of 1041."""
    assert int.from_bytes(path.read_bytes()[2:4], "little") == fields
    return 24 + fields * 1041


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_a_forged_number_of_samples_makes_no_room(
    ffcv_files: Path, tmp_path: Path, count: int
) -> None:
    bad = forged(ffcv_files / "raw.beton", tmp_path / "x.beton", {8: u8(count)})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.beton' is cut off"):
        open_source(bad)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("place", [1 << 40, 1 << 63, (1 << 64) - 100])
def test_forged_places_are_one_line(ffcv_files: Path, tmp_path: Path, place: int) -> None:
    """Of a picture, in its row and in the table of allocations; of a key, in its row."""
    whole = ffcv_files / "nokey.beton"
    row = rows_at(whole, 2)
    data = whole.read_bytes()
    old = data[row + 5 : row + 13]  # mode u1, width u2, height u2, place u8
    table = data.rindex(old)
    changes = {row + 5: u8(place), table: u8(place)}
    with pytest.raises(UserError, match=r"x\.beton' is cut off"):
        open_source(forged(whole, tmp_path / "x.beton", changes))
    whole = ffcv_files / "raw.beton"
    source = open_source(whole)
    row = rows_at(whole, 3)
    key = whole.read_bytes().index(b"a/b0")
    at = whole.read_bytes().index(u8(key), row)
    assert source.keys[0] == "a/b0"
    with pytest.raises(UserError, match=r"x\.beton' is cut off"):
        open_source(forged(whole, tmp_path / "x.beton", {at: u8(place)}))
    with pytest.raises(UserError, match=r"x\.beton' is cut off"):
        open_source(forged(whole, tmp_path / "x.beton", {at + 8: u8(place)}))


def test_keys_that_are_all_the_whole_file_are_refused(ffcv_files: Path, tmp_path: Path) -> None:
    whole = ffcv_files / "raw.beton"
    data, row, changes = whole.read_bytes(), rows_at(whole, 3), {}
    for i in range(COUNT):
        at = data.index(u8(data.index(f"a/b{i}".encode())), row)
        changes |= {at: u8(0), at + 8: u8(len(data))}
    with pytest.raises(UserError, match=r"keys of .* are longer than the file"):
        open_source(forged(whole, tmp_path / "x.beton", changes))


def test_a_size_that_the_table_forges_is_one_line(ffcv_files: Path, tmp_path: Path) -> None:
    whole = ffcv_files / "nokey.beton"
    data, row = whole.read_bytes(), rows_at(whole, 2)
    table = data.rindex(data[row + 5 : row + 13])
    for size in (1 << 40, (1 << 64) - 1):
        with pytest.raises(UserError, match=r"x\.beton' is cut off"):
            open_source(forged(whole, tmp_path / "x.beton", {table + 8: u8(size)}))


@given(place=st.integers(0, 24 + 3 * 1041 + 300), value=st.integers(0, 255))
def test_any_changed_byte_of_the_tables_gives_a_source_or_one_line(
    ffcv_files: Path, place: int, value: int
) -> None:
    bad = forged(ffcv_files / "raw.beton", ffcv_files / "changed.beton", {place: bytes([value])})
    try:
        source = open_source(bad)
        for i in range(len(source)):
            source.read(i)
    except (UserError, PictureError) as error:
        text = str(error)
    else:
        text = ""
    assert "\n" not in text


def test_two_fields_of_one_name_are_refused(ffcv_files: Path, tmp_path: Path) -> None:
    whole = ffcv_files / "raw.beton"
    second = 24 + 1041 + 1  # the name of the second field
    changes = {second: b"image".ljust(16, b"\0")}
    with pytest.raises(UserError, match="two fields of one name"):
        open_source(forged(whole, tmp_path / "x.beton", changes))


# ------------------------------------------------------------ without FFCV, and beside it


def test_no_such_file_is_told_before_ffcv_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.types", None)
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "x.beton")


def test_without_ffcv_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featcache_command: object
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.types", None)
    (tmp_path / "x.beton").write_bytes(bytes(5000))
    assert callable(featcache_command)
    ran = featcache_command("extract", "--teacher", "synthetic", "--images", tmp_path / "x.beton")
    assert ran.status == 1
    assert "libopencv-dev libturbojpeg0-dev pkg-config" in ran.error
    assert "then pip install ffcv" in ran.error


def test_ffcv_is_imported_for_betons_alone_and_leaves_torchs_threads(
    ffcv_files: Path, photos: Path
) -> None:
    code = (
        "import sys, torch\nfrom featcache.pictures.open_source import open_source\n"
        "from featcache.views.pixel_path import open_with_decoder\ntorch.set_num_threads(3)\n"
        "open_source(sys.argv[1])\nassert 'ffcv' not in sys.modules\n"
        "open_with_decoder(sys.argv[2], 'ffcv')\nassert 'ffcv' in sys.modules\n"
        "assert torch.get_num_threads() == 3, torch.get_num_threads()\n"
    )
    ran = python(code, photos, ffcv_files / "raw.beton")
    assert ran.returncode == 0, ran.stderr


def test_install_line_is_that_of_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs/guides/ffcv.md").read_text()
    assert beton.INSTALL.partition(",")[0] in page
    assert beton.INSTALL.endswith("pip install ffcv")
    assert "pip install ffcv" in page
