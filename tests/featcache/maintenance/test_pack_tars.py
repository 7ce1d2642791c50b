"""Packed tars give back what went in - keys, bytes, labels - through our reader and through plain
webdataset."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image

from featcache import rng
from featcache.commands.pack import command
from featcache.errors import UsageError, UserError
from featcache.maintenance.pack_tars import pack
from featcache.pictures.open_source import open_source
from featcache.pictures.tars import unescape
from tests.conftest import Ran, python
from tests.featcache.pictures.test_picture_bytes import encode


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders; a dot and a per cent sign in a name, capital suffixes, a long path, a folder
    with a dot."""
    files = {
        "cat/one.png": encode(8, 6),
        "cat/a.b%2E.JPEG": encode(9, 6, "JPEG"),
        "dog.2/three.jpg": encode(10, 6, "JPEG", "L"),
        "dog.2/" + "x" * 120 + ".png": encode(11, 6),
        "emu/five.webp": encode(12, 6, "WEBP"),
    }
    return write(tmp_path / "photos", files)


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(featcache_command: Callable[..., Ran]) -> Run:
    """`featcache pack ARGS`: exit status and stderr."""

    def start(*arguments: object) -> tuple[int, str]:
        ran = featcache_command("pack", *arguments)
        return ran.status, ran.err

    return start


def content(shards: list[Path]) -> list[str]:
    return [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]


def members(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def test_open_source_gives_back_keys_bytes_and_labels(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)
    pack(source, tmp_path / "out", 2, seed=3)
    packed = open_source(str(tmp_path / "out/pictures-*.tar"))
    order = rng.permutation(5, 3, 0)
    assert list(packed.keys) == [source.keys[row] for row in order]
    assert [packed.read(i) for i in range(5)] == [source.read(int(row)) for row in order]
    assert packed.labels is not None
    assert source.labels is not None
    assert packed.labels.tolist() == source.labels[order].tolist()
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog.2", "emu"]


def test_plain_webdataset_reads_the_shards(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)
    shards = pack(source, tmp_path / "out", 2, seed=0)
    # webdataset leaves the closing of its files to the garbage collector
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
        gc.collect()
    assert source.labels is not None
    found = {}
    for sample in samples:
        (suffix,) = {"png", "jpg", "jpeg", "webp"} & sample.keys()
        found[unescape(sample["__key__"])] = (sample[suffix], int(sample["cls"]))
    rows = range(len(source))
    assert found == {source.keys[row]: (source.read(row), int(source.labels[row])) for row in rows}


def test_shards_hold_shard_size_pictures_and_bare_headers(classes: Path, tmp_path: Path) -> None:
    shards = pack(open_source(classes), tmp_path / "out", 2, seed=0, prefix="train")
    assert [shard.name for shard in shards] == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]
    assert [len(members(shard)) for shard in shards] == [4, 4, 2]  # a picture and its .cls each
    for member in members(shards[0]):
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
            0,
            0,
            0,
            "",
            "",
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json",
        *(s.name for s in shards),
    ]


def test_a_picture_keeps_the_suffix_of_its_file(classes: Path, tmp_path: Path) -> None:
    shards = pack(open_source(classes), tmp_path / "out", 9, seed=0)
    names = {member.name for member in members(shards[0]) if not member.name.endswith(".cls")}
    assert names == {
        "cat/one.png",
        "cat/a%2Eb%252E.jpeg",
        "dog.2/three.jpg",
        f"dog.2/{'x' * 120}.png",
        "emu/five.webp",
    }


def test_same_pictures_same_bytes_and_the_seed_is_the_order(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)
    first = content(pack(source, tmp_path / "a", 3, seed=0))
    assert content(pack(source, tmp_path / "b", 3, seed=0)) == first
    assert content(pack(source, tmp_path / "c", 3, seed=1)) != first


def test_golden_bytes(tmp_path: Path) -> None:
    """One shard written down in full: ustar headers of two members, contents padded to 512, two
    empty blocks."""
    source = open_source(write(tmp_path / "in", {"k/a.png": b"not a picture"}))
    (shard,) = pack(source, tmp_path / "out", 1, seed=0)

    def block(name: str, data: bytes) -> bytes:
        head = f"{name:\0<100}0000644\0{0:07o}\0{0:07o}\0{len(data):011o}\0{0:011o}\0".encode()
        tail = b"0" + b"\0" * 100 + b"ustar\00000"
        header = head + b" " * 8 + tail
        checksum = f"{sum(header):06o}\0 ".encode()
        return (head + checksum + tail).ljust(512, b"\0") + data.ljust(512, b"\0")

    expected = block("k/a.png", b"not a picture") + block("k/a.cls", b"0")
    assert shard.read_bytes() == expected.ljust(tarfile.RECORDSIZE, b"\0")


def test_flat_folders_have_no_labels(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "in", {"a.png": encode(4, 4), "b.png": encode(5, 4)}))
    (shard,) = pack(source, tmp_path / "out", 10, seed=0)
    assert sorted(member.name for member in members(shard)) == ["a.png", "b.png"]
    assert json.loads((tmp_path / "out/classes.json").read_text()) is None
    assert open_source(shard).labels is None


def test_tars_can_be_packed_again(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)
    pack(source, tmp_path / "one", 2, seed=0)
    first = open_source(str(tmp_path / "one/*.tar"))
    pack(first, tmp_path / "two", 5, seed=1)
    second = open_source(str(tmp_path / "two/*.tar"))
    assert first.labels is not None
    assert second.labels is not None
    assert list(second.keys) == [first.keys[row] for row in rng.permutation(5, 1, 0)]
    assert dict(zip(second.keys, second.labels, strict=True)) == dict(
        zip(first.keys, first.labels, strict=True)
    )
    assert {second.read(i) for i in range(5)} == {source.read(i) for i in range(5)}
    suffixes = {
        Path(member.name).suffix for member in members(tmp_path / "two/pictures-000000.tar")
    }
    # from the first bytes: the names of members are not kept
    assert suffixes == {".png", ".jpg", ".webp", ".cls"}


