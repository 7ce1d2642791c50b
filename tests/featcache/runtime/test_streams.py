"""A closed or narrow standard stream stops no work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from featcache.runtime import streams
streams.prepare()
opened = os.open("/dev/zero", os.O_RDONLY)
print("naïve")
print("naïve", file=sys.stderr)
sys.exit(0 if opened > 2 and sys.stdin.read() == "" and not sys.stdin.isatty() else 9)
"""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_is_the_null_device(closed: str) -> None:
    line = f'exec {closed}; exec "$0" -c "$1"'
    ran = subprocess.run(
        ["bash", "-c", line, sys.executable, CODE],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, b"Traceback" in ran.stderr) == (0, False)


def test_what_an_encoding_lacks_is_escaped() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE], stdin=subprocess.DEVNULL, capture_output=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == (b"na\\xefve\n", b"na\\xefve\n")


NOTES = """
import click
from featcache.console import entry
from featcache.console.text import echo
def run():
    for _ in range(3):
        echo("a note", err=True)
    echo("done")
entry.entry(click.Command("run", callback=run))
"""
PIPE = """
import sys
from featcache.catalog import home
from featcache.cli import main
def breaks():
    raise BrokenPipeError(32, "Broken pipe", "another pipe")
home.caches = breaks
sys.argv = ["featcache", "ls"]
main()
"""


def test_work_goes_on_where_stderr_takes_nothing() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ran = subprocess.run(
            [sys.executable, "-c", NOTES], stdout=subprocess.PIPE, stderr=full, check=False,
            timeout=60,
        )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, b"done\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "featcache", "ls"], stdout=write, stderr=subprocess.PIPE,
        check=False, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_another_pipe_that_breaks_is_told() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PIPE], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: another pipe: Broken pipe; ")
