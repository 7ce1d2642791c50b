"""Specs with parts, labels from tables and prefixes, tars of tars, and members that are chosen."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.pictures.open_source import is_beton, open_source
from featcache.pictures.passed_over import passed_over
from featcache.pictures.source import Source
from featcache.pictures.spec import parse_spec
from featcache.pictures.tar_samples import whole_key
from tests.featcache.pictures.test_open_source import PNG, encoded, write_folder, write_tar

PHOTO = encoded(Image.fromarray(data.astronaut()[:40, :50]), "jpeg")


def labels_of(source: Source) -> dict[str, str]:
    assert source.labels is not None
    assert source.classes is not None
    return {k: source.classes[i] for k, i in zip(source.keys, source.labels.tolist(), strict=True)}


def tar_bytes(members: dict[str, bytes], place: Path) -> bytes:
    return write_tar(place, members).read_bytes()


def outer_tar(tmp_path: Path, **inner: dict[str, bytes]) -> Path:
    parts = {f"{name}.tar": tar_bytes(found, tmp_path / "i") for name, found in inner.items()}
    return write_tar(tmp_path / "outer.tar", parts)


# ---------------------------------------------------------------- specs


def test_parts_are_read_and_what_exists_is_taken_as_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "x#labels=prefix", "a_1.png")
    assert open_source(tmp_path / "x#labels=prefix").labels is None
    write_folder(tmp_path / "y", "a_1.png", "b_1.png")
    source = open_source(f"{tmp_path}/y#labels=prefix")
    assert labels_of(source) == {"a_1": "a", "b_1": "b"}
    assert open_source(source.spec).spec == source.spec
    assert is_beton("set.beton#labels=prefix")


def test_parts_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    folder, tar = (
        write_folder(tmp_path / "y", "a.png"),
        write_tar(tmp_path / "t.tar", {"a.png": PNG}),
    )
    for spec, words in (
        (f"{folder}#lables=prefix", "#lables= is no part of a spec"),
        (f"{folder}#labels=", "#labels= is empty"),
        (f"{folder}#labels=a.csv#labels=b.csv", "#labels= is given twice"),
        (f"{folder}#separator=_", "#labels=prefix, which is not given"),
        (f"{folder}#labels=prefix#label-column=x", "leave one out"),
        (f"{folder}#label-column=x", "no #labels=FILE.csv is given"),
        (f"{folder}#image-member=png", "for a folder"),
        (f"{tar}#image-column=png", "for tars"),
        (f"{tmp_path}/z.beton#labels=prefix", "for a .beton no part is allowed"),
    ):
        with pytest.raises(UsageError) as error:
            open_source(spec)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_table_is_named_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_spec("a#labels=../b.csv").labels == str(tmp_path.parent / "b.csv")


# ---------------------------------------------------------------- labels


def test_labels_of_tables(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "val", "ILSVRC_01.png", "ILSVRC_02.png", "d/03.png")
    wanted = {"ILSVRC_01": "n2", "ILSVRC_02": "n1", "d/03": "n2"}
    boxes = "ImageId,PredictionString\nILSVRC_02,n1 1 2 3 4\nILSVRC_01,n2 5 6 7 8 n2 1 1 2 2\n"
    for name, text in {
        "kaggle.csv": boxes + "d/03,n2 1 1 1 1\n",
        "plain.csv": "ILSVRC_01.png,n2\nILSVRC_02.png,n1\nd/03,n2\n",
        "bom.csv": "\ufefffile_name,x,label\r\nILSVRC_01.png,1,n2\r\nILSVRC_02,2,n1\r\nd/03,3,n2",
        "any.csv": "who,what\nILSVRC_01,n2\nILSVRC_02,n1\n./d/03.png,n2\n#label-column=what",
        "tabs.tsv": 'label\tkey\nn2\t"ILSVRC_01"\nn1\tILSVRC_02\n\nn2\td/03\n',
        "caffe.txt": "ILSVRC_01.png n2\nILSVRC_02.png n1\nd/03.png n2\n",
    }.items():
        text, _, column = text.partition("#")
        (tmp_path / name).write_bytes(text.encode())
        spec = f"{folder}#labels={tmp_path / name}" + (f"#{column}" if column else "")
        source = open_source(spec)
        assert labels_of(source) == wanted, name
        assert passed_over(source) == ()


def test_numbers_are_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "val", "a.png", "b.png", "c.png")
    (tmp_path / "t.csv").write_text("a,10\nb,2\nc,0\nd,7\n")
    source = open_source(f"{folder}#labels={tmp_path}/t.csv")
    assert source.classes == ["0", "2", "10"]
    assert labels_of(source) == {"a": "10", "b": "2", "c": "0"}
    assert [str(row) for row in passed_over(source)] == [
        "rows of labels without a picture (1, the first is 'd')"
    ]


def test_tables_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    folder, table = write_folder(tmp_path / "val", "a.png", "b.png"), tmp_path / "t.csv"
    for text, words in (
        ("a,1\n", "1 of 2 pictures have no row"),
        ("a,1\na.png,1\nb,1\n", "1 picture stands in it twice, the first are 'a.png'"),
        ("a,1,2\nb,1,2\n", "its first row has 3 columns"),
        ("key,w,x\na,1,2\n", "its header has no column of labels"),
        ("key,label\na,\n", "line 2 has no label"),
        ("key,label\na\n", "line 2 has 1 column"),
        ("", "it has no rows"),
        ('a,"1\n', "line 1: unexpected end of data"),
        (b"\xff\xfea,1", "it cannot be read as text"),
        ("a," + "x" * 200_000, "field larger than field limit"),
    ):
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError) as error:
            open_source(f"{folder}#labels={table}")
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    table.write_text("key,label\na,1\nb,1\n")
    with pytest.raises(UserError, match="header has no column 'z'"):
        open_source(f"{folder}#labels={table}#label-column=z")
    with pytest.raises(UserError, match="it is no regular file"):
        open_source(f"{folder}#labels=/dev/zero")


def test_prefixes_of_keys(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", "cats_x/1.png", "dogs_y/2_0.png")
    assert labels_of(open_source(f"{folder}#labels=prefix")) == {
        "cats_x/1": "cats_x",
        "dogs_y/2_0": "dogs_y",
    }
    write_folder(tmp_path / "b", "n01_1.png", "sub/n02_7.png", "n01_2-3.png")
    source = open_source(f"{tmp_path}/b#labels=prefix")
    assert labels_of(source) == {"n01_1": "n01", "n01_2-3": "n01", "sub/n02_7": "n02"}
    with pytest.raises(
        UserError, match="2 of 3 keys have nothing before a '-', the first are 'n01_1'"
    ):
        open_source(f"{tmp_path}/b#labels=prefix#separator=-")


# ---------------------------------------------------------------- tars


def test_a_tar_of_tars_is_the_folder_that_it_is_unpacked_to(tmp_path: Path) -> None:
    pixels = {"chelsea": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}
    photos = {
        name: encoded(Image.fromarray(each[::8, ::8]), "jpeg") for name, each in pixels.items()
    }
    long = "n1_" + "x" * 150  # in a GNU header of its own
    outer = outer_tar(
        tmp_path,
        n02={"n02_1.JPEG": photos["chelsea"], "n02_10.JPEG": photos["coffee"]},
        n01={f"{long}.JPEG": photos["rocket"], "n01_readme.txt": b""},
    )
    with tarfile.open(outer) as tar:
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                inner.extractall(tmp_path / "out" / member.name[:-4], filter="data")
    source, folder = open_source(outer), open_source(tmp_path / "out")
    assert source.keys == ["n02/n02_1", "n02/n02_10", f"n01/{long}"]
    assert sorted(source.keys) == folder.keys
    assert labels_of(source) == labels_of(folder)
    assert source.classes == ["n01", "n02"]
    for row, key in enumerate(source.keys):
        assert source.read(row) == folder.read(folder.keys.index(key))
    assert np.array_equal(decode(source.read(0)), Image.open(io.BytesIO(photos["chelsea"])))


def test_labels_in_inner_tars_come_first(tmp_path: Path) -> None:
    outer = outer_tar(tmp_path, a={"x.png": PNG, "x.cls": b"7"}, b={"y.png": PNG, "y.cls": b"3"})
    source = open_source(outer)
    assert source.keys == ["a/x", "b/y"]
    assert source.classes is None
    assert source.labels is not None
    assert source.labels.tolist() == [7, 3]


def test_an_inner_tar_sees_nothing_beyond_its_end(tmp_path: Path) -> None:
    inner = tar_bytes({"x.png": PNG * 40}, tmp_path / "i")
    for cut, words in (
        (inner[: 512 + 100], "unexpected end of data"),
        (inner[:512] + inner[:400], "unexpected end of data"),
        (b"\x1f\x8b" + bytes(1022), "gzip-compressed"),
        (b"", "empty file"),
        (inner[: 512 + -(-len(PNG * 40) // 512) * 512], "cut off"),
    ):
        outer = write_tar(tmp_path / "o.tar", {"n1.tar": cut, "n2.tar": inner})
        with pytest.raises(UserError) as error:
            open_source(outer)
        assert "o.tar/n1.tar" in str(error.value), cut[:20]
        assert words in str(error.value), (words, error.value)
        assert "\n" not in str(error.value)


def test_inner_tars_that_are_links_or_lead_out_are_refused(tmp_path: Path) -> None:
    inner = tar_bytes({"x.png": PNG}, tmp_path / "i")
    outer = write_tar(tmp_path / "o.tar", {"n1.tar": inner})
    with tarfile.open(outer, "a") as tar:
        link = tarfile.TarInfo("n2.tar")
        link.type, link.linkname = tarfile.LNKTYPE, "n1.tar"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"its inner tar 'n2\.tar' links to another"):
        open_source(outer)
    with pytest.raises(UserError, match="leads out of its folder"):
        open_source(write_tar(outer, {"../n1.tar": inner}))
    with pytest.raises(UserError, match=r"used by two pictures, .*n1\.tar/x\.png.*n1\.tar/x\.png"):
        open_source(write_tar(outer, {"n1.tar": inner, "./n1.tar": inner}))
    source = open_source(
        write_tar(outer, {"n1.tar": inner, "._n1.tar": b"", "n2.tar": bytes(1024)})
    )
    assert source.keys == ["n1/x"]
    assert [row.reason for row in passed_over(source)] == ["hidden tars in a tar"]


def test_the_member_that_is_the_picture_is_chosen(tmp_path: Path) -> None:
    members = {"a.jpg": PHOTO, "a.seg.png": PNG, "a.cls": b"1", "b.seg.png": PNG, "b.0.jpg": PHOTO}
    tar = write_tar(tmp_path / "t.tar", {**members, "b.cls": b"0", "c.jpg": PHOTO, "c.cls": b"0"})
    source = open_source(f"{tar}#image-member=seg.png")
    assert list(source.keys) == ["a", "b"]
    assert source.read(0) == PNG
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0]
    assert [str(row) for row in passed_over(source)] == [
        "samples without the member that #image-member= names (1, the first is 'c.jpg')"
    ]
    assert open_source(f"{tar}#image-member=0.jpg").read(0) == PHOTO
    with pytest.raises(UserError, match=r"1 tar holds none with a member KEY\.exr"):
        open_source(f"{tar}#image-member=exr")
    assert "#image-member=" in str(
        passed_over(open_source(write_tar(tar, {**members, "d.png": PNG})))
    )


def test_equal_stems_are_refused_by_both_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", "a/1.jpg", "a/1.png", "b.png")
    with pytest.raises(
        UserError, match=r"'a/1' is used by two pictures, 'a/1\.jpg' and 'a/1\.png'"
    ):
        open_source(tmp_path / "f")
    write_folder(tmp_path / "f", "a/1.webp", "b.jpg")
    with pytest.raises(UserError, match=r"png' \(and 2 more pictures have the key of another\); a"):
        open_source(tmp_path / "f")
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(UserError, match=r"t\.tar/a/1\.jpg' and .*t\.tar/a/1\.png'"):
        open_source(write_tar(tmp_path / "t.tar", {"a/1.jpg": PNG, "a/1.png": PNG}))
    assert whole_key("a/1.png") == "a/1"
    for name in ("u", "v"):
        write_tar(tmp_path / f"{name}.tar", {"b.png": PNG, f"only {name}.png": PNG})
    with pytest.raises(UserError, match=r"'b' is used by .*u\.tar/b\.png' and .*v\.tar/b\.png'"):
        open_source(f"{tmp_path}/[uv].tar")
