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
