"""Options of absurd size are one line at once: no traceback, no hang, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from featcache.cli import cli as featcache_cli
from featcache.console import entry
from featcache.extraction import extract
from student.cli import cli as student_cli
from tests.conftest import SYNTHETIC, make_photos, make_plan

HUGE, DIGITS = str(10**30), "9" * 5000  # Python reads no number of more than 4300 digits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures p and a cache c of them."""
    place = tmp_path_factory.mktemp("absurd")
    extract.run(make_plan(make_photos(place / "p")), place / "c", batch_size=4)
    return place


EXTRACT = f"extract --teacher {SYNTHETIC} --levels all --size 28 --images p --out o"
TRAIN = "train --recipe fd --cache c --images p --device cpu --out o"
PACK = "pack p o --shard-size 3"
LINES = [
    *(f"{EXTRACT} {option} {HUGE}" for option in (
        "--views", "--batch-size", "--workers", "--rows-per-shard", "--size", "--seed", "--keep")),
    *(f"{EXTRACT} {option}" for option in (
        "--seed -1", "--size 0", f"--shard 1/{DIGITS}", f"--shard {DIGITS}/{DIGITS}9", "--levels 0",
        f"--levels last:{HUGE}", f"--levels {DIGITS}", f"--levels -{DIGITS}", "--flip nan",
        f"--tokens ranked --keep {DIGITS}", "--tokens ranked --keep 1e999999999",
        f"--tokens ranked --keep 1/{DIGITS}", f"--for {DIGITS}", f"--devices cuda:{DIGITS}",
        "--jitter nan", f"--scale {DIGITS},1", "--ratio nan,nan", f"--weights random:{DIGITS}",
        f"--teacher synthetic:levels={HUGE},tokens=4,width=8",
        f"--teacher synthetic:levels=2,tokens=4,width={DIGITS}")),
    f"verify c --recompute {HUGE}", f"verify c --seed {HUGE}", "verify c --seed -1",
    f"copy c o --views {HUGE}", f"copy c o --shards 0:{DIGITS}", f"copy c o --levels last:{DIGITS}",
    f"repair c --workers {HUGE}", f"pack p o --shard-size {HUGE}", f"{PACK} --seed {HUGE}",
    f"{PACK} --resize -{HUGE}", f"{PACK} --resize {DIGITS}", f"{PACK} --name {'a' * 300}",
    "gc --unused nan", "gc --unused inf",
    *(f"{TRAIN} {option} {HUGE}" for option in (
        "--steps", "--epochs", "--batch-size", "--accumulate", "--aug-repeats", "--workers",
        "--seed", "--read-threads", "--save-every")),
    *(f"{TRAIN} --set align_levels={value}" for value in (f"last:{DIGITS}", DIGITS)),
    f"{TRAIN} --set level_weights=top:{DIGITS}", f"{TRAIN} --batch-size 65536 --steps 1",
    *(f"eval linear r --images p {option} {HUGE}" for option in (
        "--epochs", "--batch-size", "--embed-batch", "--seed")),
    f"eval knn r --images p --k {HUGE}",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[-40:])
def test_it_is_one_line(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("FEATCACHE_HOME", str(place.parent / "home"))  # where failures are noted
    words = line.split()
    cli = student_cli if words[0] in ("train", "eval") else featcache_cli
    error = CliRunner().invoke(cli, words, standalone_mode=False).exception
    assert error is not None
    failure = entry._failure_of(error)
    assert failure is not None, repr(error)
    assert failure.status in (1, 2)
    assert {path.name for path in place.iterdir()} <= {"p", "c", "o"}
    assert not (place / "o").exists() or not any((place / "o").iterdir())
    (place / "o").rmdir() if (place / "o").exists() else None
