"""From a recipe's needs to a cache: facts, refusals, the command that makes what is missing, the
search, the join."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from featcache.catalog import extract_command
from featcache.errors import IdentityError, UserError
from featcache.pictures.open_source import open_source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.storage import json_file, manifest
from student import checkpoint, recipes
from student.setup import cache_match
from tests import student_fixtures as fx

ONE = ("--steps", "1", "--batch-size", "8")
OWN_TEACHER = (f"teacher={fx.TEACHER}", "teacher_depth=4", "teacher_width=24")


def run_command(line: str, home: Path) -> fx.Ran:
    """The extract command that an error proposes, run as it stands."""
    words = shlex.split(line.split("featcache extract", 1)[1])
    return fx.feat("extract", *words, home=home)


# --- facts ----------------------------------------------------------------------------------------


def test_facts_of_the_cache_fill_the_configuration(tmp_path: Path) -> None:
    expected = {
        "img_size": 32,
        "patch_size": 8,
        "teacher": fx.TEACHER,
        "teacher_depth": 4,
        "teacher_width": 24,
    }
    assert cache_match.cache_facts(fx.open_cache().identity) == expected
    fx.good(fx.train("maskalign", tmp_path / "run", "--cache", fx.cache_path(), *ONE))
    saved = checkpoint.read_config(tmp_path / "run")["config"]
    assert {key: saved[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("size", "patches", "px"), [(224, 196, 16), (196, 196, 14), (224, 49, 32), (32, 16, 8)]
)
def test_patch_of_the_student_on_the_teachers_grid(size: int, patches: int, px: int) -> None:
    assert cache_match.patch_size(size, patches) == px


@pytest.mark.parametrize(
    ("size", "patches", "told"),
    [(32, 15, "15 patches, which"), (33, 16, "4 x 4 patches"), (224, 225, "15 x 15 patches")],
)
def test_views_that_cannot_be_cut(size: int, patches: int, told: str) -> None:
    with pytest.raises(UserError, match=f"views of {size} pixels .*{told}.*--size"):
        cache_match.patch_size(size, patches)


@pytest.mark.parametrize(
    ("setting", "fact"),
    [
        ("patch_size=4", "8"),
        ("img_size=64", "32"),
        ("teacher_depth=12", "4"),
        ("teacher=clip-b16", fx.TEACHER),
    ],
)
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_setting_against_the_facts_is_refused(
    setting: str, fact: str, mode: str, tmp_path: Path
) -> None:
    options = ("--cache", fx.cache_path(), *ONE, "--teacher", mode)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=(setting,))
    assert ran.status == 2
    assert setting in ran.line
    assert fact in ran.line
    assert not (tmp_path / "run").exists()


def test_a_setting_that_agrees_is_taken(tmp_path: Path) -> None:
    fx.good(
        fx.train(
            "maskalign", tmp_path / "run", "--cache", fx.cache_path(), *ONE, sets=("img_size=32",)
        )
    )


# --- what is missing, and the command that makes it -----------------------------------------------


@pytest.mark.slow
def test_a_missing_level_is_added_in_its_place(tmp_path: Path) -> None:
    """The proposed command keeps what is there, and the same command to train is then served."""
    there = copy(fx.cache_path(), tmp_path)
    sets = ("level_weights=mean",)  # levels 1 to 4; the cache holds 2 to 4
    ran = fx.train("maskalign", tmp_path / "run", "--cache", there, *ONE, sets=sets)
    assert ran.status == 1
    told = "level 1 is missing, it has 2, 3, 4 (--set level_weights=top:3 reads its last)"
    assert told in ran.line
    made = run_command(ran.line, tmp_path / "home")
    assert made.status == 0, made.err
    fx.good(fx.train("maskalign", tmp_path / "run", "--cache", there, *ONE, sets=sets))
    with Cache(there) as cache:
        assert cache.levels == (1, 2, 3, 4)
        assert cache.identity == fx.open_cache().identity
    assert [line["run"] for line in runs_of(there, tmp_path / "home")] == []
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "noted",
            "--cache",
            there,
            *ONE,
            sets=sets,
            home=tmp_path / "home",
        )
    )
    assert [line["run"] for line in runs_of(there, tmp_path / "home")] == [str(tmp_path / "noted")]


def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def runs_of(cache: Path, home: Path) -> list[dict[str, Any]]:
    """The runs that `featcache info` lists."""
    runs: list[dict[str, Any]] = fx.good(fx.feat("info", str(cache), "--json", home=home)).json[
        "runs"
    ]
    return runs


@pytest.mark.slow
def test_the_command_says_all_by_which_a_cache_is_made(tmp_path: Path) -> None:
    """Every option of an odd cache: made again from them elsewhere, it is the same cache."""
    views = (
        "--ratio",
        "1,1.25",
        "--scale",
        "0.33333333,1",
        "--flip",
        "0.3",
        "--filter",
        "lanczos",
        "--seed",
        "7",
    )
    layout = (
        "--order",
        "uniform",
        "--tokens",
        "ranked",
        "--keep",
        "7",
        "--pixels",
        "raw",
        "--rows-per-shard",
        "10",
    )
    fx.extract(fx.pictures(), tmp_path / "odd", *views, *layout)
    with Cache(tmp_path / "odd") as old:
        words = extract_command.extract_options(old.manifest)
        assert fx.feat("extract", *words, "--out", str(tmp_path / "again")).status == 0
        with Cache(tmp_path / "again") as new:
            assert new.manifest == old.manifest
        whole = extract_command.extract_options(old.manifest, (1, 2, 3, 4), keep=False)
        assert fx.feat("extract", *whole, "--out", str(tmp_path / "whole")).status == 0
        with Cache(tmp_path / "whole") as new:
            assert new.levels == (1, 2, 3, 4)
            assert new.arrays["features"].item == (4, 17, 24)
            assert new.identity["policy"] == old.identity["policy"]


def test_the_command_names_the_weights(tmp_path: Path) -> None:
    teacher = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=3"
    fx.extract(fx.pictures(), tmp_path / "timm", "--weights", "random:5", teacher=teacher)
    options, sets = ("--cache", tmp_path / "timm", *ONE), ("level_weights=mean",)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=sets)
    assert ran.status == 1
    assert run_command(ran.line, tmp_path / "home").status == 0
    fx.good(fx.train("maskalign", tmp_path / "run", *options, sets=sets))


def test_a_missing_field(tmp_path: Path) -> None:
    """A cache whose stored order goes by another name: the command makes another cache, nothing can
    be added."""
    there = copy(fx.cache_path(), tmp_path)
    about = manifest.read(there)
    about["arrays"]["mask_order_"] = about["arrays"].pop("mask_order")
    for path in there.rglob("manifest*.json"):  # itself and its copy
        json_file.write_json(path, about)
    for path in there.glob("shards/0*.json"):
        record = json_file.read_json(path)
        renamed = {
            name.replace("mask_order/", "mask_order_/"): f for name, f in record["files"].items()
        }
        json_file.write_json(path, {**record, "files": renamed})
    for path in there.glob("shards/*/mask_order"):
        path.rename(path.with_name("mask_order_"))
    ran = fx.train("maskalign", tmp_path / "run", "--cache", there, *ONE, sets=("mask=stored",))
    assert ran.status == 1
    assert "field mask_order is missing" in ran.line
    assert run_command(ran.line, tmp_path / "home").status == 0
    sets = (f"teacher={fx.TEACHER}",)
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "run",
            "--images",
            fx.pictures(),
            *ONE,
            sets=sets,
            home=tmp_path / "home",
        )
    )
    uniform = fx.train(
        "maskalign", tmp_path / "uniform", "--cache", there, *ONE, sets=("mask=uniform",)
    )
    assert uniform.status == 0, uniform.err  # who does not need the field is served


def test_an_incomplete_cache(tmp_path: Path) -> None:
    fx.extract(fx.pictures(), tmp_path / "c", "--rows-per-shard", "12")
    (tmp_path / "c" / "shards" / "000001.json").unlink()
    ran = fx.train("maskalign", tmp_path / "run", "--cache", tmp_path / "c", *ONE)
    assert ran.status == 1
    assert "1 of 2 shards" in ran.line
    assert run_command(ran.line, tmp_path / "home").status == 0
    assert fx.train("maskalign", tmp_path / "run", "--cache", tmp_path / "c", *ONE).status == 0, (
        "the proposed command finishes this cache; it made another one"
    )


def test_none_in_an_empty_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    options = ("--images", fx.pictures(), *ONE)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=OWN_TEACHER, home=home)
    assert ran.status == 1
    assert str(home) in ran.line
    assert run_command(ran.line, home).status == 0
    fx.good(fx.train("maskalign", tmp_path / "run", *options, sets=OWN_TEACHER, home=home))


def test_a_plain_cache_is_found_beside_its_archive(tmp_path: Path) -> None:
    """An archive alone serves as well, and says that it is slow; two plain ones are a choice."""
    home = tmp_path / "home"
    options = ("--images", fx.pictures(), *ONE)
    fx.good(fx.feat("copy", str(fx.cache_path()), str(home / "a"), "--compress"))

    def train(name: str) -> fx.Ran:
        return fx.train("maskalign", tmp_path / name, *options, sets=OWN_TEACHER, home=home)

    assert f"{str(home / 'a')!r} is an archive" in fx.good(train("slow")).err
    shutil.copytree(fx.cache_path(), home / "b")
    assert "archive" not in fx.good(train("fast")).err
    assert fx.losses(tmp_path / "slow") == fx.losses(tmp_path / "fast")
    shutil.copytree(fx.cache_path(), home / "c")
    assert "2 caches serve maskalign" in train("either").line


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "sets",
    [
        (*OWN_TEACHER, "img_size=32", "patch_size=8"),  # the size of the view is part of the need
        # the depth is a fact of the teacher, not 12
        (f"teacher={fx.TEACHER}", "level_weights=mean"),
        (f"teacher={fx.TEACHER}", "level_weights=top:2", "align_levels=3,4"),
    ],
)
def test_the_command_for_an_empty_home_makes_what_serves(
    sets: tuple[str, ...], tmp_path: Path
) -> None:
    home, options = tmp_path / "home", ("--images", fx.pictures(), *ONE)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=sets, home=home)
    assert ran.status == 1
    made = run_command(ran.line, home)
    assert made.status == 0, made.err
    fx.good(fx.train("maskalign", tmp_path / "run", *options, sets=sets, home=home))


def test_all_levels_of_a_deeper_teacher() -> None:
    """clip-l14 has 24 blocks, which is known without its weights."""
    ran = fx.stud(
        "train", "--recipe", "maskalign", "--images", fx.pictures(), "--set", "teacher=clip-l14",
        "--set", "level_weights=mean", "--set", "encoder=tiny", home=fx.root() / "none",
    )  # fmt: skip
    assert ran.status == 1
    words = shlex.split(ran.line.split("featcache extract", 1)[1])
    assert words[words.index("--levels") + 1] in ("all", "last:24")


def test_mae_with_an_attentive_mask_proposes_levels_that_exist(tmp_path: Path) -> None:
    """It needs the attention and no level; extract wants at least one."""
    home, sets = tmp_path / "home", (*OWN_TEACHER, "mask=attentive")
    ran = fx.train("mae", tmp_path / "run", "--images", fx.pictures(), *ONE, sets=sets, home=home)
    assert ran.status == 1
    made = run_command(ran.line, home)
    assert made.status == 0, made.err
    fx.good(
        fx.train("mae", tmp_path / "run", "--images", fx.pictures(), *ONE, sets=sets, home=home)
    )


# --- what a kept cache can serve ------------------------------------------------------------------


def test_a_kept_cache_sets_the_stored_mask_and_says_so(tmp_path: Path) -> None:
    options = ("--cache", fx.kept_path(), *ONE)
    ran = fx.good(fx.train("maskalign", tmp_path / "run", *options))
    assert (
        "note: the cache keeps the first 5 of 16 patches of each view (--keep), in their stored "
        "order" in ran.err
    )
    assert "mask=stored" in ran.err
    assert checkpoint.read_config(tmp_path / "run")["config"]["mask"] == "stored"
    said = fx.good(fx.train("maskalign", tmp_path / "set", *options, sets=("mask=stored",)))
    assert "mask=stored" not in said.err  # set by hand, nothing to say
    assert fx.losses(tmp_path / "set") == fx.losses(tmp_path / "run")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("mask=uniform",), ("first 5 of 16", "mask=uniform shows others", "--set mask=stored")),
        (
            ("mask=attentive",),
            ("first 5 of 16", "mask=attentive shows others", "--set mask=stored"),
        ),
        (
            ("mask_ratio=0.5",),
            ("first 5 of 16", "mask_ratio=0.5 shows 8", "--set a larger mask_ratio"),
        ),
    ],
)
def test_a_kept_cache_does_not_serve_other_masks(
    sets: tuple[str, ...], told: tuple[str, ...], tmp_path: Path
) -> None:
    ran = fx.train("mralign", tmp_path / "run", "--cache", fx.kept_path(), *ONE, sets=sets)
    assert ran.status == 1
    assert all(part in ran.line for part in told), ran.line
    assert not (tmp_path / "run").exists()
    home = tmp_path / "home"
    assert run_command(ran.line, home).status == 0  # the same without --keep
    options = ("--cache", next(home.glob("*/manifest.json")).parent, *ONE)
    fx.good(fx.train("mralign", tmp_path / "run", *options, sets=sets))


def test_a_kept_cache_does_not_serve_statistics_of_all_tokens(tmp_path: Path) -> None:
    """bn is over the tokens that are not there too; l2 is of each token, and is served."""
    options = ("--cache", fx.kept_path(), *ONE)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=("target_norm=bn",))
    assert ran.status == 1
    assert "first 5 of 16" in ran.line
    assert "statistics of all are wanted: --set another target_norm" in ran.line
    fx.good(fx.train("maskalign", tmp_path / "l2", *options, sets=("target_norm=l2",)))


def test_a_kept_cache_does_not_serve_a_recipe_that_reads_all_tokens(tmp_path: Path) -> None:
    """One of somebody's own, which does not say that it looks at visible tokens only."""
    text = (Path(recipes.__file__).parent / "maskalign.py").read_text()
    (tmp_path / "all.py").write_text(text.replace("visible_only=True", "visible_only=False"))
    sets = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    words = (
        "--recipe",
        tmp_path / "all.py",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        *sets,
        *ONE,
    )
    ran = fx.stud("train", *words, "--cache", fx.kept_path(), "--set", "mask=stored")
    assert ran.status == 1
    assert "the recipe reads all" in ran.line
    fx.good(fx.stud("train", *words, "--cache", fx.ranked_path(), "--set", "mask=stored"))
    assert checkpoint.read_config(tmp_path / "run")["targets"]["reading"]["tokens"] == "all"


