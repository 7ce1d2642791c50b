"""A real S3 server for tests, one a process of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.s3_server import ADMIN as ADMIN
from benchmarks.s3_server import BUCKET as BUCKET
from benchmarks.s3_server import READER as READER
from benchmarks.s3_server import S3Server as S3Server
from benchmarks.s3_server import open_bucket, serve

if TYPE_CHECKING:
    from obstore.store import S3Store


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("s3") / "data") as found:
        yield found


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> Iterator[S3Store]:
    """The bucket `lab` by obstore alone; what the tests of a file put there is removed after them,
    so that no other file sees it."""
    import obstore

    opened = open_bucket(s3)
    yield opened
    left = [each["path"] for page in obstore.list(opened) for each in page]
    obstore.delete(opened, left)


@pytest.fixture
def as_admin(
    s3: S3Server, bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of a client that may do everything, with a folder of its own."""
    for name, value in s3.variables(XDG_CACHE_HOME=str(tmp_path / "own")).items():
        monkeypatch.setenv(name, value)
