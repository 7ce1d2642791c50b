"""Headers that are read by small ranges, and kept, are those of the file; what was kept and is not
as it was written is read again."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest
from fastcrc.crc32 import iscsi as crc32c
from hypothesis import given
from hypothesis import strategies as st

from featcache.objects.client import Facts
from featcache.pictures import far_headers
from featcache.pictures.far_headers import FarFile, Pieces, keep, load

DATA = bytes((i * i + i // 251) % 256 for i in range(70_000))
URL = "s3://lab/a.tar"
FACTS = Facts("a.tar", len(DATA), '"tag"', 0.0)
READS = st.lists(st.tuples(st.integers(0, len(DATA) + 10), st.integers(0, 3000)), max_size=40)


def far_file(kept: Pieces) -> FarFile:
    return FarFile(lambda start, count: DATA[start : start + count], len(DATA), kept)


@given(READS)
def test_any_reads_are_those_of_the_file(reads: list[tuple[int, int]]) -> None:
    there, here = far_file(Pieces()), io.BytesIO(DATA)
    for at, count in reads:
        assert there.seek(at) == here.seek(at)
        assert there.read(count) == here.read(count)
        assert there.tell() == here.tell()


@given(READS)
def test_what_was_read_is_kept_and_read_without_a_request(reads: list[tuple[int, int]]) -> None:
    first = far_file(Pieces())
    for at, count in reads:
        first.seek(at)
        first.read(count)
    again = far_file(first.kept)
    for at, count in reads:
        again.seek(at)
        assert again.read(count) == DATA[at : at + count]
    assert again.requests == 0


def test_headers_close_to_each_other_take_one_request() -> None:
    file = far_file(Pieces())
    for at in range(0, 10_240, 1024):
        file.seek(max(at - 1, 0))
        file.read(1)
        file.seek(at)
        file.read(512)
    assert file.requests == 1


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of kept headers: bytes 100 to 300 and 5000 to 5100."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pieces = Pieces()
    pieces.add(5000, DATA[5000:5100])
    pieces.add(100, DATA[100:200])
    pieces.add(150, DATA[150:300])
    keep(URL, FACTS, pieces)
    (path,) = (tmp_path / "featcache" / "objects" / "tars").iterdir()
    return path


def test_what_was_kept_is_found(kept: Path) -> None:
    found = load(URL, FACTS)
    assert found is not None
    assert found.find(100, 200) == DATA[100:300]
    assert found.find(5000, 100) == DATA[5000:5100]
    assert [found.find(*each) for each in ((99, 2), (299, 2), (4999, 1), (0, 1))] == [None] * 4


def test_another_version_has_none(kept: Path) -> None:
    assert load(URL, FACTS._replace(e_tag='"other"')) is None
    assert load(URL, FACTS._replace(bytes=1)) is None
    assert load("s3://lab/b.tar", FACTS) is None


def rewritten(kept: Path, **fields: object) -> bytes:
    line, _, packed = kept.read_bytes().partition(b"\n")
    return json.dumps(json.loads(line) | fields).encode() + b"\n" + packed


FORGED = {
    "cut": lambda path: path.read_bytes()[:-100],
    "no line": lambda path: b"",
    "no object": lambda path: b"[1, 2]\n",
    "deep": lambda path: b"[" * 100_000 + b"\n",
    "another url": lambda path: rewritten(path, url="s3://lab/b.tar"),
    "a negative length": lambda path: rewritten(path, lengths=[-5, 305]),
    "lengths that are none": lambda path: rewritten(path, lengths=["a", 100]),
    "not in order": lambda path: rewritten(path, starts=[5000, 100]),
    "fewer starts": lambda path: rewritten(path, starts=[100]),
    "another checksum": lambda path: rewritten(path, crc32c=1),
    "flipped": lambda path: path.read_bytes()[:-1] + b"\0",
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_not_as_it_was_written_is_not_used(kept: Path, name: str) -> None:
    kept.write_bytes(FORGED[name](kept))
    assert load(URL, FACTS) is None


def test_what_unpacks_to_gigabytes_is_not_unpacked(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_headers, "MOST_BYTES", 1 << 20)
    data = bytes(1 << 23)
    kept.write_bytes(
        rewritten(kept, lengths=[len(data)], starts=[0], crc32c=crc32c(data)).partition(b"\n")[0]
        + b"\n"
        + zlib.compress(data)
    )
    assert load(URL, FACTS) is None


def test_what_cannot_be_kept_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pieces = Pieces()
    pieces.add(0, b"a")
    keep(URL, FACTS, pieces)
    assert "cannot be kept" in caplog.messages[0]
    assert "read again next time" in caplog.messages[0]


def test_too_many_headers_are_told_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(far_headers, "MOST_BYTES", 1000)
    pieces = Pieces()
    for i in range(20):
        pieces.add(i * 200, DATA[:100])
    keep(URL, FACTS, pieces)
    assert sum(map(len, pieces.data)) <= 1000
    assert "are read again next time" in caplog.messages[0]
    assert list(tmp_path.iterdir()) == []