def test_mae_reads_no_token_and_takes_any_cache(tmp_path: Path) -> None:
    for mask in ("uniform", "attentive"):
        ran = fx.good(
            fx.train(
                "mae", tmp_path / mask, "--cache", fx.kept_path(), *ONE, sets=(f"mask={mask}",)
            )
        )
        assert "stored order" not in ran.err


# --- the search -----------------------------------------------------------------------------------


def home_with(tmp_path: Path, *caches: str) -> Path:
    home = tmp_path / "home"
    for name in caches:
        shutil.copytree(fx.cache_path(), home / name)
    return home


def search(tmp_path: Path, home: Path, *options: Any, recipe: str = "maskalign") -> fx.Ran:
    sets = (f"teacher={fx.TEACHER}",) if recipe != "mae" else ("patch_size=8",)
    return fx.train(recipe, tmp_path / "run", *ONE, *options, sets=sets, home=home)


def test_the_one_that_serves_is_found(tmp_path: Path) -> None:
    home = home_with(tmp_path, "a")
    fx.good(search(tmp_path, home))
    config = checkpoint.read_config(tmp_path / "run")
    assert config["targets"]["id"] == manifest.read(home / "a")["id"]


def test_several_ask_for_a_choice(tmp_path: Path) -> None:
    ran = search(tmp_path, home_with(tmp_path, "a", "b"))
    assert ran.status == 2
    assert all(part in ran.line for part in ("home/a", "home/b", "--cache"))


