"""Sources and the decoder: keys, order and labels from small folders and tars, every colour mode by
its own formula."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError
from featcache.pictures.tars import escape, unescape
from featcache.views import pixel_path
from tests.conftest import waves


def encoded(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


PNG = encoded(Image.fromarray(waves(6, 8)))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    return root


# ---------------------------------------------------------------- folders


def test_folder_keys_are_paths_without_the_last_suffix_in_order(tmp_path: Path) -> None:
    names = [
        "b/z.png",
        "a/1.tar.jpg",
        "a/UPPER.JPEG",
        "a/Größe/ö 1.png",
        "a/x.txt",
        "a/noend",
        "a/b.c.d.PNG",
    ]
    source = open_source(write_folder(tmp_path / "src", *names))
    # by code point
    assert list(source.keys) == ["a/1.tar", "a/Größe/ö 1", "a/UPPER", "a/b.c.d", "b/z"]
    assert len(source) == 5
    assert all(source.read(i) == PNG for i in range(5))


def test_class_folders_are_labels_by_sorted_name(tmp_path: Path) -> None:
    source = open_source(
        write_folder(tmp_path, "dog/1.png", "cat/1.png", "cat/deep/2.png", "ant/9.png")
    )
    assert source.classes == ["ant", "cat", "dog"]
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert dict(zip(source.keys, source.labels.tolist(), strict=True)) == {
        "ant/9": 0,
        "cat/1": 1,
        "cat/deep/2": 1,
        "dog/1": 2,
    }


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, "1.png", "cat/2.png"))
    assert source.labels is None
    assert source.classes is None


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["deep/er/notes.txt"]])
def test_a_folder_without_pictures_is_one_line(tmp_path: Path, names: list[str]) -> None:
    write_folder(tmp_path, *names)
    with pytest.raises(UserError, match=r"no pictures found.*folder of pictures.*\.tar"):
        open_source(tmp_path)


def test_what_does_not_exist_is_one_line(tmp_path: Path) -> None:
    for spec in (tmp_path / "nothing", tmp_path / "x-{00..03}.tar", tmp_path / "*.tar"):
        with pytest.raises(UserError, match=r"does not exist.*allowed is"):
            open_source(spec)


def test_an_open_brace_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        open_source(tmp_path / "x-{00..03.tar")


def test_a_picture_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(PNG)
    with pytest.raises(UserError, match=r"one\.png.*tar"):
        open_source(tmp_path / "one.png")


def test_what_is_allowed_names_every_kind(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a folder of pictures .* webdataset tars .* an FFCV \.beton"
    ):
        open_source(tmp_path / "x.png")


def test_a_folder_may_be_called_beton(tmp_path: Path) -> None:
    assert open_source(write_folder(tmp_path / "x.beton", "a.png")).keys == ["a"]


def test_ffcvs_decoder_is_for_its_files_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--decoder ffcv decodes what FFCV wrote, a \.beton"):
        pixel_path.open_with_decoder(write_folder(tmp_path, "a.png"), "ffcv")


def test_double_keys_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'a/one' is used by two"):
        open_source(write_folder(tmp_path, "a/one.png", "a/one.jpg", "a/two.png"))


def test_a_file_name_that_is_no_text_is_a_users_mistake(tmp_path: Path) -> None:
    """A key must be text to be hashed and stored: such a file is told of when the source is opened,
    not by a traceback in the middle of the work."""
    (tmp_path / "good.png").write_bytes(PNG)
    with open(bytes(tmp_path) + b"/bad\xff.png", "wb") as file:  # noqa: PTH123 (a name in bytes)
        file.write(PNG)
    with pytest.raises(UserError):
        open_source(tmp_path)


# ---------------------------------------------------------------- tars


def test_tar_keys_members_and_labels(tmp_path: Path) -> None:
    members = {
        "./n01/a.png": PNG,
        "n01/a.cls": b"7\n",
        "n02/b.JPG": encoded(Image.fromarray(waves(5, 5)), "jpeg"),
        "n02/b.cls": b" 0",
        "n02/b.json": b"{}",
    }
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert list(source.keys) == ["n01/a", "n02/b"]
    assert source.read(0) == PNG
    assert source.read(1) == members["n02/b.JPG"]
    assert source.labels is not None
    assert source.labels.tolist() == [7, 0]
    assert source.labels.dtype == np.int64


def test_dots_of_a_file_name_survive_the_tar(tmp_path: Path) -> None:
    """webdataset ends a key at the first dot; escaped, the key is the folder's."""
    stem = escape("v1.2/a.b%c.d")
    assert stem == "v1.2/a%2Eb%25c%2Ed"
    source = open_source(write_tar(tmp_path / "t.tar", {f"{stem}.png": PNG}))
    assert list(source.keys) == ["v1.2/a.b%c.d"]


