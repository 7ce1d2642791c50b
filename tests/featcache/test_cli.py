"""The `featcache` command as a person meets it: help with examples, one line for each mistake, JSON
that parses."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import featcache
from featcache.catalog import ledger
from featcache.storage import manifest
from tests.conftest import SYNTHETIC, Ran, files_below, make_photos, python

Command = Callable[..., Ran]
VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=16,embed_dim=24,depth=6,num_heads=3"
# DESIGN 7, less what comes later.
OPTIONS = (
    *(
        "teacher",
        "images",
        "out",
        "views",
        "levels",
        "policy",
        "size",
        "scale",
        "ratio",
        "filter",
        "flip",
        "jitter",
    ),
    *(
        "store",
        "codec",
        "order",
        "weights",
        "seed",
        "rows-per-shard",
        "device",
        "batch-size",
        "workers",
    ),
    *(
        "tokens",
        "keep",
        "pixels",
        "rows-per-shard",
        "devices",
        "shard",
        "add",
        "strict",
        "dry-run",
        "json",
    ),
    *("precision", "compile", "check-teacher"),
)
BASE = (
    "--teacher",
    SYNTHETIC,
    "--size",
    28,
    "--levels",
    "last:2",
    "--batch-size",
    4,
    "--workers",
    2,
)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, made by the command in a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "cache"
    command = [
        sys.executable,
        "-m",
        "featcache",
        "extract",
        "--images",
        str(photos),
        "--out",
        str(out),
    ]
    ran = subprocess.run(
        [*command, *map(str, BASE), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    facts = json.loads(ran.stdout)
    assert (facts["pictures"], facts["rows"], facts["views"], facts["levels"]) == (
        11,
        11,
        1,
        [2, 3],
    )
    assert facts["quarantined"] == []
    assert facts["slowest"] in ("decode", "copy", "teacher", "encode", "write")
    # the ledger is in the home, never in the cache
    assert (out.parent / "caches/runs.jsonl").is_file()
    return out


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["extract", "info", "verify", "repair", "teachers"])
def test_help_has_examples_and_options(featcache_command: Command, command: str) -> None:
    ran = featcache_command(command, "--help")
    assert ran.status == 0
    assert f"  featcache {command}" in ran.out.split("Example")[1]
    assert featcache_command(command, "-h").out == ran.out


def test_top_level_help_names_every_command(featcache_command: Command) -> None:
    ran = featcache_command("--help")
    assert ran.status == 0
    for command in ("extract", "info", "verify", "repair", "teachers"):
        assert f"  {command} " in ran.out
    bare = featcache_command()
    assert bare.status == 2
    assert "extract" in bare.out + bare.err
    assert featcache.__version__ in featcache_command("--version").out


def test_extract_help_has_the_designs_options(featcache_command: Command) -> None:
    text = featcache_command("extract", "--help").out
    for option in OPTIONS:
        assert f"--{option} " in text or f"--{option}\n" in text, option


# ---------------------------------------------------------------- mistakes


def mistake(ran: Ran, status: int, *messages: str) -> None:
    assert ran.status == status, ran
    assert "Traceback" not in ran.err + ran.out
    assert len([line for line in ran.err.splitlines() if not line.startswith("note:")]) == 1, (
        ran.err
    )
    for part in messages:
        assert part in ran.error, (part, ran.error)


def test_no_images_names_the_variable(featcache_command: Command) -> None:
    ran = featcache_command("extract", *BASE)
    mistake(ran, 2, "FEATCACHE_IMAGES", "--images", "a folder of pictures", ".tar")


def test_no_teacher_lists_them(featcache_command: Command, photos: Path) -> None:
    mistake(
        featcache_command("extract", "--images", photos),
        2,
        "--teacher",
        "clip-b16",
        "dino-b16",
        "timm:NAME",
    )


@pytest.mark.parametrize(
    ("change", "status", "messages"),
    [
        (("--teacher", "clip-b61"), 2, ("unknown teacher 'clip-b61'", "did you mean clip-b16")),
        (("--teacher", "timm:vit_tny_patch16_224"), 2, ("did you mean vit_tiny_patch16_224",)),
        (("--teacher", SYNTHETIC + ",heads=3"), 2, ("heads",)),
        (
            ("--teacher", VIT.replace("num_heads=3", "num_heads=5"), "--weights", "random:0"),
            2,
            ("num_heads",),
        ),
        (("--tacher", "clip-b16"), 2, ("--tacher", "--teacher")),
        (("--scale", "0.2"), 2, ("'0.2'", "0.2,1 or 3/4,4/3")),
        (("--scale", "a,b"), 2, ("'a,b'",)),
        (("--scale", "1/0,1"), 2, ("'1/0,1'",)),
        (("--scale", "0.5,0.2"), 2, ("scale 0.5,0.2", "0 < low <= high <= 1")),
        (("--ratio", "4/3,3/4"), 2, ("ratio",)),
        (("--filter", "nearest"), 2, ("nearest", "bicubic, bilinear, lanczos")),
        (("--flip", "2"), 2, ("flip 2",)),
        (("--jitter", "1"), 2, ("jitter 1",)),
        (("--seed", "-1"), 2, ("seed -1",)),
        (("--size", "0"), 2, ("size 0",)),
        (("--levels", "last:9"), 2, ("last:9", "1 to 3")),
        (("--levels", "4"), 2, ("--levels '4'", "1 to 3")),
        (("--levels", "top"), 2, ("last:N", "all")),
        (("--levels", "-1,3"), 2, ("'-1,3'", "no block twice")),
        (("--levels", "-4"), 2, ("'-4'", "-1 to -3")),
        (("--views", "0"), 2, ("--views",)),
        (("--batch-size", "0"), 2, ("--batch-size",)),
        (("--workers", "x"), 2, ("--workers",)),
        (("--order", "random"), 2, ("--order", "'random' given", "attentive, topk, uniform")),
        (("--codec", "q2"), 2, ("--codec", "'q2' given", "fp16")),
        (("--store", "hdf5"), 2, ("hdf5", "zarr")),
        (("--policy", "caev3"), 2, ("did you mean caev2", ".json")),
        (("--policy", "nowhere.json"), 1, ("nowhere.json",)),
        (("--weights", "random:0"), 2, ("no weights",)),
        (("--weights", "no/such.pt", "--teacher", VIT), 1, ("no such file", "random:SEED")),
        (("--teacher", SYNTHETIC, "--teacher", SYNTHETIC), 2, ("given twice",)),
        (
            ("--teacher", SYNTHETIC, "--teacher", VIT, "--weights", "vit.pt"),
            2,
            ("2 teachers are given", f"{SYNTHETIC}=vit"),
        ),
        (
            ("--teacher", SYNTHETIC, "--teacher", VIT, "--weights", f"{VIT}=vit.pt"),
            1,
            ("'vit.pt'", "no such file"),
        ),
        (("--precision", "fp64"), 2, ("--precision", "'fp64' given", "bf16, fp16, fp32, tf32")),
        (("--precision", "tf32", "--device", "cpu"), 2, ("cpu has no TF32", "fp32")),
        (("--check-teacher", "nowhere"), 1, ("nowhere", "no pictures")),
        (("--device", "cuda:97"), 2, ("cuda:97", "cpu")),
        (("--device", "tpu9"), 2, ("tpu9", "cpu")),
        (("--devices", "cuda:97"), 2, ("--devices 'cuda:97'",)),
        (("--devices", "cpu,tpu"), 2, ("'tpu'", "cpu")),
        (("--devices", "cpu", "--device", "cpu"), 2, ("--devices", "--device")),
        (("--shard", "2/2"), 2, ("--shard '2/2'", "0 to N - 1")),
        (("--shard", "x"), 2, ("--shard 'x'",)),
        (("--shard", "-1/2"), 2, ("--shard '-1/2'",)),
        (("--tokens", "sorted"), 2, ("--tokens", "'sorted' given", "known: ranked, raster")),
        (("--keep", "2"), 2, ("--keep 2", "--tokens ranked")),
        (("--keep", "5", "--tokens", "ranked"), 2, ("--keep 5", "1 to 4")),
        (("--keep", "0", "--tokens", "ranked"), 2, ("--keep 0", "1 to 4")),
        (("--keep", "inf", "--tokens", "ranked"), 2, ("--keep 'inf'", "share of them such as 0.3")),
        (("--keep", "x", "--tokens", "ranked"), 2, ("--keep 'x'", "share of them such as 0.3")),
        (
            ("--keep", "1.5", "--tokens", "ranked"),
            2,
            ("--keep 1.5:", "1 to 4", "share of them such as 0.3"),
        ),
        (("--pixels", "png"), 2, ("png", "raw")),
        (("--rows-per-shard", "0"), 2, ("--rows-per-shard", "auto, or 1 to")),
        (("--add",), 1, ("no cache at",)),
        (("extra",), 2, ("extra",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:50] if isinstance(value, tuple) else str(value),
)
def test_mistakes_are_one_line(
    featcache_command: Command,
    photos: Path,
    tmp_path: Path,
    change: tuple,
    status: int,
    messages: tuple,
) -> None:
    base = BASE[2:] if "--teacher" in change else BASE  # a second one would be a second teacher
    ran = featcache_command("extract", *base, "--images", photos, "--out", tmp_path / "c", *change)
    mistake(ran, status, *messages)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sclae": [0.2, 1]}', '{"size": "big"}', '{"scale": [0, 2]}']
)
def test_bad_policy_files(
    featcache_command: Command, photos: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "p.json").write_text(text)
    ran = featcache_command(
        "extract", "--teacher", SYNTHETIC, "--images", photos, "--policy", tmp_path / "p.json"
    )
    mistake(ran, ran.status)
    assert ran.status in (1, 2)


def test_no_pictures(featcache_command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec in ("empty", "nowhere", "x-{0..3}.tar", "x-{0..3.tar"):
        mistake(featcache_command("extract", *BASE, "--images", tmp_path / spec), 1)
    ran = featcache_command("extract", *BASE, "--images", tmp_path / "empty")
    mistake(ran, 1, "no pictures found", ".jpg", ".tar")


def test_truncated_picture_is_quarantined_or_strict_stops(
    featcache_command: Command, tmp_path: Path
) -> None:
    folder = make_photos(tmp_path / "photos")
    (folder / "half.jpg").write_bytes((folder / "photo0.jpg").read_bytes()[:500])
    mistake(
        featcache_command(
            "extract", *BASE, "--images", folder, "--out", tmp_path / "c", "--strict"
        ),
        1,
        "'half'",
        "--strict",
    )
    ran = featcache_command("extract", *BASE, "--images", folder, "--out", tmp_path / "c")
    assert ran.status == 0
    assert "quarantined 'half'" in ran.out
    assert "quarantine.json" in ran.out
    assert (tmp_path / "c/quarantine.json").is_file()
    with featcache.open(tmp_path / "c") as cache:
        assert len(cache) == 11


def test_another_cache_in_out(featcache_command: Command, photos: Path, made: Path) -> None:
    ran = featcache_command("extract", *BASE, "--images", photos, "--out", made, "--seed", 1)
    mistake(ran, 1, "identity.policy.seed (fatal): 1 here, 0 there, give --seed 0", "--out")
    ran = featcache_command(
        "extract", *BASE, "--images", photos, "--out", made, "--views", 5, "--levels", "all"
    )
    mistake(ran, 1, "identity.levels (fatal): [1, 2, 3] here, [2, 3] there, give --levels 2,3")
    mistake(ran, 1, "identity.views (fatal): 5 here, 1 there, give --views 1")
    ran = featcache_command(
        "extract", *BASE, "--images", photos, "--out", made, "--tokens", "ranked", "--keep", 2
    )
    mistake(
        ran, 1, "identity.keep (fatal): 2 here, None there, give no --keep", "give --tokens raster"
    )


def test_no_cache_there(featcache_command: Command, tmp_path: Path) -> None:
    for command in ("info", "verify", "repair"):
        mistake(featcache_command(command, tmp_path), 1, "manifest.json")
        mistake(featcache_command(command), 2, "CACHE")


def test_an_out_that_cannot_be_written(featcache_command: Command, photos: Path) -> None:
    mistake(
        featcache_command("extract", *BASE, "--images", photos, "--out", "/proc/cache"), 1, "/proc"
    )


# ---------------------------------------------------------------- work


def test_second_call_has_nothing_to_do(
    featcache_command: Command, photos: Path, made: Path
) -> None:
    ran = featcache_command("extract", *BASE, "--images", photos, "--out", made)
    assert ran.status == 0
    assert "nothing to do" in ran.out


def test_images_from_the_environment_and_out_from_the_home(
    featcache_command: Command, monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEATCACHE_IMAGES", str(photos))
    ran = featcache_command("extract", *BASE, "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    cache = Path(facts["cache"])
    assert cache.parent == tmp_path / "home"
    assert facts["id"][:8] in cache.name
    with featcache.open(cache) as opened:
        assert opened.manifest["id"] == facts["id"]
    ledger = [json.loads(line) for line in (tmp_path / "home/runs.jsonl").read_text().splitlines()]
    assert ledger[0]["command"] == "extract"
    assert ledger[0]["id"] == facts["id"]
    assert sorted(path.name for path in cache.iterdir() if "jsonl" in path.name) == []


def test_dry_run_writes_nothing(featcache_command: Command, photos: Path, tmp_path: Path) -> None:
    ran = featcache_command(
        "extract", *BASE, "--images", photos, "--out", tmp_path / "c", "--dry-run"
    )
    assert ran.status == 0
    assert "would write" in ran.out
    ran = featcache_command(
        "extract", *BASE, "--images", photos, "--out", tmp_path / "c", "--dry-run", "--json"
    )
    facts = json.loads(ran.out)
    assert facts["pictures"] == 11
    assert facts["bytes"] > 11 * 2 * 5 * 8 * 2
    assert list(tmp_path.iterdir()) == []


def test_policy_options_reach_the_manifest(
    featcache_command: Command, photos: Path, tmp_path: Path
) -> None:
    options = (
        "--policy",
        "caev2",
        "--scale",
        "1/2,1",
        "--ratio",
        "4/5,5/4",
        "--flip",
        0,
        "--filter",
        "lanczos",
    )
    ran = featcache_command(
        "extract", *BASE, *options, "--seed", 9, "--images", photos, "--out", tmp_path / "c"
    )
    assert ran.status == 0, ran.err
    policy = manifest.read(tmp_path / "c")["identity"]["policy"]
    assert policy == {
        "size": 28,
        "scale": [0.5, 1.0],
        "ratio": [0.8, 1.25],
        "filter": "lanczos",
        "flip": 0.0,
        "jitter": 0.4,
        "seed": 9,
    }


def test_the_ledger_has_absolute_paths(
    featcache_command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert featcache_command("extract", *BASE, "--images", photos, "--out", "c").status == 0
    (line,) = (tmp_path / "home/runs.jsonl").read_text().splitlines()
    assert json.loads(line)["cache"] == str(tmp_path / "c")


def test_info(featcache_command: Command, made: Path) -> None:
    ran = featcache_command("info", made, "--json")
    facts = json.loads(ran.out)
    assert facts["complete"] is True
    assert facts["rows"] == 11
    assert facts["random_weights"] is False
    assert facts["arrays"]["features"]["shape"] == [11, 1, 2, 5, 8]
    assert facts["arrays"]["features"]["dtype"] == "<f2"
    found = {name: array["statistics"] for name, array in facts["arrays"].items()}
    # sqrt(D - 1)
    assert -(7**0.5) <= found["features"]["min"] < 0 < found["features"]["max"] <= 7**0.5 + 1e-6
    assert 0 < found["features"]["norm"] <= 8**0.5 + 1e-6
    assert 0 <= found["attention"]["min"] <= found["attention"]["max"] <= 1
    assert 0 < found["attention"]["entropy"] <= math.log(4) + 1e-6
    assert {each["non_finite"] for each in found.values() if each} == {0}
    assert found["pixel_hash"] is None
    assert facts["parts"] == [f"{SYNTHETIC}  levels 2,3  view 0"]
    assert set(facts["serves"]) >= {"mae", "maskalign", "mralign"}
    assert facts["serves"]["mae"] == ""
    assert facts["bytes"] == sum(
        p.stat().st_size for p in (made / "shards").rglob("*") if p.is_file()
    ) - sum(p.stat().st_size for p in (made / "shards").glob("*.json"))
    text = featcache_command("info", made).out
    for part in (
        SYNTHETIC,
        facts["id"],
        "1 of 1 shard",
        "11 of 11 pictures stored",
        "features",
        "serves: ",
        "runs: none noted",
    ):
        assert part in text
    assert re.search(
        r"^features +<f2 +\[11, 1, 2, 5, 8\] +-?[\d.]+ to [\d.]+ +norm [\d.]+, 0 not finite$",
        text,
        re.M,
    )
    assert "RANDOM" not in text


def test_info_tells_which_recipes_lack_what(
    featcache_command: Command, photos: Path, tmp_path: Path
) -> None:
    options = (*BASE, "--images", photos, "--out", tmp_path / "c")
    assert featcache_command("extract", *options, "--levels", "1").status == 0
    serves = json.loads(featcache_command("info", tmp_path / "c", "--json").out)["serves"]
    assert serves["mae"] == ""
    assert serves["maskalign"] == "5 levels are aligned, the teacher has 3 blocks"
    assert "not maskalign: 5 levels are aligned" in featcache_command("info", tmp_path / "c").out


def test_info_lists_the_runs_of_this_cache(featcache_command: Command, made: Path) -> None:
    cache_id = manifest.read(made)["id"]
    for i in range(7):
        ledger.log_run(command="train", recipe=f"mae{i}", cache_id=cache_id, run=f"runs/{i}")
    ledger.log_run(command="train", recipe="other", cache_id="0" * 16, run="runs/x")
    text = featcache_command("info", made).out
    assert "runs: 7, the last:" in text
    assert "mae6  runs/6" in text
    assert "mae1" not in text
    assert "other" not in text
    assert len(json.loads(featcache_command("info", made, "--json").out)["runs"]) == 7


def test_verify(featcache_command: Command, made: Path, photos: Path, tmp_path: Path) -> None:
    ran = featcache_command("verify", made, "--recompute", 5, "--images", photos, "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["problems"] == []
    assert facts["recompute"]["rows"] == 5
    text = featcache_command("verify", made, "--recompute", 5)  # pictures from where they were
    assert text.status == 0
    assert "95 % confidence" in text.out
    copy = Path(shutil.copytree(made, tmp_path / "c"))
    path = copy / "shards/000000.zarr/area/c.0.0"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    ran = featcache_command("verify", copy)
    assert ran.status == 1
    assert str(path) in ran.error
    ran = featcache_command("verify", copy, "--json")
    assert ran.status == 1
    assert len(json.loads(ran.out)["problems"]) == 1


def test_verify_with_pictures_that_no_longer_decode(
    featcache_command: Command, made: Path, tmp_path: Path
) -> None:
    folder = make_photos(tmp_path / "photos")
    (folder / "rgb.png").write_bytes((folder / "rgb.png").read_bytes()[:300])
    ran = featcache_command("verify", made, "--recompute", 11, "--images", folder)
    mistake(ran, 1, "'rgb'")


def test_teachers(featcache_command: Command) -> None:
    rows = {row["name"]: row for row in json.loads(featcache_command("teachers", "--json").out)}
    assert rows["clip-b16"]["bytes_a_view_last5_fp16"] == 1_512_960  # DESIGN 5
    text = featcache_command("teachers").out
    for part in ("clip-b16", "dino-b16", "synthetic", "timm:NAME", "1,512,960"):
        assert part in text


def test_random_weights_are_said_wherever_the_cache_is_shown(
    featcache_command: Command, photos: Path, tmp_path: Path
) -> None:
    options = (
        "--teacher",
        VIT,
        "--weights",
        "random:0",
        "--size",
        32,
        "--workers",
        2,
        "--images",
        photos,
    )
    ran = featcache_command("extract", *options, "--out", tmp_path / "c")
    assert ran.status == 0, ran.err
    assert "random:0" in ran.err
    assert "not trained" in ran.err
    assert "RANDOM WEIGHTS random:0" in featcache_command("info", tmp_path / "c").out
    assert (
        json.loads(featcache_command("info", tmp_path / "c", "--json").out)["random_weights"]
        is True
    )
    with featcache.open(tmp_path / "c") as cache:
        assert cache.levels == (2, 3, 4, 5, 6)  # last:5
        assert "RANDOM" in repr(cache)
    mistake(
        featcache_command(
            "extract", *options[:3], "random:1", *options[4:], "--out", tmp_path / "c"
        ),
        1,
        "identity.teacher.weight_hash (fatal)",
    )


def test_a_closed_pipe_is_no_error(made: Path) -> None:
    """`featcache info ... | head -1`."""
    code = f"{sys.executable} -m featcache info {made} --json | head -c 5; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr
    assert "Error" not in ran.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "may start no more threads"),
    ],
    ids=str,
)
def test_a_machine_at_its_end_is_one_line(
    made: Path,
    featcache_command: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("featcache.maintenance.verify.verify_cache", fail)
    ran = featcache_command("verify", made)
    assert ran.status == 1
    assert message in ran.error


def test_what_was_begun_goes_on_in_batches_of_its_size(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """A real network: its bits depend on the batch."""
    vit = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"
    options = (
        "extract",
        "--teacher",
        vit,
        "--weights",
        "random:0",
        "--images",
        photos,
        "--size",
        32,
        "--levels",
        "all",
    )
    options = (*options, "--rows-per-shard", 4, "--out", tmp_path / "c")
    assert featcache_command(*options, "--batch-size", 3).status == 0
    whole = files_below(tmp_path / "c")
    for path in (tmp_path / "c/shards").glob("000001*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ran = featcache_command(*options)
    assert ran.status == 0, ran.err
    assert "begun with" not in ran.err
    assert files_below(tmp_path / "c") == whole
    ran = featcache_command(*options, "--batch-size", 5)
    assert f"note: --batch-size 5: {tmp_path / 'c'} was begun with 3" in ran.err


def test_main_is_a_module() -> None:
    ran = python(
        "import runpy, sys; sys.argv = ['featcache', 'nothing']; runpy.run_module('featcache', "
        "run_name='__main__')"
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1


def test_a_log_gets_a_line_of_progress(
    featcache_command: Callable[..., Ran],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log gets, now and then, pictures done, rate, ETA and the slowest stage, now and then."""
    monkeypatch.setattr("featcache.console.progress_bar.LOG_EVERY_S", 0.0)
    teacher = "synthetic:levels=2,tokens=4,width=8,size=16"
    options = (
        "--images",
        photos,
        "--size",
        16,
        "--levels",
        "all",
        "--batch-size",
        2,
        "--out",
        tmp_path / "c",
    )
    ran = featcache_command("extract", "--teacher", teacher, *options, "--rows-per-shard", 4)
    stages = "(decode|copy|teacher|encode|write)"
    line = rf"{{}} of 11 pictures, [\d.,]+ pictures/s, ETA \d\d:\d\d:\d\d, slowest: {stages}"
    assert re.search(line.format(r"\d+"), ran.err)
    # what is there already is counted, and no shard is taken twice
    (tmp_path / "c/shards/000001.json").unlink()
    ran = featcache_command("extract", "--teacher", teacher, *options, "--rows-per-shard", 4)
    told = [int(match[1]) for match in re.finditer(line.format(r"(\d+)"), ran.err)]
    assert told
    assert told[0] > 7
    assert told[-1] == 11
