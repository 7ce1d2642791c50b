"""The command that a cache is made by: whole, quoted, and with what is left to do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.console.text import format_bytes
from featcache.extraction import extract
from featcache.storage import manifest
from tests.conftest import SYNTHETIC, Ran, files_below, make_photos, make_plan

Command = Callable[..., Ran]
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
    """The finished cache of BASE."""
    out = tmp_path_factory.mktemp("invocation") / "cache"
    extract.run(make_plan(photos, views=1, levels=(2, 3), rows_per_shard=1024), out, batch_size=4)
    return out


def mistake(ran: Ran, status: int, *messages: str) -> None:
    assert ran.status == status, ran
    assert "Traceback" not in ran.err + ran.out
    for part in messages:
        assert part in ran.error, (part, ran.error)


def test_info_of_an_unfinished_cache(
    featcache_command: Command, made: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "c"))
    (copy / "shards/000000.json").unlink()
    ran = featcache_command("info", copy)
    assert ran.status == 0
    assert "unfinished: 0 of 1 shard" in ran.out
    assert "11 pictures are left" in ran.out
    facts = json.loads(featcache_command("info", copy, "--json").out)
    assert facts["complete"] is False
    verified = featcache_command("verify", copy)
    mistake(
        verified, 1, "sound as far as it goes", "unfinished: 0 of 1 shard", "11 pictures are left"
    )
    assert "repair" not in verified.error
    command = facts["unfinished"][0]["finish"]
    assert all(command in text for text in (ran.out, verified.error))
    assert featcache_command(*shlex.split(command)[1:]).status == 0  # as it stands
    assert files_below(copy) == files_below(made)
    assert featcache_command("verify", copy).status == 0


def test_info_says_by_which_command_a_cache_is_made(
    featcache_command: Command, tmp_path: Path
) -> None:
    """Quoted for a shell; pictures are counted as stored, not as listed."""
    folder = make_photos(tmp_path / "my photos")
    (folder / "bad.png").write_text("no picture")
    options = (*BASE, "--images", folder, "--seed", 3, "--tokens", "ranked", "--keep", 3)
    assert featcache_command("extract", *options, "--out", tmp_path / "c").status == 0
    text = featcache_command("info", tmp_path / "c").out
    assert "  11 pictures x 1 view  id " in text
    assert "11 of 12 pictures stored" in text
    assert "tokens ranked, first 3 of 4 patches" in text
    (line,) = (line for line in text.splitlines() if line.startswith("made by: "))
    assert f"--images '{folder}'" in line
    assert "--batch-size 4" in line
    words = shlex.split(line.removeprefix("made by: featcache"))
    ran = featcache_command(*words)
    assert (ran.status, "nothing to do" in ran.out) == (0, True)
    more = [
        str(3) if before == "--views" else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    grown = featcache_command(*more, "--add")
    assert grown.status == 0
    assert ": added 11 pictures x 2 views, " in grown.out
    text = featcache_command("info", tmp_path / "c").out
    assert "  11 pictures x 3 views  id " in text
    assert re.search(r"^added: .*  views 1 to 2$", text, re.M)


def test_an_unfinished_addition_is_told_with_the_command_that_finishes_it(
    featcache_command: Command, made: Path, photos: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "c"))
    options = ("extract", *BASE, "--images", photos, "--out", copy, "--views", 2, "--add")
    assert featcache_command(*options).status == 0
    whole = files_below(copy)
    next((copy / "parts").glob("*/shards/000000.json")).unlink()
    (unfinished,) = json.loads(featcache_command("info", copy, "--json").out)["unfinished"]
    assert unfinished["what"].endswith("levels 2,3  view 1")
    assert (unfinished["shards"], unfinished["shards_complete"], unfinished["pictures_left"]) == (
        1,
        0,
        11,
    )
    assert featcache_command(*shlex.split(unfinished["finish"])[1:]).status == 0
    assert files_below(copy) == whole


def test_a_dry_run_over_what_is_there(
    featcache_command: Command, photos: Path, made: Path, tmp_path: Path
) -> None:
    """A complete cache, another cache, and a folder that is none."""
    before = files_below(made)
    options = ("extract", *BASE, "--images", photos, "--dry-run")
    ran = featcache_command(*options, "--out", made)
    assert (ran.status, ran.out.endswith("nothing would be done\n"), "is complete" in ran.out) == (
        0,
        True,
        True,
    )
    facts = json.loads(featcache_command(*options, "--out", made, "--json").out)
    assert (facts["complete"], facts["new_bytes"], facts["new_shards"]) == (True, 0, 0)
    mistake(featcache_command(*options, "--out", made, "--seed", 4), 1, "give --seed 0")
    mistake(featcache_command(*options, "--out", photos), 1, "exists and is no cache")
    assert files_below(made) == before


def test_options_of_the_work_change_the_work(
    featcache_command: Command, photos: Path, tmp_path: Path
) -> None:
    """Those that do not change what is stored: the batch size is noted, a share is a share."""
    options = ("extract", *BASE, "--images", photos, "--rows-per-shard", 4, "--out", tmp_path / "c")
    facts = json.loads(
        featcache_command(
            *options, "--shard", "1/3", "--batch-size", 5, "--device", "cpu", "--json"
        ).out
    )
    assert (facts["rows"], facts["complete"], facts["new_pictures"]) == (4, False, 4)
    assert manifest.read(tmp_path / "c")["provenance"]["batch_size"] == 5
    ran = featcache_command(*options, "--shard", "0/3")  # shards of 4, 4 and 3 pictures
    assert "this share is done; the cache has 8 pictures so far" in ran.out
    item = 2 * 2 * 5 * 8 + 2 * 5 * 2 * 4  # features and their statistics, beside much else
    whole = json.loads(featcache_command(*options, "--dry-run", "--json").out)
    assert (whole["new_shards"], whole["new_pictures"], whole["complete"]) == (1, 3, False)
    assert whole["bytes"] % 11 == 0
    assert whole["bytes"] // 11 > item
    assert (
        f"share 0/3, 4 of 11 pictures x 1 view, {format_bytes(whole['bytes'] // 11 * 4)}\n"
        in ran.out
    )
    assert whole["new_bytes"] == whole["bytes"] // 11 * 3
    assert (
        f"would write {format_bytes(whole['new_bytes'])} in 1 shard to"
        in featcache_command(*options, "--dry-run").out
    )
    printed = featcache_command(*options, "--shard", "1/3", "--dry-run").out
    assert printed == (
        f"share 1/3 of {tmp_path / 'c'} is complete (4 pictures x 1 view, "
        f"{format_bytes(whole['bytes'] // 11 * 4)}): nothing would be done\n"
    )
    ledger = [json.loads(line) for line in (tmp_path / "home/runs.jsonl").read_text().splitlines()]
    assert [(line["batch_size"], line["device"]) for line in ledger] == [
        (5, "cpu"),
        (4, ledger[1]["device"]),
    ]
    assert json.loads(featcache_command(*options, "--workers", 1, "--json").out)["complete"] is True