def test_train_and_test_share_a_folder_when_their_classes_agree(tmp_path: Path) -> None:
    train = open_source(write(tmp_path / "train", {"x/a.png": b"1", "y/b.png": b"2"}))
    test = open_source(write(tmp_path / "test", {"x/c.png": b"3", "y/d.png": b"4"}))
    other = open_source(write(tmp_path / "other", {"x/c.png": b"3", "z/d.png": b"4"}))
    out = tmp_path / "out"
    pack(train, out, 5, seed=0, prefix="train")
    pack(test, out, 5, seed=0, prefix="test")
    with pytest.raises(UserError, match="names other classes"):
        pack(other, out, 5, seed=0, prefix="other")
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json",
        "test-000000.tar",
        "train-000000.tar",
    ]


def test_resize_through_the_command(tmp_path: Path) -> None:
    src = write(
        tmp_path / "in",
        {
            "a/wide.png": encode(40, 20),
            "b/tall.jpg": encode(20, 60, "JPEG"),
            "b/s.png": encode(5, 4),
        },
    )
    arguments = [
        str(src),
        str(tmp_path / "out"),
        "--shard-size",
        "9",
        "--resize",
        "10",
        "--name",
        "train",
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "3 pictures (2 classes) in 1 shard" in result.output
    packed = open_source(str(tmp_path / "out/train-*.tar"))
    sizes = {key: Image.open(io.BytesIO(packed.read(i))).size for i, key in enumerate(packed.keys)}
    assert sizes == {"a/wide": (20, 10), "b/tall": (10, 30), "b/s": (5, 4)}


def test_an_unreadable_picture_leaves_nothing(run: Run, tmp_path: Path) -> None:
    """With --resize every picture is decoded; the bad one comes last, after several shards are
    done."""
    files = {f"{i}.png": encode(8 + i, 6) for i in range(9)}
    bad = int(rng.permutation(9, 0, 0)[-1])
    src = write(tmp_path / "in", files | {f"{bad}.png": files[f"{bad}.png"][:40]})
    status, text = run(src, tmp_path / "out", "--shard-size", 2, "--resize", 4)
    assert status == 1
    assert text.startswith(f"error: resizing '{bad}' of ")
    assert text.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []
    # without --resize its bytes are packed as they are: extraction decides about them
    assert run(src, tmp_path / "out", "--shard-size", 2)[0] == 0


def test_shards_are_never_overwritten(run: Run, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = content(pack(open_source(classes), out, 2, seed=0))
    status, text = run(classes, out, "--shard-size", 3)
    assert (status, text.count("\n")) == (1, 1)
    assert "holds 3 shards already (pictures-000000.tar ...)" in text
    assert content(sorted(out.glob("*.tar"))) == before


def test_what_is_passed_over_is_said(run: Run, classes: Path, tmp_path: Path) -> None:
    (classes / "emu/six.gif").write_bytes(b"GIF89a")
    status, text = run(classes, tmp_path / "out", "--shard-size", 3)
    assert status == 0
    assert text.count("passed over files with other suffixes (1, the first is 'emu/six.gif')") == 1


def test_a_killed_run_is_named(run: Run, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.pictures.packing").mkdir(parents=True)
    status, text = run(classes, tmp_path / "out", "--shard-size", 3)
    assert status == 1
    assert "another run is at work or was killed" in text
    assert (tmp_path / "out/.pictures.packing").is_dir()


def test_a_full_disk_is_one_line(
    run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, text = run(classes, tmp_path / "out", "--shard-size", 3)
    assert (status, text.count("\n")) == (1, 1)
    assert "No space left on device" in text
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--shard-size", 0], 2, "--shard-size 0: a shard holds 1 picture or more"),
        (["--shard-size", 1, "--resize", 0], 2, "--resize 0: the shorter side has 1 pixel or more"),
        (["--shard-size", 1, "--name", "a/b"], 2, "--name 'a/b': letters, digits"),
        ([], 2, "--shard-size N is needed for tars; give 1000, or name OUT.beton"),
    ],
)
def test_wrong_commands(
    run: Run, classes: Path, tmp_path: Path, arguments: list[object], status: int, text: str
) -> None:
    got, said = run(classes, tmp_path / "out", *arguments)
    assert got == status
    assert text in said
    assert not (tmp_path / "out").exists()


def test_no_pictures(run: Run, tmp_path: Path) -> None:
    status, text = run(tmp_path / "nowhere", tmp_path / "out", "--shard-size", 1)
    assert (status, text.count("\n")) == (1, 1)
    assert "no pictures found" in text


def test_out_is_a_file(run: Run, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert run(classes, tmp_path / "out", "--shard-size", 1)[0] == 1


def test_shard_size_is_checked_for_callers_too(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shard-size 0"):
        pack(open_source(classes), tmp_path / "out", 0, seed=0)


def test_help_shows_examples(featcache_command: Callable[..., Ran]) -> None:
    ran = featcache_command("pack", "--help")
    assert ran.status == 0
    assert "  featcache pack photos packed --shard-size 1000\n" in ran.out
    for option in ("--shard-size", "--seed", "--resize", "--name"):
        assert option in ran.out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom featcache.cli import cli\n"
        "print(CliRunner().invoke(cli, ['pack', '--help']).exit_code)\n"
        "print(sorted({'torch', 'webdataset', 'ffcv'} & set(sys.modules)))"
    )
    assert python(code).stdout.split("\n")[:2] == ["0", "[]"]
