"""Members of tars are found as tarfile finds them, links, sparse members and appended tars too; and
what is damaged or forged is one line."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.passed_over import passed_over
from featcache.pictures.source import SUFFIXES, PictureError
from tests.featcache.pictures.test_open_source import PNG, write_tar

Header = tuple[str, bytes, dict[str, object]]  # name, content, fields of TarInfo


def make_tar(path: Path, *members: Header, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            for field, value in {"size": len(data), **fields}.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Header:
    return name, b"", {"type": kind, "linkname": target, "size": 0}


def picture(name: str, data: bytes = PNG) -> Header:
    return name, data, {}


def reasons(path: object) -> dict[str, tuple[int, str]]:
    return {row.reason: (row.count, row.first) for row in passed_over(open_source(str(path)))}


# ---------------------------------------------------------------- links


def test_links_are_read_as_the_member_they_lead_to(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "t.tar",
        link("d/early.png", "../a.png"),
        picture("a.png", PNG + b"a"),
        ("a.cls", b"3", {}),
        picture("d/b.png", PNG + b"b"),
        link("hard.png", "./a.png", tarfile.LNKTYPE),
        link("hard.cls", "a.cls", tarfile.LNKTYPE),
        link("d/soft.png", "b.png"),
        link("chain.png", "d/soft.png"),
    )
    source = open_source(path)
    read = {key: source.read(i)[len(PNG) :] for i, key in enumerate(source.keys)}
    wanted = {"d/early": b"a", "a": b"a", "d/b": b"b", "hard": b"a", "d/soft": b"b", "chain": b"b"}
    assert read == wanted
    assert list(source.keys) == list(wanted)  # the order of the tar
    assert passed_over(source) == ()


def test_links_out_of_the_tar_and_in_circles_are_said(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    path = make_tar(
        tmp_path / "t.tar",
        picture("a.png"),
        link("out.png", f"{tmp_path}/secret.png"),
        link("up.png", "../secret.png"),
        link("one.png", "two.png"),
        link("two.png", "one.png"),
    )
    assert list(open_source(path).keys) == ["a"]
    assert reasons(path) == {"links to what is no file of their tar": (4, "one.png")}


def test_pipes_and_devices_in_a_tar_are_said(tmp_path: Path) -> None:
    kinds = [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
    odd = [(f"x{i}.png", b"", {"type": kind, "size": 0}) for i, kind in enumerate(kinds)]
    folder = ("d.png", b"", {"type": tarfile.DIRTYPE, "size": 0})
    unknown = ("z.png", PNG, {"type": b"Y"})
    path = make_tar(tmp_path / "t.tar", folder, *odd, unknown, picture("d.png/a.png"))
    assert list(open_source(path).keys) == ["d.png/a"]
    assert reasons(path) == {
        "members that are pipes, devices or of an unknown kind": (4, "x0.png"),
    }


# ---------------------------------------------------------------- sparse members


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar makes them")
@pytest.mark.parametrize("how", ["gnu", "posix0.0", "posix0.1", "posix1.0"])
def test_sparse_members_are_read_with_their_zeros(tmp_path: Path, how: str) -> None:
    """A picture with a hole, in each form that GNU tar stores: what is read is the file."""
    with (tmp_path / "a.png").open("wb") as file:
        file.write(PNG)
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "b.png").write_bytes(PNG)
    form, _, version = how.partition("posix")
    options = ["--format=gnu"] if form else ["--format=posix", f"--sparse-version={version}"]
    subprocess.run(["tar", "-cSf", "t.tar", *options, "a.png", "b.png"], cwd=tmp_path, check=True)
    assert (tmp_path / "t.tar").stat().st_size < 1 << 18
    source = open_source(tmp_path / "t.tar")
    assert list(source.keys) == ["a", "b"]
    assert source.read(0) == (tmp_path / "a.png").read_bytes()
    assert source.read(1) == PNG


def sparse(path: Path, headers: dict[str, str], data: bytes) -> Path:
    return make_tar(path, ("a.png", data, {"pax_headers": headers}), picture("b.png"))


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "0,4096", "GNU.sparse.size": "4096"},  # more than is stored
        {"GNU.sparse.map": "0,10,-20,5", "GNU.sparse.size": "4096"},
        {"GNU.sparse.map": "0,100", "GNU.sparse.size": "50"},
        {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(1 << 70)},
        {"GNU.sparse.map": "a,b", "GNU.sparse.size": "50"},
    ],
)
def test_forged_sparse_maps_are_one_line(tmp_path: Path, headers: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"t\.tar' is damaged") as caught:
        open_source(sparse(tmp_path / "t.tar", headers, PNG))
    assert "\n" not in str(caught.value)


def test_a_huge_sparse_picture_is_not_made(tmp_path: Path) -> None:
    headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(1 << 50)}
    source = open_source(sparse(tmp_path / "t.tar", headers, PNG))
    with pytest.raises(PictureError, match="a picture has at most"):
        source.read(0)


def test_an_unknown_sparse_form_is_not_decoded_from_its_map(tmp_path: Path) -> None:
    headers = {"GNU.sparse.major": "2", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "40"}
    path = sparse(tmp_path / "t.tar", headers, PNG)
    assert list(open_source(path).keys) == ["b"]
    assert reasons(path) == {
        "members that are pipes, devices or of an unknown kind": (1, "a.png"),
    }


# ---------------------------------------------------------------- samples


def test_a_sample_with_one_dotted_picture_takes_it(tmp_path: Path) -> None:
    members = {
        "s1.png": PNG, "s1.cls": b"1",
        "n/a.image.jpg": PNG, "n/a.cls": b"2", "n/a.json": b"{}",
        "photo 2.0.png": PNG, "photo 2.0.cls": b"3",
        "img.v2.PNG": PNG, "img.cls": b"4",
    }  # fmt: skip
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert list(source.keys) == ["s1", "n/a.image", "photo 2.0", "img.v2"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 2, 3, 4]
    assert passed_over(source) == ()


def test_others_beside_a_plain_picture_and_several_without_one_are_counted(tmp_path: Path) -> None:
    names = ["a.png", "a.mask.png", "a.depth.png", "b.left.jpg", "b.right.jpg", "c.png"]
    path = write_tar(tmp_path / "t.tar", dict.fromkeys(names, PNG))
    assert list(open_source(path).keys) == ["a", "c"]
    assert reasons(path) == {
        "pictures beside the plain one of their sample": (2, "a.depth.png"),
        "pictures of samples that have several and no plain one (KEY.jpg) or #image-member=": (
            2,
            "b.left.jpg",
        ),
    }


def test_hidden_members_and_samples_without_a_picture_are_counted(tmp_path: Path) -> None:
    names = ["a.png", "a.txt", "._a.png", "__MACOSX/._a.png", ".png", "b.gif", "b.cls", "meta.json"]
    names += ["README.md", "classes.json"]
    path = write_tar(tmp_path / "t.tar", dict.fromkeys(names, PNG))
    assert list(open_source(path).keys) == ["a"]
    assert reasons(path) == {
        "hidden pictures": (3, "._a.png"),
        "files with other suffixes": (2, "b.gif"),
    }


# ---------------------------------------------------------------- what follows an end mark


def test_tars_that_were_put_behind_each_other_are_read_whole(tmp_path: Path) -> None:
    parts = [
        write_tar(tmp_path / f"{i}.tar", {f"k{i}{j}.png": PNG + bytes([i, j]) for j in range(2)})
        for i in range(3)
    ]
    (tmp_path / "cat").mkdir()
    path = tmp_path / "cat/x.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    source = open_source(path)
    assert list(source.keys) == ["k00", "k01", "k10", "k11", "k20", "k21"]
    assert source.read(4) == PNG + bytes([2, 0])
    assert passed_over(source) == ()


def hole(path: Path, member: int, blocks: int = 1) -> Path:
    """Zeros in place of a member's header, and of what follows it."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[member].offset
    data[at : at + blocks * 512] = bytes(blocks * 512)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("member", [0, 1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_header_lost_to_zeros_is_damage(tmp_path: Path, member: int, blocks: int) -> None:
    members = {f"k{i}.png": PNG + bytes([1]) * 2000 for i in range(4)}
    path = hole(write_tar(tmp_path / "t.tar", members), member, blocks)
    if member == 3 and blocks > 1:  # nothing tells it from an end mark and what it says
        assert reasons(path) == {"tars with other data after their end mark": (1, str(path))}
        return
    with pytest.raises(UserError, match=r"t\.tar' is damaged: zeros stand at byte"):
        open_source(path)


def test_a_header_of_an_empty_member_lost_to_zeros_is_said(tmp_path: Path) -> None:
    path = hole(write_tar(tmp_path / "t.tar", {"a.png": PNG, "b.png": b"", "c.png": PNG}), 1)
    assert list(open_source(path).keys) == ["a", "c"]
    assert reasons(path) == {
        "blocks of zeros between members, where a header may be lost": (1, str(path)),
    }


def test_a_header_lost_to_other_bytes_is_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {f"k{i}.png": PNG for i in range(4)})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[2].offset
    data[at : at + 512] = b"x" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: what stands at byte \d+ is no header"):
        open_source(path)


# ---------------------------------------------------------------- forged headers


def forged(path: Path, kind: bytes, size: bytes) -> Path:
    """A tar of three pictures; the second header has another kind and size, and their checksum."""
    path = write_tar(path, {f"k{i}.png": PNG for i in range(3)})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[1].offset
    header = data[at : at + 512]
    header[124:136], header[156:157] = size.ljust(12, b"\0"), kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    path.write_bytes(data)
    return path


def opened_or_refused(path: Path) -> list[str]:
    """The keys of a tar whose pictures are all read; empty where one line says why not."""
    try:
        source = open_source(path)
        for i in range(len(source)):
            source.read(i)
    except (UserError, PictureError) as error:
        text = str(error)
    else:
        return list(source.keys)
    assert "\n" not in text
    assert len(text) < 600
    return []


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\xff" * 11, b"77777777777",
     b"\x80" + (1 << 62).to_bytes(11, "big"), b"zz", b"-1"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"S", b"g"])
