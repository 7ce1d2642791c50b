"""Pictures of parquet files: those that `datasets` wrote, pixel by pixel, and files that lie."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from featcache.errors import UsageError, UserError
from featcache.pictures import parquet_groups
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError
from featcache.pictures.stamps import stamp

COUNT = 230
NAMES = [f"digit {i}" for i in range(10)]


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def digits() -> tuple[list[Any], list[int]]:
    found = load_digits()
    return [(each * 15).astype(np.uint8) for each in found.images[:COUNT]], found.target.tolist()


@pytest.fixture(scope="module")
def folder(digits: tuple[list[Any], list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files as `datasets` writes them, in row groups of 50."""
    root, (pixels, labels) = tmp_path_factory.mktemp("parquet"), digits
    features = datasets.Features(
        {"picture": datasets.Image(), "digit": datasets.ClassLabel(names=NAMES)}
    )
    for number, rows in enumerate([slice(0, 130), slice(130, COUNT)]):
        pictures = [Image.fromarray(each) for each in pixels[rows]]
        given = {"picture": pictures, "digit": labels[:COUNT][rows]}
        written = datasets.Dataset.from_dict(given, features=features)
        written.to_parquet(root / f"train-{number}.parquet", batch_size=50)
    return root


def write(path: Path, rows: list[Any], column: str = "image", **others: list[Any]) -> Path:
    pq.write_table(pa.table({column: rows, **others}), path, row_group_size=3)
    return path


def named(*names: str) -> list[dict[str, Any]]:
    return [{"bytes": png(np.full((2, 3), i, np.uint8)), "path": n} for i, n in enumerate(names)]


def test_pixels_labels_and_classes_are_those_that_datasets_wrote(
    folder: Path, digits: tuple[list[Any], list[int]]
) -> None:
    source, (pixels, labels) = open_source(folder), digits
    assert pq.ParquetFile(folder / "train-0.parquet").num_row_groups == 3
    assert len(source) == COUNT
    assert source.keys[0] == "train-0/00000000"
    assert source.keys[129:131] == ["train-0/00000129", "train-1/00000000"]
    assert source.classes == NAMES
    assert source.labels is not None
    assert source.labels.tolist() == labels[:COUNT]
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    with ThreadPoolExecutor(4) as pool:  # any order, from several threads
        for row, data in zip(order, pool.map(source.read, order), strict=True):
            assert np.array_equal(np.asarray(decode(data))[..., 0], pixels[row])
    with pytest.raises(IndexError):
        source.read(COUNT)


def test_a_pattern_a_copy_and_a_pickle_are_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    whole = open_source(folder)
    by_pattern = open_source(str(folder / "train-*.parquet"))
    assert by_pattern.keys == whole.keys
    assert stamp(by_pattern) == stamp(whole)
    again = pickle.loads(pickle.dumps(whole))
    assert again.read(200) == whole.read(200)
    shutil.copytree(folder, tmp_path / "copy")
    assert stamp(open_source(tmp_path / "copy")) != stamp(whole)  # other times


