"""A program that calls us is checked by mypy: the keywords' types, and those of what comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def checked(code: str, folder: Path) -> list[str]:
    """What mypy says of a program, by our own configuration: what it knows of us is not read
    again."""
    config = folder / "pyproject.toml"
    own = (ROOT / "pyproject.toml").read_text()
    config.write_text("".join(x for x in own.splitlines(True) if not x.startswith("packages = ")))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--no-error-summary",
         "--hide-error-codes", "--no-pretty", "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.stderr == ""
    return [line.partition(": ")[2] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_types_are_seen(tmp_path: Path) -> None:
    told = checked(
        """
import featcache
done = featcache.extract(teacher="synthetic", images="photos", levels=[8, 10], scale=(0.2, 1))
reveal_type(done)
reveal_type(done.cache)
featcache.extract(views="two")
featcache.extract(store="tar")
featcache.extract(batchsize=3)
def note(now: featcache.Progress) -> None:
    reveal_type(now.rate)
featcache.extract(progress=note)
import student
reveal_type(student.train(recipe="mae", settings={"drop_path": 0}, progress=note).run)
reveal_type(student.evaluate("knn", run="runs/x", k=5).scores["test"].interval)
reveal_type(student.export(run="runs/x", format="timm", out="x").difference)
student.train(sampling="blocks")
student.evaluate(run="runs/x")
""",
        tmp_path,
    )
    assert told == [
        'note: Revealed type is "featcache.api.extract.ExtractResult"',
        'note: Revealed type is "pathlib.Path | None"',
        'error: Argument "views" to "extract" has incompatible type "str"; expected "int"',
        'error: Argument "store" to "extract" has incompatible type "Literal[\'tar\']"; expected '
        "\"Literal['zarr', 'webdataset']\"",
        'error: Unexpected keyword argument "batchsize" for "extract"; did you mean "batch_size"?',
        'note: "extract" defined in "featcache.api.extract"',
        'note: Revealed type is "float | None"',
        'note: Revealed type is "pathlib.Path | None"',
        'note: Revealed type is "tuple[float, float]"',
        'note: Revealed type is "float"',
        'error: Argument "sampling" to "train" has incompatible type "Literal[\'blocks\']"; '
        "expected \"Literal['random', 'block'] | None\"",
        'error: Missing positional argument "protocol" in call to "evaluate"',
    ]