@given(key=st.text(min_size=1, max_size=30))
def test_escape_has_an_inverse_and_no_dot_in_the_name(key: str) -> None:
    stem = escape(key)
    assert unescape(stem) == key
    assert "." not in stem.rpartition("/")[2]


def test_long_and_unicode_names(tmp_path: Path) -> None:
    keys = ["ü" * 60 + "/" + "x" * 150, "日本/写真"]
    source = open_source(write_tar(tmp_path / "t.tar", {f"{key}.png": PNG for key in keys}))
    assert list(source.keys) == keys
    assert source.read(1) == PNG


@pytest.mark.parametrize("pattern", ["s-{000..002}.tar", "s-*.tar", "s-00{0..1}.tar,s-002", ""])
def test_patterns_give_the_tars_in_order(tmp_path: Path, pattern: str) -> None:
    for i in range(3):
        write_tar(
            tmp_path / f"s-00{i}.tar", {f"k{i}{j}.png": PNG + bytes([i, j]) for j in range(2)}
        )
    if pattern.endswith("002"):
        pattern = "s-00{0,1,2}.tar"
    source = open_source(f"{tmp_path}/{pattern}" if pattern else str(tmp_path))
    assert list(source.keys) == ["k00", "k01", "k10", "k11", "k20", "k21"]
    assert source.read(3) == PNG + bytes([1, 1])
    assert source.labels is None


def test_missing_tar_of_a_brace_pattern_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"a.png": PNG})
    with pytest.raises(UserError, match=r"s-1\.tar"):
        open_source(f"{tmp_path}/s-{{0..1}}.tar")


def test_double_keys_across_tars_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"s-{i}.tar", {"same.png": PNG})
    with pytest.raises(UserError, match="'same' is used by two"):
        open_source(f"{tmp_path}/s-*.tar")


def test_tar_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures found"):
        open_source(write_tar(tmp_path / "t.tar", {"a.txt": b"x"}))
    with pytest.raises(UserError, match="no pictures found"):
        open_source(write_tar(tmp_path / "empty.tar", {}))


@pytest.mark.parametrize("where", ["data", "header", "boundary"])
def test_a_cut_off_tar_is_refused(tmp_path: Path, where: str) -> None:
    """Cut in a member's bytes, in a header, and where a member would begin: never fewer pictures in
    silence."""
    path = write_tar(tmp_path / "t.tar", {f"k{i}.png": PNG + bytes(2000) for i in range(4)})
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    at = {"data": third.offset_data + 700, "header": third.offset + 200, "boundary": third.offset}[
        where
    ]
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(UserError, match=r"t\.tar"):
        open_source(path)


@pytest.mark.parametrize(
    "data", [b"", b"hello", bytes(range(256)) * 40, zlib.compress(bytes(20480))]
)
def test_what_is_no_tar_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    with pytest.raises(UserError):
        open_source(path)


def test_missing_and_bad_labels_are_named(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.cls": b"1", "b.png": PNG}))
    with pytest.raises(UserError, match=r"1 of 2 pictures have no \.cls.*'b'"):
        _ = source.labels
    source = open_source(write_tar(tmp_path / "b.tar", {"a.png": PNG, "a.cls": b"cat"}))
    with pytest.raises(UserError, match="'cat'"):
        _ = source.labels


# ---------------------------------------------------------------- decoding


def rgb(data: bytes) -> np.ndarray:
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


GREY = waves(9, 7)[..., 0]
COLOUR = waves(9, 7, 2.0)


def test_rgb_is_as_it_is() -> None:
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(COLOUR))), COLOUR)