def test_keys_are_the_paths_where_they_are_unique_and_safe(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = ["a/00000000", "a/00000001", "a/00000002"]
    for names, wanted in (
        (("c/x.1.png", "d/y.jpg", "z"), ["c/x.1", "d/y", "z"]),
        (("x.png", "x.jpg", "y.png"), rows),
        (("../x.png", "y.png", "z.png"), rows),
        (("/x.png", "y.png", "z.png"), rows),
        (("x\x1b[31m.png", "y.png", "z.png"), rows),
        ((None, "y.png", "z.png"), rows),
    ):
        assert open_source(write(path, named(*names))).keys == wanted, names  # type: ignore[arg-type]


def test_plain_binary_columns_and_text_labels(tmp_path: Path) -> None:
    data = [png(np.full((2, 2), i, np.uint8)) for i in range(4)]
    labels = ["dog", "cat", "dog", "cat"]
    source = open_source(write(tmp_path / "a.parquet", data, "jpg", label=labels))
    assert [source.read(i) for i in range(4)] == data
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1, 0]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    data = [png(np.full((2, 2), i, np.uint8)) for i in range(4)]
    path = write(tmp_path / "a.parquet", data, "one", two=data[::-1], fine=[5, 6, 7, 8])
    with pytest.raises(UserError, match=r"2 columns could be .*'one', 'two'.*#image-column=NAME"):
        open_source(path)
    source = open_source(f"{path}#image-column=two#label-column=fine")
    assert source.read(0) == data[3]
    assert source.labels is not None
    assert source.labels.tolist() == [5, 6, 7, 8]
    assert open_source(source.spec).read(0) == data[3]
    for part, words in (
        ("image-column=fine", "#image-column=fine is no column of pictures"),
        ("image-column=two#label-column=one", "#label-column=one is no column of numbers"),
        ("image-member=png", r"#image-member=png \(or --image-member\) is given, and for parquet"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(f"{path}#{part}")


def test_labels_that_are_absent_for_all_are_none_and_for_some_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert open_source(write(path, named("a", "b"), label=[-1, -1])).labels is None
    with pytest.raises(UserError, match="1 of 2 rows have none in the column 'label'"):
        _ = open_source(write(path, named("a", "b"), label=[3, None])).labels
    assert open_source(write(path, named("a", "b"))).labels is None


def test_pictures_outside_are_refused_and_rows_without_any_are_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    outside = {"bytes": None, "path": "/etc/hostname"}
    with pytest.raises(UserError, match="'/etc/hostname' has no bytes in it, only a path") as error:
        open_source(write(path, [outside, *named("a", "b")]))
    assert "\n" not in str(error.value)
    source = open_source(write(path, [*named("a", "b"), None, outside]))
    for row in (2, 3):
        with pytest.raises(PictureError, match="holds no bytes"):
            source.read(row)
    source = open_source(write(path, [{"bytes": b"no picture", "path": "a"}]))
    with pytest.raises(PictureError, match="not a readable picture"):
        decode(source.read(0))


def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", named("a", "b"), label=[0, 1])
    write(tmp_path / "b.parquet", named("c", "d"), label=["x", "y"], other=[1, 2])
    assert len(open_source(tmp_path)) == 4  # the same columns are read
    write(tmp_path / "b.parquet", named("c", "d"), "photo")
    with pytest.raises(UserError, match="files of the same columns and classes"):
        open_source(tmp_path)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "sub/a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet' and .*sub/a\.parquet' have one name"):
        open_source(f"{tmp_path}/{{a,sub/a}}.parquet")


def test_cut_and_changed_files_are_one_line_or_bad_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", named(*"abcdefg"), label=[*range(7)])
    whole, outcomes = path.read_bytes(), {"refused": 0, "bad": 0, "same": 0}
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="as parquet failed") as error:
        open_source(path)
    assert "\n" not in str(error.value)
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(whole), 150).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            source = open_source(path)
            for row in range(len(source)):
                decode(source.read(row))
            outcomes["same"] += 1
        except UserError:
            outcomes["refused"] += 1
        except PictureError:
            outcomes["bad"] += 1
    assert all(outcomes.values()), outcomes


def test_row_groups_are_held_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"bytes": bytes(100_000), "path": f"{i}.png"} for i in range(12)]
    path = write(tmp_path / "a.parquet", rows)  # dictionaries and pages: little on the disk
    assert path.stat().st_size < 60_000
    source = open_source(path)
    source.groups.most_bytes = 250_000  # type: ignore[attr-defined]
    with pytest.raises(PictureError, match="more than 250000 bytes"):
        source.read(0)
    source.groups.most_bytes = 700_000  # type: ignore[attr-defined]
    for row in range(12):
        assert source.read(row) == bytes(100_000)
        assert len(source.groups._kept) <= 2  # type: ignore[attr-defined]
    monkeypatch.setattr("featcache.pictures.parquet_columns.GROUP_BYTES", 900)
    with pytest.raises(UserError, match=r"at most 900 are allowed.*row_group_size=100"):
        open_source(path)


def test_a_row_count_beyond_the_file_makes_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.nulls(500_000, pa.binary())}), path)
    with pytest.raises(UserError, match="tells of 500000 rows in"):
        open_source(path)


def test_without_pyarrow_the_pip_line_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install pyarrow"):
        open_source(folder)
    assert parquet_groups.GROUP_BYTES == 512 << 20  # as the guide says
