"""Bit-equal resume, and streams that change no byte, are shown by the tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).parents[2]


class TestsFailed(Exception):
    """Some of the tests failed, or none ran."""


def exact(bench: Bench) -> None:
    """Run the tests; each that failed is a row, and none that passed is a failure."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "--maxfail=8", *bench.sizes.exact_tests]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        done = subprocess.run(command, cwd=ROOT, env=env, check=False)
        if not report.is_file():
            raise TestsFailed(f"pytest ended with exit status {done.returncode}: see the log")
        cases = list(xml.parse(report).iter("testcase"))
    wrong = [case for case in cases if case.find("failure") is not None or _broke(case)]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(wrong) - len(skipped)
    bench.row("tests passed", passed, f"of {len(cases)}", at_least=max(len(cases), 1))
    for case in wrong:
        bench.row(str(case.get("name")), None, note="FAILED")
    if wrong or not passed:
        raise TestsFailed(f"{len(wrong)} failed, {len(skipped)} were skipped: see the log")


def _broke(case: xml.Element) -> bool:
    return case.find("error") is not None


def _python_path() -> list[str]:
    return [path for path in (os.environ.get("PYTHONPATH"),) if path]
