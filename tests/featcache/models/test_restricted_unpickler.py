"""Files are read and never run: every form that torch writes, and pickles that try to run
something."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featcache.models import restricted_unpickler


class Net(nn.Module):
    """Hold parameters, buffers, nesting, half precision, a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.rest = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.register_buffer("steps", torch.arange(4))
        self.halves = nn.Parameter(torch.randn(2, 5).half().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(got[name], value) and got[name].dtype == value.dtype
        for name, value in expected.items()
    )


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])
@pytest.mark.parametrize("what", ["module", "state"])
def test_what_torch_saves_is_what_is_read(
    tmp_path: Path, net: Net, zipped: bool, what: str
) -> None:
    path = tmp_path / "w.pt"
    torch.save(
        net if what == "module" else net.state_dict(), path, _use_new_zipfile_serialization=zipped
    )
    assert same(restricted_unpickler.load_tensors(path), net.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_archives_are_read(tmp_path: Path, net: Net) -> None:
    torch.jit.save(torch.jit.script(net), tmp_path / "w.pt")
    assert same(restricted_unpickler.load_tensors(tmp_path / "w.pt"), net.state_dict())
    assert any(
        name.endswith("BatchNorm2d")
        for name in restricted_unpickler.referenced_names(tmp_path / "w.pt")
    )


def test_the_rest_of_a_checkpoint_is_passed_over(tmp_path: Path, net: Net) -> None:
    args = argparse.Namespace(lr=0.1, path=Path("x"))
    torch.save(
        {"model": net.state_dict(), "args": args, "epoch": 3, "names": ["a"]}, tmp_path / "w.pt"
    )
    expected = {f"model.{name}": value for name, value in net.state_dict().items()}
    assert same(restricted_unpickler.load_tensors(tmp_path / "w.pt"), expected)


RAN: list[object] = []


class Runs:
    """Call the function where anything else unpickles it."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, RAN.append, print, getattr, __import__]
)
def test_nothing_that_a_file_names_is_called(
    tmp_path: Path, net: Net, zipped: bool, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    call = (
        Runs(os.system, f"touch {mark}")
        if function is os.system
        else Runs(function, f"open({str(mark)!r}, 'w')")
    )
    torch.save(
        {"a": call, "model": net.state_dict()},
        tmp_path / "w.pt",
        _use_new_zipfile_serialization=zipped,
    )
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it was called"))
    assert len(restricted_unpickler.load_tensors(tmp_path / "w.pt")) == len(net.state_dict())
    assert not mark.exists()
    assert not RAN


def _zip(path: Path, pickled: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"w/data/{name}", data)
    return path


class _Stored(pickle.Pickler):
    """Write a tensor's storage with a size and offset of our choosing."""

    def persistent_id(self, value: object) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if value == "STORAGE" else None


@pytest.mark.parametrize(("offset", "size"), [(0, (5,)), (2, (3,)), (0, (2, 3)), (10**9, (1,))])
def test_a_view_beyond_its_storage_is_refused(
    tmp_path: Path, offset: int, size: tuple[int, ...]
) -> None:
    buffer = io.BytesIO()
    strides = (1,) if len(size) == 1 else (size[1], 1)
    build = Runs(torch._utils._rebuild_tensor_v2, "STORAGE", offset, size, strides, False, {})
    _Stored(buffer, 2).dump({"a": build})
    with pytest.raises(ValueError, match="storage"):
        restricted_unpickler.load_tensors(
            _zip(tmp_path / "w.pt", buffer.getvalue(), **{"0": bytes(16)})
        )


def test_a_zip_that_unfolds_is_refused(tmp_path: Path, net: Net) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as there,
        zipfile.ZipFile(tmp_path / "c.pt", "w", compression=zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in there.namelist():
            archive.writestr(name, there.read(name))
    with pytest.raises(ValueError, match="compressed"):
        restricted_unpickler.load_tensors(tmp_path / "c.pt")


def test_a_container_that_contains_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, object] = {}
    loop["again"] = loop
    torch.save(loop, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="contains itself"):
        restricted_unpickler.load_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_cut_is_a_value_error(tmp_path: Path, net: Net, zipped: bool) -> None:
    torch.save(net, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pt").read_bytes()
    for keep in [*range(0, 200, 7), *range(200, len(whole) - 1, 97), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r".+"):
            restricted_unpickler.load_tensors(tmp_path / "cut.pt")


def test_damaged_bytes_never_do_more_than_refuse(tmp_path: Path, net: Net) -> None:
    """One byte is changed at each offset of the pickle: other tensors or a ValueError, nothing
    else."""
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        pickled = archive.read("w/data.pkl")
        members = {
            n.rpartition("/")[2]: archive.read(n) for n in archive.namelist() if "/data/" in n
        }
    refused = 0
    for at in range(0, len(pickled), 3):
        damaged = bytearray(pickled)
        damaged[at] ^= 0x15
        path = _zip(tmp_path / "d.pt", bytes(damaged), **members)
        try:
            restricted_unpickler.load_tensors(path)
        except ValueError:
            refused += 1
    assert refused > len(pickled) // 20


def test_a_pickle_that_builds_upon_a_class_changes_nothing(tmp_path: Path) -> None:
    """BUILD on a class that a file names would set attributes on it; ours is an object of this one
    reading."""
    pickled = b"cos\nsystem\n(N}X\x03\x00\x00\x00fooK\x01stb."
    assert restricted_unpickler.load_tensors(_zip(tmp_path / "w.pt", pickled)) == {}
    assert not hasattr(restricted_unpickler.InertObject, "foo")
    assert not hasattr(os.system, "foo")