def test_those_that_do_not_serve_are_passed_over(tmp_path: Path) -> None:
    """Other pictures, another crop policy, a damaged manifest, a level too few: one of five
    serves."""
    home = home_with(tmp_path, "good", "broken", "few")
    (home / "broken" / manifest.NAME).write_text("{")
    about = manifest.read(home / "few")
    about["identity"]["levels"] = [4]
    json_file.write_json(home / "few" / manifest.NAME, about)
    fx.extract(fx.save_pictures(tmp_path / "others", 4, seed=9, classes=2), home / "others")
    fx.extract(fx.pictures(), home / "crops", "--scale", "0.08,1")
    ran = search(tmp_path, home, "--images", fx.pictures())
    fx.good(ran)
    for name in ("broken", "few"):
        assert f"home/{name}' is passed over: " in ran.err
    assert (
        checkpoint.read_config(tmp_path / "run")["targets"]["id"]
        == manifest.read(home / "good")["id"]
    )


def test_a_cache_of_other_pictures_does_not_serve(tmp_path: Path) -> None:
    others = fx.save_pictures(tmp_path / "others", 9, seed=9, classes=2)
    ran = search(tmp_path, home_with(tmp_path, "a"), "--images", others)
    assert ran.status == 1
    assert "9 of 9 pictures" in ran.line
    assert f"--images {others}" in ran.line