def test_grey_is_repeated() -> None:
    np.testing.assert_array_equal(
        rgb(encoded(Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, -1)
    )


def test_one_bit_is_black_and_white() -> None:
    bits = GREY > 128
    np.testing.assert_array_equal(
        rgb(encoded(Image.fromarray(bits))), np.repeat(bits[..., None] * 255, 3, -1)
    )


def test_alpha_is_dropped_not_blended() -> None:
    alpha = Image.fromarray(GREY[::-1].copy())
    la = Image.merge("LA", (Image.fromarray(GREY), alpha))
    np.testing.assert_array_equal(rgb(encoded(la)), np.repeat(GREY[..., None], 3, -1))
    rgba = Image.merge("RGBA", (*Image.fromarray(COLOUR).split(), alpha))
    np.testing.assert_array_equal(rgb(encoded(rgba)), COLOUR)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palettes_are_looked_up(transparency: int | bytes | None) -> None:
    """A palette picture with a transparent colour, or with an alpha for each, shows its colours
    like any other; what comes out must not depend on the process's warning filters (Pillow warns of
    the last kind)."""
    index = (np.arange(63).reshape(9, 7) % 3).astype(np.uint8)
    palette = np.array([[10, 20, 30], [200, 100, 0], [5, 250, 125]], np.uint8)
    picture = Image.new("P", (7, 9))
    picture.frombytes(index.tobytes())
    picture.putpalette(palette.reshape(-1).tolist())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(rgb(encoded(picture, **options)), palette[index])


def test_cmyk_is_multiplied_out() -> None:
    """R = (255 - C)(255 - K) / 255, to a level of rounding."""
    cmyk = np.stack([waves(9, 7, p)[..., 0] for p in range(4)], -1)
    picture = rgb(
        encoded(Image.merge("CMYK", [Image.fromarray(cmyk[..., c]) for c in range(4)]), "tiff")
    )
    rest = 255 - cmyk.astype(np.float64)
    expected = rest[..., :3] * rest[..., 3:] / 255
    assert np.abs(picture - expected).max() <= 1


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    deep = (np.arange(63).reshape(9, 7) * 1040).astype(np.uint16)
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, -1)
    for kind in ("png", "tiff"):
        np.testing.assert_array_equal(rgb(encoded(Image.fromarray(deep), kind)), expected)


def test_modes_without_a_range_are_refused() -> None:
    with pytest.raises(PictureError, match="no fixed range"):
        decode(encoded(Image.fromarray(GREY.astype(np.float32)), "tiff"))
    with pytest.raises(PictureError, match="integer pixels"):
        decode(encoded(Image.fromarray(np.full((3, 3), 70000, np.int32)), "tiff"))


def test_exif_orientation_is_ignored() -> None:
    """As torchvision's ImageFolder: the stored raster is the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpeg", "png"):
        plain = rgb(encoded(Image.fromarray(waves(20, 30)), kind))
        turned = rgb(encoded(Image.fromarray(waves(20, 30)), kind, exif=exif))
        assert turned.shape == (20, 30, 3)
        np.testing.assert_array_equal(turned, plain)


def test_jpegs_are_decoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft mode: it would let libjpeg shrink by whole factors, and the pixels would be
    others."""
    from PIL.JpegImagePlugin import JpegImageFile

    def draft(self: object, *args: object) -> None:
        raise AssertionError("draft mode was used")

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    assert decode(encoded(Image.fromarray(waves(64, 48)), "jpeg")).size == (48, 64)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff"])
def test_truncated_pictures_are_picture_errors(kind: str) -> None:
    data = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), kind
    )
    for keep in (len(data) // 2, 20, 3, 0):
        with pytest.raises(PictureError) as caught:
            decode(data[:keep])
        assert str(caught.value)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # an address would make two runs' reports differ


@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_picture_or_a_picture_error(data: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"P6 3 3 255\n"):
        try:
            picture = decode(start + data)
        except PictureError:
            continue
        assert picture.mode == "RGB"


def test_photos_of_every_mode_decode(photos: Path) -> None:
    source = open_source(photos)
    assert len(source) == 11
    assert {decode(source.read(i)).mode for i in range(11)} == {"RGB"}
