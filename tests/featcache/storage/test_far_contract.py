"""Both stores keep their contract in a real S3 server: what is read, after it was uploaded by who
published it, is brought from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from featcache.objects.client import client
from featcache.objects.url import parse
from featcache.storage import files, object_names
from featcache.storage.mounted import Mount
from featcache.storage.store import Array, ShardWriter
from featcache.testing.items import ARRAYS, SHARD, numbers
from featcache.testing.store import StoreContract
from tests.s3_server import BUCKET


class FarWriter:
    """A store's writer; what it published is brought here as it lies in the bucket."""

    def __init__(self, writer: ShardWriter, place: Mount) -> None:
        self._writer, self._place = writer, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def finish(self, *args: Any) -> dict[str, Any]:
        self._place.drop(map(str, self._files()))
        record = self._writer.finish(*args)
        self._place.refresh()
        here = [name for name in self._place.objects if (self._place.folder / name).is_file()]
        # nothing but the record is left by who uploads
        assert {name.rpartition(".")[2] for name in here} == {"json"}
        self._place.bring(map(str, self._files()))
        return record

    def _files(self) -> list[Path]:
        return [self._place.folder / name for name in self._place.objects]


class FarContract(StoreContract):
    @pytest.fixture(autouse=True)
    def _unmounted(self, as_admin: None) -> Iterator[None]:
        before = dict(files._mounted)
        yield
        files._mounted.clear()
        files._mounted.update(before)

    def writer(
        self, cache: Path, arrays: Sequence[Array] = ARRAYS, views: int = 2, shard: str = SHARD
    ) -> ShardWriter:
        place = files.files_of(cache)
        if not isinstance(place, Mount):
            name = hashlib.blake2b(str(cache).encode(), digest_size=8).hexdigest()
            url = parse(f"s3://{BUCKET}/contract/{name}")
            place = Mount(url, cache, client(url))
            files.mount(str(cache), place)
        found: Any = FarWriter(super().writer(cache, arrays, views, shard), place)
        return found

    def test_every_changed_byte_and_every_missing_file_is_named(self, tmp_path: Path) -> None:
        """As the contract has it, in the bucket."""
        record = self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        place: Any = files.files_of(tmp_path)
        of_shard = [name for name in place.objects if object_names.is_of_shard(name)]
        for name in of_shard:
            path = tmp_path / name
            data = path.read_bytes()
            flipped = [data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :] for i in (0, len(data) - 1)]
            for changed in (*flipped, data[:-1], None):
                if changed is None:
                    place.remove([name])
                else:
                    place.put(name, changed)
                place.refresh()
                place.drop([str(path)])
                (problem,) = self.problems(tmp_path, record)
                assert str(path) in problem
            place.put(name, data)
        place.refresh()
        assert self.problems(tmp_path, record) == []


@pytest.mark.slow
class TestZarr(FarContract):
    name = "zarr"


@pytest.mark.slow
class TestWebdataset(FarContract):
    name = "webdataset"