def test_another_teacher_is_not_taken(tmp_path: Path) -> None:
    """The recipe's own teacher is clip-b16: a cache of a trial teacher is no answer to a plain
    command."""
    ran = fx.train("maskalign", tmp_path / "run", *ONE, home=home_with(tmp_path, "a"))
    assert ran.status == 1
    assert "clip-b16 is needed" in ran.line


@pytest.mark.parametrize("caches", [(), ("a",), ("a", "b")])
def test_mae_needs_no_cache_whatever_lies_in_home(caches: tuple[str, ...], tmp_path: Path) -> None:
    home = home_with(tmp_path, *caches)
    options = ("--images", fx.pictures(), "--policy", fx.policy_file())
    fx.good(search(tmp_path, home, *options, recipe="mae"))


# --- the join -------------------------------------------------------------------------------------


def test_a_subset_is_joined_by_key(tmp_path: Path) -> None:
    for name in ("p20", "p03", "p11"):
        (tmp_path / "some").mkdir(exist_ok=True)
        shutil.copy(fx.pictures() / f"{name}.png", tmp_path / "some")
    source = open_source(tmp_path / "some")
    cache = fx.open_cache()
    chosen, rows, skipped = join.join_by_key(cache, source)
    assert chosen.tolist() == [0, 1, 2]
    assert [cache.keys[row] for row in rows.tolist()] == ["p03", "p11", "p20"] == list(source.keys)
    assert skipped == 0


