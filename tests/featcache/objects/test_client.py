"""The client against a real S3 server, and behind a proxy that makes faults: what is told, tried
again and given up."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import UserError
from featcache.objects import client as clients
from featcache.objects.client import Client, client
from featcache.objects.url import parse
from tests import faulty_proxy
from tests.faulty_proxy import FaultyProxy
from tests.s3_server import ADMIN, BUCKET, READER, S3Server

pytestmark = pytest.mark.slow


def come_as(endpoint: str, who: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server(endpoint).variables(who).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def lab(as_admin: None) -> Client:
    return client(parse(f"s3://{BUCKET}"))


@pytest.fixture
def proxy(s3: S3Server, lab: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy.before(s3.endpoint) as found:
        come_as(found.endpoint, ADMIN, monkeypatch)
        yield found


def test_reading_and_writing(lab: Client, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "file").write_bytes(data)
    began = time.time()
    lab.put("a/b c+ü.bin", tmp_path / "file")
    assert lab.read("a/b c+ü.bin") == data
    facts = lab.facts("a/b c+ü.bin")
    assert facts is not None
    assert (facts.path, facts.bytes) == ("a/b c+ü.bin", 3 << 20)
    assert int(began) <= facts.modified <= time.time() + 1  # the server rounds
    pieces = lab.read_ranges("a/b c+ü.bin", [5, 0, 1 << 20], [10, 1, 7])
    assert [bytes(each) for each in pieces] == [data[5:15], data[:1], data[1 << 20 :][:7]]
    assert [each.path for each in lab.list("a/")] == ["a/b c+ü.bin"]
    lab.delete(["a/b c+ü.bin", "never/there"])
    assert lab.facts("a/b c+ü.bin") is None
    assert list(lab.list("a/")) == []
    with pytest.raises(FileNotFoundError):
        lab.read("a/b c+ü.bin")


def test_a_large_file_goes_and_comes_in_pieces(
    lab: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PART_BYTES", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(clients, "PIECE_BYTES", 1 << 20)
    data = np.random.default_rng(1).bytes((17 << 20) + 3)
    (tmp_path / "there").write_bytes(data)
    lab.put("large", tmp_path / "there")
    lab.download("large", tmp_path / "back", len(data))
    assert (tmp_path / "back").read_bytes() == data


def test_one_of_eight_creates_and_one_of_eight_swaps(lab: Client) -> None:
    def race(name: str, e_tag: str | None) -> list[str]:
        found: list[str] = []

        def go(i: int) -> None:
            body = f"{name} {i} {e_tag}".encode()  # an ETag may be that of the bytes
            won = lab.create(name, body) if e_tag is None else lab.swap(name, body, e_tag)
            if won is not None:
                found.append(won)

        threads = [threading.Thread(target=go, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    for i in range(5):
        (e_tag,) = race(f"race/{i}", None)
        (again,) = race(f"race/{i}", e_tag)
        assert again != e_tag
        assert lab.swap(f"race/{i}", b"stale", e_tag) is None


def test_faults_now_and_then_change_nothing(
    proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatched = client(parse(f"s3://{BUCKET}"))
    monkeypatched.sleep = lambda seconds: None
    proxy.faults = faulty_proxy.now_and_then(0, 0.25)
    with caplog.at_level(logging.WARNING):
        for i in range(30):
            data = f"{i}".encode() * 1000
            assert monkeypatched.create(f"faulty/{i}", data) is not None
            assert monkeypatched.create(f"faulty/{i}", b"other") is None
            assert monkeypatched.read(f"faulty/{i}") == data
            (piece,) = monkeypatched.read_ranges(f"faulty/{i}", [3], [100])
            assert bytes(piece) == data[3:103]
    assert len(list(monkeypatched.list("faulty/"))) == 30
    assert all(proxy.made[kind] for kind in faulty_proxy.KINDS)
    assert "retrying: 503 SlowDown, 1 of 6" in caplog.text


def test_of_many_ranges_those_that_came_are_kept(proxy: FaultyProxy) -> None:
    """Every third request fails, so that no forty in a row succeed."""
    requests = client(parse(f"s3://{BUCKET}"))
    requests.sleep = lambda seconds: None
    data = np.random.default_rng(0).bytes(1 << 20)
    requests.put("ranges", data)
    proxy.faults = lambda method, path, number: (
        ("reset", "503", "cut")[number % 9 // 3] * (number % 3 == 0)
    )
    starts = [int(each) for each in np.random.default_rng(1).permutation(40) * 25_000]
    found = requests.read_ranges("ranges", starts, [1000] * 40, coalesce=0)
    assert [bytes(each) for each in found] == [data[start : start + 1000] for start in starts]
    assert sum(proxy.made[kind] for kind in ("reset", "503", "cut")) >= 13


def test_a_store_that_stays_down_ends_in_a_line(proxy: FaultyProxy) -> None:
    proxy.faults = lambda method, path, number: "503"
    there = client(parse(f"s3://{BUCKET}"))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot read s3://lab/x: 503 SlowDown; .*again"):
        there.read("x")
    assert time.monotonic() - began < 60
    assert proxy.made["503"] == clients.TRIES


@pytest.mark.parametrize(
    ("url", "who", "wrong"),
    [
        ("s3://no-such-bucket/x", ADMIN, "no such bucket"),
        (f"s3://{BUCKET}/x", (ADMIN[0], "wrong"), "secret key does not belong to the access key"),
        (f"s3://{BUCKET}/x", ("nobody", "nothing-secret"), "access key is unknown"),
    ],
)
def test_what_is_wrong_is_one_line(
    s3: S3Server, lab: Client, monkeypatch: pytest.MonkeyPatch, url: str,
    who: tuple[str, str], wrong: str,
) -> None:  # fmt: skip
    come_as(s3.endpoint, who, monkeypatch)
    where = parse(url)
    with pytest.raises(UserError, match=wrong) as error:
        list(client(where).list("x"))
    assert who[1] not in str(error.value)
    assert str(where.bucket) in str(error.value)


def test_who_may_only_read_is_told_so(
    s3: S3Server, lab: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_as(s3.endpoint, READER, monkeypatch)
    reader = client(parse(f"s3://{BUCKET}"))
    assert reader.read("made") == b"1"
    with pytest.raises(UserError, match=r"cannot write s3://lab/mine: 403 .*may not do that"):
        reader.put("mine", b"1")


def test_a_forked_process_is_told_and_does_not_wait(lab: Client) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            lab.read("made")
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0
    assert b"multiprocessing_context='spawn'" in os.read(reader, 1000)
    os.close(reader)
    assert lab.read("made") == b"1"


def test_a_profile(
    s3: S3Server, lab: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {ADMIN[1]}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert client(parse(f"s3://{BUCKET}")).read("made") == b"1"
    monkeypatch.setenv("AWS_PROFILE", "labb")
    with pytest.raises(UserError, match=r"s3://lab: .*labb.*set AWS_PROFILE") as error:
        client(parse(f"s3://{BUCKET}"))
    assert ADMIN[1] not in str(error.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"s3://elsewhere: .*pip install 'featcache\[remote\]'"):
        client(parse("s3://elsewhere/x"))
