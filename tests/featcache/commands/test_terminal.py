"""No command hands a stranger's control characters to the terminal, nor lets them make a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.catalog import ledger
from featcache.errors import printable
from featcache.extraction import extract
from featcache.storage import json_file, manifest
from tests.conftest import Ran, make_photos, make_plan, python

Command = Callable[..., Ran]
EVIL = "\x1b]0;owned\x07\x9b2J\u202e\x7f\nerror: forged\r"


def assert_safe(ran: Ran) -> None:
    for said in (ran.out, ran.err):
        assert printable(said) == said
        assert not any(line.startswith("error: forged") for line in said.splitlines())


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose pictures have such names, one of them in quarantine."""
    photos = make_photos(tmp_path_factory.mktemp("evil") / "pictures")
    for path in list(photos.iterdir())[:5]:
        path.rename(path.with_name(f"{EVIL}{path.name}"))
    (photos / f"{EVIL}.jpg").write_bytes(b"no picture")
    out = photos.parent / "cache"
    extract.run(make_plan(photos, levels=(1, 3)), out, batch_size=4)
    return out


@pytest.fixture
def evil(origin: Path, tmp_path: Path) -> Path:
    """A copy below the home, whose manifest says such things too; whether it is taken or not."""
    cache = Path(shutil.copytree(origin, tmp_path / "home/one"))
    about = manifest.read(cache)
    about["identity"]["teacher"]["name"] += EVIL
    about["provenance"] |= {"weights": f"random:{EVIL}", "source": f"{EVIL} $(touch x)"}
    about["id"] = json_file.digest(about["identity"])[:16]
    for record in (cache / "shards").glob("0*.json"):
        changed = json_file.read_json(record) | {"content": manifest.content_digest(about)}
        json_file.write_json(record, changed)
    json_file.write_json(cache / "manifest.json", about)
    json_file.write_json(cache / "shards/manifest.copy.json", about)
    return cache


@pytest.mark.parametrize(
    "words",
    [["info"], ["ls"], ["verify"], ["verify", "--recompute", "2"], ["repair"], ["gc", "--dry-run"]],
    ids=" ".join,
)
def test_what_a_cache_says_is_escaped(
    featcache_command: Command, evil: Path, words: list[str]
) -> None:
    cache_id = json.loads((evil / "manifest.json").read_text())["id"]
    ledger.log_run(command="train", recipe=EVIL, run=EVIL, cache_id=cache_id)
    (evil / "shards/000001.json").unlink()
    cache = [] if words[0] in ("ls", "gc") else [evil]
    assert_safe(featcache_command(*words, *cache))


@pytest.mark.slow
def test_what_a_cache_says_is_escaped_where_it_is_shown(
    featcache_command: Command, origin: Path, evil: Path, tmp_path: Path
) -> None:
    """In the terminal and in a page; of a manifest that is not taken, in its one line."""
    for words in (["show", origin, "0"], ["show", origin, f"{EVIL}x"], ["show", evil, "0"]):
        assert_safe(featcache_command(*words))
    assert_safe(featcache_command("gallery", evil, "--out", tmp_path / "none"))
    ran = featcache_command("gallery", origin, "--out", tmp_path / "out")
    assert_safe(ran)
    assert ran.status == 0, ran.err
    page = (tmp_path / "out/index.html").read_text()
    assert printable(page) == page
    assert page.count(r"\x1b]0;owned\x07") == 5


def test_markup_in_a_manifest_is_text(
    featcache_command: Command, origin: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(origin, tmp_path / "cache"))
    about = manifest.read(cache)
    about["provenance"]["weights"] = "random:<script>alert(1)</script>"
    json_file.write_json(cache / "manifest.json", about)
    ran = featcache_command("gallery", cache, "--out", tmp_path / "out", "--count", "1")
    assert ran.status == 0, ran.err
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") == 2


def test_what_pictures_and_runs_are_called_is_escaped(
    featcache_command: Command, origin: Path
) -> None:
    ledger.log_run(command="train", recipe=EVIL, run=EVIL, cache_id=manifest.read(origin)["id"])
    ran = featcache_command("info", origin)
    assert_safe(ran)
    assert ran.out.count(r"\x1b]0;owned\x07") >= 2
    assert f"quarantined {EVIL!r}: " in ran.out


def test_json_is_ascii_without_control_characters(featcache_command: Command, origin: Path) -> None:
    ran = featcache_command("info", origin, "--json")
    assert all(char == "\n" or " " <= char <= "~" for char in ran.out)
    assert r"\u007f" in ran.out
    assert json.loads(ran.out)


def test_what_the_command_line_says_is_escaped(featcache_command: Command) -> None:
    for words in (["info", f"no{EVIL}"], [f"in{EVIL}fo"], ["ls", f"--{EVIL}"], ["ls", EVIL]):
        ran = featcache_command(*words)
        assert ran.status in (1, 2)
        assert_safe(ran)
        assert ran.error


def test_what_libraries_say_is_escaped() -> None:
    code = (
        "import logging, warnings; from featcache.console import entry; import click\n"
        "def run():\n"
        "    logging.getLogger('featcache.x').warning('\\x1b[2J one')\n"
        "    logging.getLogger('another').warning('\\x1b[2J two')\n"
        "    warnings.warn('\\x1b[2J three')\n"
        "    raise ValueError('\\x1b[2J four')\n"
        "entry.entry(click.Command('run', callback=run))"
    )
    ran = python(code)
    assert ran.returncode == 1
    assert printable(ran.stderr) == ran.stderr
    assert [ran.stderr.count(rf"\x1b[2J {word}") for word in ("one", "two", "three", "four")] == [
        1, 1, 1, 1
    ]  # fmt: skip


@pytest.mark.slow
def test_a_narrow_encoding_stops_nothing(evil: Path, tmp_path: Path) -> None:
    wide = Path(shutil.copytree(evil, tmp_path / "wide/写真"))
    environment = {
        "PYTHONIOENCODING": "ascii", "FEATCACHE_HOME": str(wide.parent), "PYTHONUTF8": "1",
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "featcache", "ls"], env={**os.environ, **environment},
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert rb"\u5199\u771f" in ran.stdout or "写真".encode() in ran.stdout