def test_quarantined_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    shutil.copytree(fx.pictures(), tmp_path / "p")
    (tmp_path / "p" / "bad.png").write_bytes((tmp_path / "p" / "p00.png").read_bytes()[:90])
    teacher = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=3"
    fx.extract(tmp_path / "p", tmp_path / "c", "--weights", "random:0", teacher=teacher)
    with Cache(tmp_path / "c") as cache:
        source = open_source(tmp_path / "p")
        chosen, rows, skipped = join.join_by_key(cache, source)
        assert skipped == 1
        assert [source.keys[i] for i in chosen.tolist()] == [
            cache.keys[row] for row in rows.tolist()
        ]
        assert "bad" not in [source.keys[i] for i in chosen.tolist()]
        assert len(chosen) == fx.PICTURES
    ran = fx.good(
        fx.train(
            "maskalign",
            tmp_path / "run",
            "--cache",
            tmp_path / "c",
            "--steps",
            "3",
            "--batch-size",
            "8",
        )
    )
    assert "1 picture is in the cache's quarantine" in ran.err
    assert f"{fx.PICTURES} pictures x {fx.VIEWS} views" in ran.err  # of drawn weights, as is told
    assert checkpoint.read_config(tmp_path / "run")["data"]["pictures"] == fx.PICTURES


def test_an_unknown_picture_is_refused(tmp_path: Path) -> None:
    shutil.copytree(fx.pictures(), tmp_path / "p")
    shutil.copy(tmp_path / "p" / "p00.png", tmp_path / "p" / "zebra.png")
    with pytest.raises(IdentityError, match=r"1 of 25 pictures.*'zebra'"):
        join.join_by_key(fx.open_cache(), open_source(tmp_path / "p"))
    ran = fx.train(
        "maskalign", tmp_path / "run", "--cache", fx.cache_path(), "--images", tmp_path / "p", *ONE
    )
    assert ran.status == 1
    assert "'zebra'" in ran.line
    assert not (tmp_path / "run").exists()
