"""Parts of the pictures' text are options too: caches are the same either way, and what cannot be
is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.console import keywords
from featcache.console.option import HelpGroup
from featcache.console.picture_options import joined, picture_options
from featcache.errors import UsageError
from featcache.pictures.open_source import open_source
from tests.calls import own_program, silence
from tests.conftest import SYNTHETIC, Ran, files_below
from tests.featcache.console.test_command import EVERY
from tests.featcache.pictures.test_open_source import encoded, write_folder, write_tar

Command = Callable[..., Ran]
WORDS = ("--size", 28, "--levels", "all", "--workers", 1)
PARTS = {"--labels", "--image-member"}


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of two pictures each, with a table of their labels beside them."""
    folder, generator = tmp_path_factory.mktemp("tar"), np.random.default_rng(0)
    members = {
        f"{number}.{suffix}": encoded(
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)), "png"
        )
        for number in range(6)
        for suffix in ("png", "seg.png")
    }
    (folder / "labels.csv").write_text("".join(f"{n},class {n % 2}\n" for n in range(6)))
    return write_tar(folder / "t.tar", members)


def test_every_command_with_images_has_them_and_no_other() -> None:
    found = {
        path: {opt for param in command.params for opt in param.opts}
        for path, command, _ in EVERY
        if path.startswith(("featcache", "student"))
    }
    with_images = [path for path, options in found.items() if "--images" in options]
    assert {"featcache extract", "student train", "student eval knn"} <= {*with_images}
    assert len(with_images) > 10
    assert [path for path in with_images if not found[path] >= PARTS] == []
    others = set(found) - set(with_images)
    assert [path for path in others if "--image-member" in found[path]] == []


def test_a_part_an_option_and_a_keyword_write_the_same_cache(
    tar: Path, tmp_path: Path, featcache_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tar.parent)

    def extract(name: str, *words: object) -> dict[str, bytes]:
        ran = featcache_command(
            "extract", "--teacher", SYNTHETIC, *WORDS, "--out", tmp_path / name, *words
        )
        assert ran.status == 0, ran.err
        return files_below(tmp_path / name)

    by_part = extract("part", "--images", "t.tar#labels=labels.csv#image-member=seg.png")
    beside = ("--labels", "labels.csv", "--image-member", "seg.png")
    assert extract("option", "--images", "t.tar", *beside) == by_part
    assert extract("both", "--images", "t.tar#image-member=seg.png", *beside[:2]) == by_part
    monkeypatch.setenv("FEATCACHE_IMAGES", "t.tar")
    assert extract("variable", *beside) == by_part
    plain = extract("plain")
    assert plain.keys() == by_part.keys()
    differing = [name for name in plain if plain[name] != by_part[name]]
    assert any(name.startswith("shards/") for name in differing), differing

    silence()
    with own_program(monkeypatch, tmp_path / "home"):
        done = featcache.extract(
            teacher=SYNTHETIC, images="t.tar", labels=Path("labels.csv"), image_member="seg.png",
            out=tmp_path / "call", size=28, levels="all", workers=1,
        )  # fmt: skip
    assert files_below(tmp_path / "call") == by_part
    with featcache.open(tmp_path / "part") as cache:
        assert done.facts["id"] == cache.manifest["id"]
        source = open_source(cache.manifest["provenance"]["source"])
    assert source.classes == ["class 0", "class 1"]


def test_an_option_reads_the_pictures_of_another_command(
    tar: Path, tmp_path: Path, featcache_command: Command
) -> None:
    """Verify recomputes the rows by the member that the option names, and by no other."""
    spec = f"{tar}#image-member=seg.png"
    cache = tmp_path / "c"
    words = ("--teacher", SYNTHETIC, *WORDS)
    assert featcache_command("extract", *words, "--images", spec, "--out", cache).status == 0
    verify = ("verify", cache, "--recompute", 6)
    assert featcache_command(*verify, "--images", tar, "--image-member", "seg.png").status == 0
    ran = featcache_command(*verify, "--images", tar)
    assert ran.status == 1
    assert "other pixels" in ran.error
    ran = featcache_command(*verify, "--image-member", "seg.png")
    assert "--image-member seg.png says how --images is read, which is not given" in ran.error


def test_what_cannot_be_is_one_line(
    tar: Path, tmp_path: Path, featcache_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "f", "a_1.png", "b_1.png")
    beton = tmp_path / "set.beton"
    beton.write_bytes(b"x")
    write_folder(tmp_path / "f#labels=prefix", "a_1.png")
    for words, status, said in (
        ((tar, "--image-member", "exr"), 1, "1 tar holds none with a member KEY.exr"),
        ((tar, "--image-member", "a/b"), 2, "#image-member=a/b is no suffix of a tar's member"),
        ((tar, "--image-member", ""), 2, "--image-member '': a value is needed"),
        ((tar, "--image-member", "png#labels=x"), 2, "a part #NAME= stands in a name"),
        ((f"{tar}#image-member=png", "--image-member", "png"), 2, "say #image-member=png them"),
        ((tar, "--labels", tmp_path / "no.csv"), 1, "or prefix for the first part of each key"),
        ((tar, "--labels", "s3://a/b.csv"), 2, "no place of this machine"),
        ((folder, "--image-member", "png"), 2, "(or --image-member) is given, and for a folder"),
        ((beton, "--labels", "prefix"), 2, "and for a .beton no part is allowed; leave it out"),
        ((beton, "--image-member", "png"), 2, "and for a .beton no part is allowed; leave it out"),
        ((f"{beton}#label-column=x",), 2, "and for a .beton no part is allowed; leave it out"),
        ((f"{folder}#labels=prefix", "--image-member", "png"), 2, "stands in a name"),
        ((f"{tar}#image-membr=png",), 2, "#image-membr= is no part of a spec: did you mean #image"),
        ((f"{tar}#Image_Member=png",), 2, "did you mean #image-member=?"),
        (("", "--labels", "prefix"), 2, "--labels prefix says how --images is read, which is not"),
    ):
        ran = featcache_command(
            "extract", "--teacher", SYNTHETIC, "--out", tmp_path / "c", "--images", *words
        )
        assert (ran.status, ran.out) == (status, ""), words
        assert said in ran.error, words
        assert not (tmp_path / "c").exists()


def test_a_separator_in_the_text_goes_with_the_option(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", "a-1.png", "b-1.png")
    params = picture_options("images_spec", group=HelpGroup.INPUT, help="Pictures.")
    given = {"images_spec": f"{folder}#separator=-", "labels": "prefix", "image_member": None}
    found = joined(params, {**given, "other": 1})
    assert found == {"images_spec": f"{folder}#labels=prefix#separator=-", "other": 1}
    assert open_source(found["images_spec"]).classes == ["a", "b"]


def test_a_keyword_of_the_wrong_kind_is_named() -> None:
    params = picture_options("images", group=HelpGroup.INPUT, help="Pictures.")
    none = dict.fromkeys(("images", "labels", "image_member"))
    assert keywords.read(params, none) == {"images": None}
    for name in ("labels", "image_member"):
        with pytest.raises(UsageError, match=f"Invalid value for {name}: True is no text"):
            keywords.read(params, {**none, "images": "a", name: True})
