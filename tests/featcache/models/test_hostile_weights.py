"""A weights file that was made to hang, to fill memory or to reach beyond itself ends in one line;
one that hangs fails by the limit that every test has."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models import restricted_unpickler
from featcache.models.weights import read_state


def zipped(path: Path, pickled: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"w/data/{name}", data)
    return path


class Made:
    """Stand in a pickle for a call of `function`."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Stored(pickle.Pickler):
    """Write ids of storages as they are given."""

    def persistent_id(self, value: object) -> Any:
        return value[1:] if isinstance(value, tuple) and value[:1] == ("ID",) else None


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    Stored(buffer, 2).dump(value)
    return buffer.getvalue()


STORAGE = ("ID", "storage", torch.FloatStorage, "0", "cpu", 4)


def tensor(offset: Any, size: Any, stride: Any, storage: Any = STORAGE) -> Made:
    return Made(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def refused(path: Path, told: str = r"cannot be read|no named tensor") -> None:
    with pytest.raises(UserError, match=told) as caught:
        read_state(str(path), "a teacher")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def nested_tuple(depth: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


def nested_list(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"w": torch.zeros(2)}
    loop["a"] = {"b": {"c": loop}}
    torch.save(loop, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "contains itself")


@pytest.mark.slow
def test_shared_dicts_that_unfold_exponentially(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.zeros(2)}
    for _ in range(40):
        value = {"a": value, "b": value}
    torch.save(value, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", r"unfolds into more than|more than 1000 letters")


@pytest.mark.parametrize("depth", [40, 60])
def test_shared_lists_are_no_matter(tmp_path: Path, depth: int) -> None:
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    torch.save({"w": torch.zeros(2), "more": value}, tmp_path / "w.pt")
    assert list(read_state(str(tmp_path / "w.pt"), "a teacher")) == ["w"]


@pytest.mark.parametrize(
    "make",
    [
        lambda key: {key: 1},
        lambda key: {"a": {key: 1}},
        lambda key: Made(collections.OrderedDict, [(key, 1)]),
        lambda key: Made(collections.OrderedDict, ((key, 1),)),
        lambda key: Made(dict, [(key, 1)]),
        lambda key: Made(frozenset, [key]),
        lambda key: Made(collections.defaultdict, int, {}) if key is None else {(key, 1): 2},
    ],
)
def test_keys_whose_hash_takes_for_ever(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    """The hash of a tuple is computed anew for each way into it, 2^40 of them."""

    class Late:
        """Pickle as the nested tuple, without being hashed here."""

    deep = nested_tuple(40)
    buffer = io.BytesIO()
    pickler = pickle._Pickler(buffer, 4)
    key = Late()
    whole = pickler.save

    def save(value: object, *args: Any, **more: Any) -> None:
        whole(deep if value is key else value, *args, **more)

    pickler.save = save  # type: ignore[method-assign]
    pickler.dump(make(key))
    path = zipped(tmp_path / "w.pt", buffer.getvalue())
    refused(path, r"nest of tuples|no named tensor")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("depth", [1000, 100_000])
@pytest.mark.parametrize("name", ["lists", "dicts", "tuples"])
def test_deep_nesting(tmp_path: Path, depth: int, name: str) -> None:
    codes = {"lists": (b"]", b"a"), "dicts": (b"}X\x01\0\0\0a", b"s"), "tuples": (b"N", b"\x85")}
    start, end = codes[name]
    if name == "tuples":
        data = b"\x80\x02N" + end * depth + b"."
    else:
        data = b"\x80\x02" + start * depth + start[:1] + end * depth + b"."
    refused(zipped(tmp_path / "w.pt", data))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)), (10**30, (1,), (1,)),
        (0, (10**12,), (0,)), (0, (10**30,), (1,)), (0, (2**40, 2**40), (0, 0)), (0, (2,), (1, 1)),
        (0.5, (1,), (1,)), (0, ("a",), (1,)), (0, 3, 1), (True, (1,), (1,)), (None, None, None),
        (0, (1,) * 100, (1,) * 100), (0, (5,), (1,)), (4, (1,), (1,)),
    ],
)  # fmt: skip
def test_views_that_no_tensor_has(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    data = pickled({"w": tensor(offset, size, stride)})
    refused(zipped(tmp_path / "w.pt", data, **{"0": bytes(16)}))


@pytest.mark.parametrize(
    "storage",
    [
        None, 3, "x", [], ("ID",), ("ID", "storage"), ("ID", "module"),
        ("ID", "storage", torch.FloatStorage, "0", "cpu", -1),
        ("ID", "storage", torch.FloatStorage, "0", "cpu", 10**15),
        ("ID", "storage", torch.FloatStorage, "0", "cpu", "4"),
        ("ID", "storage", torch.FloatStorage, "0", "cpu", 3),
        ("ID", "storage", torch.FloatStorage, "../../etc/passwd", "cpu", 4),
        ("ID", "storage", torch.FloatStorage, 0, "cpu", 4),
        ("ID", "storage", torch.FloatStorage, "nowhere", "cpu", 4),
        ("ID", "storage", torch.DoubleStorage, "0", "cpu", 4),
        ("ID", "storage", "FloatStorage", "0", "cpu", 4),
        ("ID", "storage", torch.FloatStorage, "0", "cpu", 4, ("v", 0, 2)),
        ("ID", ["storage"], torch.FloatStorage, "0", "cpu", 4),
    ],
)  # fmt: skip
def test_storages_that_are_not_there(tmp_path: Path, storage: Any) -> None:
    data = pickled({"w": tensor(0, (1,), (1,), storage)})
    refused(zipped(tmp_path / "w.pt", data, **{"0": bytes(16)}))


def test_a_legacy_file_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pt").read_bytes()
    for count in (5, 10**6, 2**62):
        at = whole.rindex(struct.pack("<q", 4))
        changed = whole[:at] + struct.pack("<q", count) + whole[at + 8 :]
        (tmp_path / "w.pt").write_bytes(changed)
        refused(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*(quantize|nested).*:UserWarning")
@pytest.mark.parametrize("make", ["sparse", "quantised", "nested", "meta"])
def test_other_kinds_of_tensors_are_named(tmp_path: Path, make: str) -> None:
    values: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: torch.empty(3, device="meta"),
    }
    torch.save({"blocks.w": values[make](), "v": torch.ones(1)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "'blocks.w' is a tensor of another kind|of unknown type|lists? of")


def test_zip_members_that_share_their_bytes(tmp_path: Path) -> None:
    names = [str(i) for i in range(50)]
    stored = [("ID", "storage", torch.FloatStorage, name, "cpu", 1 << 18) for name in names]
    data = {n: tensor(0, (1 << 18,), (1,), s) for n, s in zip(names, stored, strict=True)}
    path = zipped(tmp_path / "w.pt", pickled(data), **{"0": bytes(1 << 20)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("w/data/0")
        for name in names[1:]:
            info = zipfile.ZipInfo(f"w/data/{name}")
            info.file_size = info.compress_size = first.file_size
            info.header_offset, info.CRC = first.header_offset, first.CRC
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
    refused(path)


def test_a_zip_that_unfolds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickled({"w": tensor(0, (1 << 26,), (1,))}))
        archive.writestr("w/data/0", bytes(1 << 26))
    refused(tmp_path / "w.pt", "compressed")


@pytest.mark.parametrize(
    "code",
    [
        b"\x96" + struct.pack("<Q", 2**40), b"\x96" + struct.pack("<Q", 2**62), b"\x97", b"\x98",
        b"\x8e" + struct.pack("<Q", 2**40), b"\x8b" + struct.pack("<i", 2**31 - 1), b"\x82\x01",
        b"\x95" + struct.pack("<Q", 2**40), b"r" + struct.pack("<I", 2**32 - 1),
        b"\x8d" + b"\xff" * 8,
    ],
)  # fmt: skip
def test_instructions_that_make_room_first(tmp_path: Path, code: bytes) -> None:
    refused(zipped(tmp_path / "w.pt", b"\x80\x05" + code + b"."))


def test_calls_and_states_change_nothing_of_ours(tmp_path: Path) -> None:
    from featcache.models import tensor_unpickler

    before = tensor_unpickler._tensor.__defaults__, dict(vars(tensor_unpickler._tensor))
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for state in (b"}X\x01\0\0\0aK\x01s", b"N}X\x0c\0\0\0__defaults__K\x01\x85s\x86"):
        path = zipped(tmp_path / "w.pt", b"\x80\x02" + name + state + b"b.")
        refused(path, "no named tensor")
    ordered = b"ccollections\nOrderedDict\nN}X\x01\0\0\0aK\x01s\x86b."
    refused(zipped(tmp_path / "w.pt", b"\x80\x02" + ordered), "no named tensor")
    assert before == (
        tensor_unpickler._tensor.__defaults__,
        dict(vars(tensor_unpickler._tensor)),
    )


def test_a_state_dict_of_a_class_of_its_own_is_read(tmp_path: Path) -> None:
    state: Any = collections.defaultdict(list)
    state["a.w"] = torch.ones(2)
    state["b.w"] = nn.Parameter(torch.zeros(3))
    torch.save(state, tmp_path / "w.pt")
    found = restricted_unpickler.load_tensors(tmp_path / "w.pt")
    assert {name: value.tolist() for name, value in found.items()} == {
        "a.w": [1, 1],
        "b.w": [0, 0, 0],
    }


def test_tensors_of_newer_types_and_with_attributes_are_read(tmp_path: Path) -> None:
    marked = torch.arange(3.0)
    marked.note = "x"  # type: ignore[attr-defined]
    state = {"marked": marked, "narrow": torch.arange(3).to(torch.uint16)}
    state["eighth"] = torch.ones(4).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "w.pt")
    found = restricted_unpickler.load_tensors(tmp_path / "w.pt")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert found[name].float().tolist() == value.float().tolist()


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "x" * 5000, "\udc80", "\u202e"])
def test_names_reach_no_terminal_raw(tmp_path: Path, name: str) -> None:
    from featcache import teachers

    torch.save({name: torch.zeros(2), "cls_token": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        teachers.load("timm:vit_tiny_patch16_224,img_size=32,depth=1", str(tmp_path / "w.pt"))
    assert all(char.isprintable() for char in str(caught.value))
    assert len(str(caught.value)) < 1000


def _header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", _header(b"{}", 2**62), _header(b"{}", 100_000_001), _header(b"[]"),
        _header(b"[" * 50_000), _header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        _header(b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        _header(b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        _header(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        _header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + bytes(4),
        _header(b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        _header(b'{"w":3}'), _header(b'{"__metadata__":3}'), _header(b"{}"),
    ],
)  # fmt: skip
def test_safetensors_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    refused(tmp_path / "w.safetensors")


def test_a_whole_file_of_each_form_is_still_read(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0), "n": torch.tensor(2)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        found = read_state(str(tmp_path / name), "a teacher")
        assert found["w"].tolist() == [0, 1, 2]
        assert int(found["n"]) == 2
