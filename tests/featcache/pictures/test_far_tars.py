"""Pictures of tars in a real S3 server are those of the same tars on disk."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.passed_over import passed_over
from featcache.pictures.source import Source
from tests import faulty_proxy
from tests.conftest import SYNTHETIC, Ran, files_below
from tests.faulty_proxy import FaultyProxy
from tests.featcache.pictures.test_open_source import PNG
from tests.featcache.pictures.test_tar_index import link, make_tar, picture
from tests.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]


EXTRACT = ("extract", "--teacher", SYNTHETIC, "--size", 28, "--levels", "1,3")


def noise(seed: int, count: int) -> bytes:
    return PNG + np.random.default_rng(seed).bytes(count)


def plain_tars(folder: Path) -> None:
    for number in range(3):
        members = []
        for i in range(5):
            key = f"{number}{i}"
            members += [picture(f"{key}.png", noise(10 * number + i, 30_000))]
            members += [(f"{key}.cls", str(i).encode(), {}), (f"{key}.json", b"{}" * 900, {})]
        make_tar(folder / f"train-{number:03}.tar", *members)


def tar_of_tars(folder: Path) -> None:
    outer = []
    for name in ("n01", "n02"):
        make_tar(folder / "in.tmp", *(picture(f"{name}_{i}.png", noise(i, 9000)) for i in range(4)))
        outer.append((f"{name}.tar", (folder / "in.tmp").read_bytes(), {}))
    (folder / "in.tmp").unlink()
    make_tar(folder / "train-000.tar", *outer)


def odd_members(folder: Path) -> None:
    """Links, long names, a member of no bytes, two tars in one file."""
    long = "d" * 120 + "/" + "ü" * 90
    first = make_tar(
        folder / "a",
        picture("a.png", noise(1, 5000)),
        link("b.png", "a.png"),
        link("gone.png", "nowhere.png"),
        picture(f"{long}.png", noise(2, 20_000)),
        picture("empty.png", b""),
    ).read_bytes()
    second = make_tar(folder / "b", picture("c.png", noise(3, 100))).read_bytes()
    for name in "ab":
        (folder / name).unlink()
    (folder / "train-000.tar").write_bytes(first + second)


KINDS = {"plain": plain_tars, "tar of tars": tar_of_tars, "odd": odd_members}


def upload(bucket: S3Store, folder: Path, prefix: str) -> None:
    for name, data in files_below(folder).items():
        obstore.put(bucket, f"{prefix}/{name}", data)


def described(source: Source) -> tuple[object, ...]:
    labels = source.labels
    return (
        list(source.keys),
        [source.read(i) for i in range(len(source))],
        None if labels is None else labels.tolist(),
        source.classes,
        passed_over(source),
    )


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path, bucket: S3Store) -> tuple[Path, str]:
    """A folder of tars, and where they lie in the bucket."""
    (tmp_path / "tars").mkdir()
    KINDS[request.param](tmp_path / "tars")
    prefix = f"pictures/{request.param.replace(' ', '-')}"
    upload(bucket, tmp_path / "tars", prefix)
    return tmp_path / "tars", prefix


@pytest.fixture
def proxy(s3: S3Server, as_admin: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy.before(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


def test_every_picture_and_label_is_that_of_the_tars_on_disk(kind: tuple[Path, str]) -> None:
    folder, prefix = kind
    here = open_source(str(folder / "*.tar"))
    for _ in range(2):  # by requests, then with the headers that were kept
        there = open_source(f"s3://{BUCKET}/{prefix}/*.tar")
        assert described(there) == described(here)
    order = np.random.default_rng(0).permutation(len(here)).tolist()
    assert [there.read(i) for i in order] == [here.read(i) for i in order]
    again = pickle.loads(pickle.dumps(there))
    assert [again.read(i) for i in order[:3]] == [here.read(i) for i in order[:3]]


def test_headers_are_read_once_and_by_small_ranges(
    tmp_path: Path, bucket: S3Store, proxy: FaultyProxy
) -> None:
    members = [picture(f"{i}.png", noise(i, 200_000)) for i in range(20)]
    whole = make_tar(tmp_path / "a.tar", *members).stat().st_size
    obstore.put(bucket, "once/a.tar", (tmp_path / "a.tar").read_bytes())
    url = f"s3://{BUCKET}/once/a.tar"
    open_source(url)
    assert proxy.bytes_out < whole / 8
    before = proxy.bytes_out
    source = open_source(url)
    assert proxy.bytes_out - before < 5000  # what is there, and which version
    assert source.read(7) == members[7][1]
    assert proxy.bytes_out - before < 210_000


def test_patterns_name_tars(tmp_path: Path, bucket: S3Store) -> None:
    for name in ("x/a-0.tar", "x/a-1.tar", "x/b-2.tar", "x/y/a-3.tar"):
        (tmp_path / "t.tar").unlink(missing_ok=True)
        make_tar(tmp_path / "t.tar", picture(f"{name[-5]}.png"))
        obstore.put(bucket, f"patterns/{name}", (tmp_path / "t.tar").read_bytes())
    found = {
        "x/a-{0..1}.tar": ["0", "1"],
        "x/a-{1,0}.tar": ["1", "0"],
        "x/*.tar": ["0", "1", "2"],
        "*/a-[0-1].tar": ["0", "1"],
        "x/{y/a-3,b-2}.tar": ["3", "2"],
        "x/a-0.tar": ["0"],
    }
    for pattern, keys in found.items():
        assert list(open_source(f"s3://{BUCKET}/patterns/{pattern}").keys) == keys, pattern


WRONG = {
    "gone.tar": "there is no s3://lab/wrong/gone.tar; pictures .* read from tars",
    "": r"there is no s3://lab/wrong; pictures .* read from tars",
    "*.zip": r"there is no s3://lab/wrong/\*.zip",
    "a-{0..3}.tar": "there is no s3://lab/wrong/a-",
    "text.tar": "reading 's3://lab/wrong/text.tar' as a tar failed",
    "cut.tar": "reading 's3://lab/wrong/cut.tar' as a tar failed: unexpected end",
    "a-0.tar#image-column=x": "for tars .* allowed; leave it out",
    "a-{0..9999999}.tar": "braces name more than",
    "../a.tar": "leads nowhere",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_urls_are_one_line(name: str, tmp_path: Path, bucket: S3Store) -> None:
    tar = make_tar(tmp_path / "a.tar", picture("a.png", noise(1, 3000))).read_bytes()
    for each, data in {"a-0.tar": tar, "text.tar": b"text" * 999, "cut.tar": tar[:2000]}.items():
        obstore.put(bucket, f"wrong/{each}", data)
    with pytest.raises(UserError, match=WRONG[name]) as caught:
        open_source(f"s3://{BUCKET}/wrong/{name}")
    assert "\n" not in str(caught.value)


def test_a_tar_that_is_changed_while_it_is_read_is_told(tmp_path: Path, bucket: S3Store) -> None:
    for name, seed in (("a.tar", 0), ("b.tar", 9)):
        make_tar(tmp_path / name, *(picture(f"{i}.png", noise(i + seed, 5000)) for i in range(3)))
    obstore.put(bucket, "changed/a.tar", (tmp_path / "a.tar").read_bytes())
    source = open_source(f"s3://{BUCKET}/changed/a.tar")
    obstore.put(bucket, "changed/a.tar", (tmp_path / "b.tar").read_bytes())
    with pytest.raises(UserError, match=r"s3://lab/changed/a.tar was changed while it was read"):
        source.read(1)
    again = open_source(f"s3://{BUCKET}/changed/a.tar")  # the headers are those of this version
    assert again.read(1) == noise(10, 5000)
    obstore.delete(bucket, "changed/a.tar")
    with pytest.raises(UserError, match="is gone"):
        again.read(2)


def packed(photos: Path, tar: Path) -> bytes:
    """The pictures of a folder as one tar."""
    with tarfile.open(tar, "w") as out:
        for path in sorted(photos.iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            out.addfile(info, io.BytesIO(path.read_bytes()))
    return tar.read_bytes()


def test_extraction_from_a_bucket_is_that_from_the_disk(
    photos: Path, tmp_path: Path, bucket: S3Store, proxy: FaultyProxy,
    featcache_command: Callable[..., Ran],
) -> None:  # fmt: skip
    """Behind a proxy that makes faults in a quarter of all requests."""
    obstore.put(bucket, "extract/photos.tar", packed(photos, tmp_path / "photos.tar"))
    url = f"s3://{BUCKET}/extract/photos.tar"
    proxy.faults = faulty_proxy.now_and_then(3, 0.25)
    ran = featcache_command(*EXTRACT, "--images", url, "--out", tmp_path / "there")
    assert (ran.status, ran.err.count("Traceback")) == (0, 0), ran.err
    ran = featcache_command(
        *EXTRACT, "--images", tmp_path / "photos.tar", "--out", tmp_path / "here"
    )
    assert ran.status == 0, ran.err
    here, there = files_below(tmp_path / "here"), files_below(tmp_path / "there")
    shards = {name for name in here if name.endswith(".zarr/zarr.json") or "/c." in name}
    assert {name: here[name] for name in shards} == {name: there[name] for name in shards}
    ran = featcache_command("info", tmp_path / "there")
    assert f"--images {url}" in " ".join(ran.out.split())
    verify = ("verify", tmp_path / "there", "--recompute", 4)
    ran = featcache_command(*verify)  # a manifest may be a stranger's
    assert (ran.status, "no object store is asked because a cache says so" in ran.err) == (2, True)
    ran = featcache_command(*verify, "--images", url)
    assert ran.status == 0, ran.err
