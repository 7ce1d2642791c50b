"""What a process keeps of a cache in an object store never stands for what is there, and a writer
who lost its lease writes no more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

import featcache
from featcache.errors import UserError
from featcache.extraction import extract
from featcache.objects.client import Client, Facts, Tag, client
from featcache.objects.url import parse
from featcache.storage import commit, files, mounted
from featcache.storage.kept_files import KeptFiles
from featcache.storage.mount import mount, mount_at
from featcache.storage.object_lease import LeaseTable
from featcache.storage.object_names import describes
from featcache.testing.items import files_below
from tests import faulty_proxy
from tests.conftest import make_plan
from tests.faulty_proxy import FaultyProxy
from tests.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]


def objects(bucket: S3Store, prefix: str) -> dict[str, bytes]:
    names = [each["path"] for page in obstore.list(bucket, f"{prefix}/") for each in page]
    return {
        name.removeprefix(f"{prefix}/"): bytes(obstore.get(bucket, name).bytes()) for name in names
    }


def put(bucket: S3Store, folder: Path, prefix: str) -> None:
    for name, data in files_below(folder).items():
        obstore.put(bucket, f"{prefix}/{name}", data)


@pytest.fixture
def proxy(s3: S3Server, as_admin: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy.before(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


@pytest.fixture
def here(photos: Path, tmp_path: Path) -> Path:
    extract.run(make_plan(photos), tmp_path / "here", batch_size=4)
    return tmp_path / "here"


# ---------------------------------------------------------------- what is kept


def test_a_bucket_that_was_emptied_is_filled_again(
    photos: Path, here: Path, bucket: S3Store
) -> None:
    url = parse(f"s3://{BUCKET}/emptied")
    extract.run(make_plan(photos), mount(url), batch_size=4)
    assert objects(bucket, "emptied") == files_below(here)
    obstore.delete(bucket, [f"emptied/{name}" for name in files_below(here)])
    extract.run(make_plan(photos), mount(url), batch_size=4)
    assert objects(bucket, "emptied") == files_below(here)


def test_a_manifest_that_was_never_uploaded_is_uploaded(
    photos: Path, here: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = parse(f"s3://{BUCKET}/unwritten")
    plain = Client.create

    def fails(self: Client, path: str, data: bytes) -> Tag | None:
        if path.endswith("manifest.json"):
            raise UserError("cannot write")
        return plain(self, path, data)

    with monkeypatch.context() as broken:
        broken.setattr(Client, "create", fails)
        with pytest.raises(UserError, match="cannot write"):
            extract.run(make_plan(photos), mount(url), batch_size=4)
    assert objects(bucket, "unwritten") == {}
    extract.run(make_plan(photos), mount(url), batch_size=4)
    assert objects(bucket, "unwritten") == files_below(here)


OPEN = "import sys, featcache; c = featcache.open(sys.argv[1]); print(len(c), c.path)"


def test_the_next_process_asks_for_nothing_that_it_knows(
    here: Path, bucket: S3Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    put(bucket, here, "known")
    gets: list[str] = []

    def note(method: str, path: str, number: int) -> str:
        if method == "GET" and "list-type" not in path:
            gets.append(path)
        return ""

    proxy.faults = note

    def opened() -> tuple[int, Path]:
        gets.clear()
        command = [sys.executable, "-c", OPEN, f"s3://{BUCKET}/known"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert told[0] == "11"
        return len([path for path in gets if path.endswith(".json")]), Path(told[1])

    known = [name for name in files_below(here) if describes(name) and name.endswith(".json")]
    first, folder = opened()
    assert first == len(known) > 4  # the manifest, its copy, three records
    assert not folder.exists()
    again, other = opened()
    assert again == 0
    assert other.parent == folder.parent
    assert other != folder
    (kept,) = (tmp_path / "own").rglob("kept")
    for path in kept.iterdir():  # a machine that lost power
        path.write_bytes(bytes(path.stat().st_size))
    assert opened()[0] == first
    assert opened()[0] == 0
    left = kept.parent / folder.name  # of one that was killed
    left.mkdir()
    (left / "manifest.json").touch()
    opened()
    assert not left.exists()


def test_files_of_other_versions_are_not_kept(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "kept")
    facts = Facts("a/manifest.json", 3, '"1"', 0.0)
    (tmp_path / "file").write_bytes(b"abc")
    kept.keep(facts, b"abc", tmp_path / "file")
    kept.look()
    assert not kept.link(facts._replace(e_tag='"2"'), tmp_path / "other")
    assert not kept.link(facts._replace(path="b/manifest.json"), tmp_path / "other")
    assert kept.link(facts, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"abc"
    kept.sweep([facts._replace(e_tag='"2"')])
    assert list((tmp_path / "kept").iterdir()) == []


def test_weights_that_lie_beside_a_cache_are_not_fetched(here: Path, bucket: S3Store) -> None:
    put(bucket, here, "beside")
    obstore.put(bucket, "beside/model.safetensors", bytes(1 << 20))
    with featcache.open(f"s3://{BUCKET}/beside") as cache:
        assert not (cache.path / "model.safetensors").exists()
        assert {path.name for path in cache.path.glob("*.safetensors")} == {
            name for name in files_below(here) if name.endswith(".safetensors")
        }


# ---------------------------------------------------------------- lost leases


def in_the_middle(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[mounted.Mount, str], None], after: str
) -> None:
    """Do something once, after an object of a shard was uploaded."""
    plain, done = mounted.Mount._upload, list[str]()

    def upload(self: mounted.Mount, name: str, path: Path) -> None:
        plain(self, name, path)
        if after in name and not done:
            done.append(name)
            do(self, name)

    monkeypatch.setattr(mounted.Mount, "_upload", upload)


def test_a_writer_who_lost_its_lease_writes_no_more(
    photos: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(place: mounted.Mount, name: str) -> None:
        for lease in place._held:
            lease.lost = True

    in_the_middle(monkeypatch, lose, "shards/000001.zarr/")
    url = parse(f"s3://{BUCKET}/lost")
    with pytest.raises(UserError, match="another process has taken this shard over"):
        extract.run(make_plan(photos), mount(url), batch_size=4)
    found = objects(bucket, "lost")
    assert "shards/000001.json" not in found
    assert len([name for name in found if name.startswith("shards/000001.zarr/")]) < 5


def test_what_a_loser_wrote_over_is_mended(
    photos: Path, here: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_over(place: mounted.Mount, name: str) -> None:
        obstore.put(bucket, f"over/{name}", b"by another machine")

    in_the_middle(monkeypatch, write_over, "shards/000001.zarr/")
    extract.run(make_plan(photos), mount(parse(f"s3://{BUCKET}/over")), batch_size=4)
    assert objects(bucket, "over") == files_below(here)


def test_a_store_that_does_not_honour_conditions_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = client(parse(f"s3://{BUCKET}"))
    plain = obstore.put

    def put_always(*args: Any, mode: Any = None, **options: Any) -> Any:
        return plain(*args, **options)

    monkeypatch.setattr(obstore, "put", put_always)
    with pytest.raises(UserError, match="does not honour If-None-Match"):
        LeaseTable(requests, 1.0).acquire("loose.lease", "me")
    assert requests.facts("loose.lease") is None


def test_googles_store_gets_the_version_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def put(*args: Any, mode: Any = None, **options: Any) -> Any:
        modes.append(mode)
        return {"e_tag": "new", "version": "8"}

    monkeypatch.setattr(obstore, "put", put)
    requests = client(parse(f"s3://{BUCKET}"))
    assert requests.create("x", b"1") == Tag("new", "8")
    assert requests.swap("x", b"2", Tag("old", "7")) == Tag("new", "8")
    assert requests.swap("x", b"2", Tag("old")) == Tag("new", "8")
    assert modes == ["create", {"e_tag": "old", "version": "7"}, {"e_tag": "old"}]


def test_a_renewal_whose_answer_was_lost_is_known_as_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = client(parse(f"s3://{BUCKET}"))
    table = LeaseTable(requests, 100.0)
    lease = table.acquire("answer.lease", "me")
    assert lease is not None
    plain = requests.swap

    def lose(path: str, data: bytes, tag: Tag) -> Tag | None:
        plain(path, data, tag)
        raise UserError("no answer")

    monkeypatch.setattr(requests, "swap", lose)
    lease.renew()
    monkeypatch.setattr(requests, "swap", plain)
    lease.renew()
    assert not lease.lost
    requests.put("answer.lease", b"somebody 0")
    lease.renew()
    assert lease.lost


# ---------------------------------------------------------------- within a process


def test_a_second_mount_of_a_place_is_the_first(here: Path, bucket: S3Store) -> None:
    put(bucket, here, "twice")
    url = parse(f"s3://{BUCKET}/twice")
    place = mount_at(mount(url))
    assert mount_at(mount(url)) is place
    obstore.delete(bucket, "twice/shards/000002.json")
    mount(url)
    assert not (place.folder / "shards/000002.json").exists()
    shutil.rmtree(place.folder)
    folder = mount(url)
    assert files.files_of(folder) is place


def test_verify_looks_at_what_is_there_now(here: Path, bucket: S3Store) -> None:
    """And not at what an earlier read has brought."""
    put(bucket, here, "now")
    folder = mount(parse(f"s3://{BUCKET}/now"))
    with featcache.open(folder) as cache:
        assert len(cache.keys) == 11
        record = cache.records[1]
    assert commit.check_shard(folder, "000001", "zarr", record, deep=True) == []
    name = "shards/000001.zarr/key_bytes/c.0"
    data = bytearray((here / name).read_bytes())
    data[0] ^= 1
    obstore.put(bucket, f"now/{name}", bytes(data))
    (problem,) = commit.check_shard(folder, "000001", "zarr", record, deep=True)
    assert name in problem