def test_forged_sizes_are_one_line_and_read_nothing(
    tmp_path: Path, size: bytes, kind: bytes
) -> None:
    assert opened_or_refused(forged(tmp_path / "t.tar", kind, size)) == []


@given(place=st.integers(0, 4 * 1024 - 1), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_gives_a_source_or_one_line(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("changed")
    path = make_tar(
        root / "t.tar",
        picture("ü" * 60 + "/" + "x" * 120 + ".png"),  # a PAX header
        picture("b.png"),
        link("c.png", "b.png"),
    )
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)
    opened_or_refused(path)


def test_thousands_of_headers_for_one_member_are_one_line(tmp_path: Path) -> None:
    """tarfile calls itself for each PAX header of a member."""
    one = tarfile.TarInfo("x").create_pax_global_header({"comment": "x"})
    extended = tarfile.TarInfo._create_pax_generic_header(  # type: ignore[attr-defined]
        {"comment": "x"}, tarfile.XHDTYPE, "utf-8"
    )
    for header in (one, extended):
        whole = write_tar(tmp_path / "whole.tar", {"a.png": PNG}).read_bytes()
        (tmp_path / "t.tar").write_bytes(header * 3000 + whole)
        with pytest.raises(UserError, match=r"t\.tar"):
            open_source(tmp_path / "t.tar")


@pytest.mark.parametrize("name", ["../../x.png", "a/../../x.png", "/../x.png"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leads out of its folder"):
        open_source(write_tar(tmp_path / "t.tar", {name: PNG}))


def test_absolute_names_stay_names(tmp_path: Path) -> None:
    assert list(open_source(write_tar(tmp_path / "t.tar", {"/abs/x.png": PNG})).keys) == ["/abs/x"]


def test_names_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", picture("a\udcff.png"), format=tarfile.GNU_FORMAT)
    with pytest.raises(UserError, match="is not UTF-8"):
        open_source(path)
    headers = {"path": "a\0b.png"}
    with pytest.raises(UserError, match="holds a NUL"):
        open_source(make_tar(tmp_path / "n.tar", ("a.png", PNG, {"pax_headers": headers})))


def test_compressed_tars_say_what_to_do(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "t.tar", {"a.png": PNG}).read_bytes()
    (tmp_path / "g.tar").write_bytes(gzip.compress(data))
    (tmp_path / "t.tar.bz2").write_bytes(bz2.compress(data))
    for name, kind in (("g.tar", "gzip"), ("t.tar.bz2", "bzip2")):
        with pytest.raises(UserError, match=f"{kind}-compressed: .* decompress it"):
            open_source(tmp_path / name)


def test_a_tar_that_shrinks_or_becomes_a_pipe_is_an_error_of_the_disk(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "t.tar", {"a.png": PNG, "b.png": PNG}))
    os.truncate(tmp_path / "t.tar", 1500)
    with pytest.raises(OSError, match="ends within it"):
        source.read(1)
    (tmp_path / "t.tar").unlink()
    os.mkfifo(tmp_path / "t.tar")
    with pytest.raises(OSError, match="seek"):
        source.read(0)


# ---------------------------------------------------------------- against an independent reader

STEMS = st.sampled_from(["a", "b", "c/a", "c/b.d", "e 1", "ü"])
ENDS = st.sampled_from(["png", "JPG", "image.jpg", "v2.0.webp", "txt", "cls", "gif", "tar.png"])
MEMBERS = st.lists(st.tuples(STEMS, ENDS, st.integers(0, 3)), max_size=9, unique_by=lambda m: m[:2])


@given(
    members=MEMBERS,
    links=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=3),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    split=st.integers(0, 9),
)
def test_pictures_are_those_that_tarfile_and_the_rule_give(
    members: list[tuple[str, str, int]],
    links: list[tuple[int, bool]],
    format: int,
    split: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Tars of random members, links and forms, two behind each other: names and bytes are read by
    tarfile, the rule is written a second time. Each picture is read, or counted."""
    root = tmp_path_factory.mktemp("random")
    files = [picture(f"{stem}.{end}", PNG + bytes([fill]) * fill) for stem, end, fill in members]
    named = [
        link(f"l{i}.png", files[at][0], tarfile.SYMTYPE if soft else tarfile.LNKTYPE)
        for i, (at, soft) in enumerate(links)
        if at < len(files)
    ]
    whole = make_tar(root / "whole.tar", *files, *named, format=format)
    first = make_tar(root / "first.tar", *files[:split], format=format)
    second = make_tar(root / "second.tar", *files[split:], *named, format=format)
    (root / "t.tar").write_bytes(first.read_bytes() + second.read_bytes())
    wanted, left_out = by_the_rule(whole)
    if not wanted or "two" in wanted:
        words = "is used by two pictures" if wanted else "no pictures found"
        with pytest.raises(UserError, match=words):
            open_source(root / "t.tar")
        return
    source = open_source(root / "t.tar")
    assert {key: source.read(i) for i, key in enumerate(source.keys)} == wanted
    other = "files with other suffixes"
    counted = sum(row.count for row in passed_over(source) if row.reason != other)
    assert counted == left_out


def by_the_rule(path: Path) -> tuple[dict[str, bytes], int]:
    """Pictures of a tar by key, and how many are left out."""
    with tarfile.open(path) as tar:
        content = {}
        for info in tar.getmembers():
            file = tar.extractfile(info)
            assert file is not None
            content[info.name] = file.read()
    names = [name for name in content if Path(name).suffix.lower() in SUFFIXES]
    key = {name: str(Path(name).parent / Path(name).name.split(".")[0]) for name in names}
    plain = [name for name in names if Path(name).name.count(".") == 1]
    count = Counter(key.values())
    alone = [name for name in names if name not in plain and count[key[name]] == 1]
    chosen = {key[name]: content[name] for name in plain}
    if len(chosen) < len(plain):
        chosen["two"] = b""  # a.png and a.JPG
    chosen |= {name.rpartition(".")[0]: content[name] for name in alone}
    return chosen, len(names) - len(plain) - len(alone)
