"""`extract --for` chooses what the recipes need; the cache is the one of the options spelled out,
`info` says that it serves them, and `student train` takes it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import skimage

from featcache.commands.extract import command
from featcache.console import for_recipes
from featcache.console.extract_options import ExtractOptions
from featcache.console.picture_options import joined
from featcache.errors import UsageError, UserError
from student import recipes
from tests import student_fixtures as fx
from tests.conftest import files_below
from tests.featcache.teachers.test_families import small_clip

SIX = "synthetic:levels=6,tokens=16,width=24,size=32"
GRID = "synthetic:levels=5,tokens=196,width=8,size=112"  # the grid of dvae's tokens
MINE = """
raise SystemExit("it was run")
SERVED_BY = {"fields": ("features", "NAME/features"), "levels": "last:2", "mask_ratio": 0.5}
"""
CHOSEN = {
    "cae": "--teacher clip-b16 --teacher dvae --levels last:1 --scale 0.08,1",
    "caev2": "--teacher clip-b16 --levels last:1 --scale 0.4,1 --jitter 0.4",
    "fd": "--teacher clip-b16 --levels last:1 --scale 0.08,1",
    "kd": "--teacher clip-b16 --levels last:1",
    "mae": "",
    "maskalign": "--teacher clip-b16 --levels last:5",
    "milan": "--teacher clip-b16 --levels last:1",
    "mralign": "--teacher clip-b16 --levels last:5",
    "mrmae": "--teacher clip-b16 --levels last:1",
    "mvp": "--teacher clip-b16 --levels last:1",
}


def parse(line: str) -> dict[str, Any]:
    return joined(command.params, command.make_context("extract", shlex.split(line)).params)


def choose(line: str) -> for_recipes.Choice:
    return for_recipes.choose(ExtractOptions(**parse(line)))


# --- what is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe_by_default(name: str) -> None:
    choice = choose(f"--for {name}")
    assert " ".join(choice.words) == CHOSEN[name]
    # the options are those of the words, typed in place of --for
    assert choice.options == ExtractOptions(**{**parse(CHOSEN[name]), "recipes": name})
    assert choice.record == {"for": {"recipes": [name], "options": CHOSEN[name].split()}}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("line", "words", "names", "levels"),
    [
        ("--for maskalign,mrmae", CHOSEN["maskalign"], ["clip-b16"], ["last:5"]),
        ("--for mrmae,mae,maskalign,mrmae", CHOSEN["maskalign"], ["clip-b16"], ["last:5"]),
        (
            "--for cae,maskalign --views 4",
            "--teacher clip-b16 --teacher dvae --levels last:5 --scale 0.08,1",
            ["clip-b16", "dvae"],
            ["last:5"],
        ),
        ("--for maskalign --teacher dino-b16", "--levels last:5", ["dino-b16"], ["last:5"]),
        ("--for maskalign --levels all", "--teacher clip-b16", ["clip-b16"], ["all"]),
        (
            "--for maskalign --teacher dino-b16 --levels dino-b16=last:6",
            "",
            ["dino-b16"],
            ["dino-b16=last:6"],
        ),
        (
            "--for cae --teacher dino-b16",
            "--teacher dvae --levels last:1 --scale 0.08,1",
            ["dino-b16", "dvae"],
            ["last:1"],
        ),
        (
            "--for cae --teacher dvae",
            "--teacher clip-b16 --levels last:1 --scale 0.08,1",
            ["clip-b16", "dvae"],
            ["last:1"],
        ),
        ("--for caev2 --policy caev2", CHOSEN["kd"], ["clip-b16"], ["last:1"]),
        ("--for maskalign --policy cae --views 4", CHOSEN["maskalign"], ["clip-b16"], ["last:5"]),
        ("--for fd --scale 0.05,1 --views 9", CHOSEN["kd"], ["clip-b16"], ["last:1"]),
        ("--for kd --size 112", CHOSEN["kd"], ["clip-b16"], ["last:1"]),
    ],
)
def test_what_is_given_wins(line: str, words: str, names: list[str], levels: list[str]) -> None:
    choice = choose(line)
    assert " ".join(choice.words) == words
    assert (list(choice.options.names), list(choice.options.levels)) == (names, levels)


def test_without_for_nothing_changes() -> None:
    choice = choose("--teacher clip-b16")
    assert (choice.options, choice.record) == (ExtractOptions(**parse("--teacher clip-b16")), {})
    assert choice.nothing_to_extract == ""


def own_file(folder: Path, other: str, more: str = "") -> Path:
    path = folder / "mine.py"
    path.write_text(MINE.replace("NAME", other).replace("0.5}", f"0.5{more}}}"))
    return path


def test_an_own_recipe_and_a_second_teacher(tmp_path: Path) -> None:
    path = own_file(tmp_path, "dino-b16", ", 'teacher': 'dino-s16', 'size': 112, 'jitter': 1 / 3")
    with pytest.raises(UserError, match="ValueError"):  # a quotient is no literal
        choose(f"--for {path}")
    path = own_file(tmp_path, "dino-b16", ", 'teacher': 'dino-s16', 'size': 112, 'jitter': 0.125")
    assert " ".join(choose(f"--for {path}").words) == (
        "--teacher dino-s16 --teacher dino-b16 --levels last:2 --levels dino-b16=last:1 "
        "--size 112 --jitter 0.125"
    )
    given = choose(f"--for {path} --levels dino-b16=last:3")
    assert given.options.levels == ("dino-b16=last:3", "last:2")
    assert choose(f"--for {path} --levels last:4").options.levels == ("last:4",)


def test_an_own_recipe_names_no_code(tmp_path: Path) -> None:
    path = own_file(tmp_path, "./other.py", ", 'teacher': 'clip-b16'")
    with pytest.raises(UsageError, match=r"'\./other\.py' is named by a recipe: code and files"):
        choose(f"--for {path}")
    given = choose(f"--for {path} --teacher clip-b16 --teacher ./other.py")
    assert given.options.names == ("clip-b16", "./other.py")


# --- what is said ---------------------------------------------------------------------------------


def refused(*words: str) -> str:
    ran = fx.feat("extract", *words)
    assert (ran.status, ran.out) == (2, "")
    return ran.line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--for maskalgin", "unknown recipe 'maskalgin': did you mean maskalign, mralign?"),
        ("--for maskalign,", "unknown recipe ''"),
        (
            "--for caev2,maskalign,mae",
            "jitter is 0.4 for caev2, 0 for maskalign; make 2 caches, with 2 commands: --for caev2 "
            "and --for maskalign",
        ),
        ("--for maskalign,fd", "give --views 4, or make 2 caches, with 2 commands: --for mask"),
        ("--for maskalign --scale 0.3,1", "needs views of --scale 0.2,1, 0.3,1 is given"),
        ("--for caev2 --policy cae", "--jitter 0.4, 0 is given"),
        ("--for maskalign --policy caev2", "--jitter 0, 0.4 is given"),
        ("--for mae", "no pictures given"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_before_anything_is_read(line: str, message: str) -> None:
    if line == "--for mae":
        line += f" --teacher {SIX}"  # for the sake of which something is extracted
    assert message in refused(*line.split())


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("maskalign", ("--levels", "6"), "--levels 6, levels 2, 3, 4, 5 are not stored (--levels "),
        ("milan", (), "its teacher has no projection (student train --set target=f)"),
        ("fd", ("--tokens", "ranked", "--keep", "4"), "--keep 4, 4 patches are kept, all are r"),
        ("mrmae", ("--size", "30"), "views of 30 pixels cannot be cut into the teacher's 4 x 4"),
        ("cae", ("--weights", "dvae=random:0"), f"dvae has 196 patches, {SIX} has 16"),
    ],
)  # fmt: skip
def test_what_the_teacher_given_does_not_serve(
    recipe: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    images = ("--images", str(fx.pictures()), "--size", "32", "--out", str(tmp_path / "c"))
    line = refused("--for", recipe, "--teacher", SIX, *images, *options)
    assert line.startswith(f"error: --for {recipe}: with --teacher {SIX} ")
    assert message in line
    assert line.endswith(f"or leave {recipe} out of --for")
    assert not (tmp_path / "c").exists()


def test_a_second_teacher_whose_last_level_is_not_stored(tmp_path: Path) -> None:
    other = "synthetic:levels=2,tokens=16,width=8,size=32"
    path = own_file(tmp_path, other)
    teachers = ("--teacher", SIX, "--teacher", other, "--images", str(fx.pictures()))
    common = ("--for", str(path), *teachers, "--size", "32", "--out", str(tmp_path / "c"))
    line = refused(*common, "--levels", f"{other}=1")
    assert f"level 2 of {other} is not stored (--levels {other}=last:1)" in line
    line = refused(*common, "--tokens", "ranked", "--keep", "12")
    assert f"12 patches of {other} are kept (--keep), all are read" in line
    assert fx.feat("extract", *common).status == 0


def test_recipes_without_a_cache_are_one_line() -> None:
    ran = fx.good(fx.feat("extract", "--for", "mae"))
    assert (ran.out, ran.err) == ("--for mae: no cache is read, nothing to extract\n", "")
    ran = fx.good(fx.feat("extract", "--for", "mae", "--json"))
    assert ran.json == {
        "cache": None,
        "complete": True,
        "for": {"recipes": ["mae"], "options": []},
    }


def test_what_was_chosen_is_said(tmp_path: Path) -> None:
    common = ("--images", str(fx.pictures()), "--size", "32", "--out", str(tmp_path / "c"))
    words = ("extract", "--for", "mrmae,mae", "--teacher", SIX, *common)
    for mode in (("--dry-run",), ()):
        ran = fx.good(fx.feat(*words, "--json", *mode))
        assert ran.err.splitlines()[0] == (
            "note: --for mrmae,mae: --levels last:1; mae: no cache is read; "
            "mrmae: published with another teacher, so train with --cache"
        )
        assert ran.json["for"] == {"recipes": ["mrmae", "mae"], "options": ["--levels", "last:1"]}
        assert ran.json["levels"] == [6]
    ran = fx.good(fx.feat(*words, "--levels", "last:2", "--dry-run", "--out", str(tmp_path / "d")))
    assert ran.err.startswith("note: --for mrmae,mae: all that they need is given; mae: ")


# --- what is made ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cache_is_that_of_the_options_spelled_out(tmp_path: Path) -> None:
    teachers = ("--teacher", GRID, "--weights", "dvae=random:0", "--batch-size", "4")
    images = ("--images", str(fx.save_pictures(tmp_path / "p", 3)), "--views", "4")
    common = (*teachers, *images)
    fx.good(fx.feat("extract", "--for", "maskalign,fd,cae", *common, "--out", str(tmp_path / "a")))
    spelled = ("--teacher", "dvae", "--levels", "last:5", "--scale", "0.08,1")
    fx.good(fx.feat("extract", *common, *spelled, "--out", str(tmp_path / "b")))
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    serves = fx.good(fx.feat("info", str(tmp_path / "a"), "--json")).json["serves"]
    assert (serves["maskalign"], serves["fd"], serves["cae"]) == ("", "", "")
    # it goes on, and is complete, by the same command
    ran = fx.feat("extract", "--for", "maskalign,fd,cae", *common, "--out", str(tmp_path / "a"))
    assert "was complete already" in fx.good(ran).out


def test_adding_takes_the_teacher_of_the_cache(tmp_path: Path) -> None:
    images = ("--images", str(fx.save_pictures(tmp_path / "p", 3)), "--out", str(tmp_path / "c"))
    fx.good(fx.feat("extract", "--for", "mrmae", "--teacher", SIX, "--size", "32", *images))
    ran = fx.good(
        fx.feat("extract", "--for", "maskalign", "--size", "32", *images, "--add", "--json")
    )
    assert ran.json["for"]["options"] == ["--teacher", SIX, "--levels", "last:5"]
    serves = fx.good(fx.feat("info", str(tmp_path / "c"), "--json")).json["serves"]
    assert (serves["mrmae"], serves["maskalign"]) == ("", "")


def serve(recipe: str, folder: Path, *options: str) -> None:
    """Extract for recipes; then `info` says that each is served, and training takes the cache."""
    cache = folder / "c"
    images = ("--images", str(fx.save_pictures(folder / "p", 4)), "--out", str(cache))
    fx.good(fx.feat("extract", "--for", recipe, *images, *options))
    for name in recipe.split(","):
        assert fx.good(fx.feat("info", str(cache), "--json")).json["serves"][name] == ""
        words = ("--recipe", name, "--cache", cache, "--set", fx.RECIPES[name][0])
        more = ("--device", "cpu", "--batch-size", "4", "--out", folder / "r", "--dry-run")
        fx.good(fx.stud("train", *words, *more))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "recipe", sorted({*recipes.names(), "maskalign,milan,mrmae"} - {"mae", "cae"})
)
def test_training_takes_it(recipe: str, tmp_path: Path) -> None:
    """A small CLIP of 4 x 4 patches, which has a projection; drawn weights."""
    config = small_clip(tmp_path, image_size=32, patch_size=8, layers=6)
    teacher = ("--teacher", f"open_clip:{config}", "--weights", "random:0", "--size", "32")
    serve(recipe, tmp_path, *teacher)


@pytest.mark.slow
def test_training_takes_its_tokens(tmp_path: Path) -> None:
    serve("cae", tmp_path, "--teacher", GRID, "--weights", "dvae=random:0", "--size", "112")


@pytest.mark.slow
def test_training_finds_it(tmp_path: Path) -> None:
    """The recipes' own teacher, drawn; the cache is found by what they need."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea.png", "coffee.png"):
        (photos / name).write_bytes((Path(skimage.__file__).parent / "data" / name).read_bytes())
    images = ("--images", str(photos), "--weights", "random:0")
    names = [name for name in recipes.names() if name not in ("mae", "cae", "caev2", "fd")]
    home = tmp_path / "home"
    fx.good(fx.feat("extract", "--for", ",".join(names), *images, home=home))
    fx.good(fx.feat("extract", "--for", "caev2", *images, home=home))
    for name in (*names, "caev2"):
        words = ("--recipe", name, "--images", photos, "--set", fx.RECIPES[name][0])
        out = ("--device", "cpu", "--batch-size", "2", "--out", tmp_path / "r", "--dry-run")
        fx.good(fx.stud("train", *words, *out, home=home))
