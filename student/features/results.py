"""Every result of an evaluation is a line of `results.jsonl`, in the run's folder and below
`$FEATCACHE_HOME`; what belongs to it lies in `evals/` beside it.

    RUN/results.jsonl           a line for each test set
    RUN/evals/linear-1a2b3c4d.json         all of it, each class
    RUN/evals/linear-1a2b3c4d.safetensors  what the protocol trained

A teacher has no run folder: its files lie below `$FEATCACHE_HOME` alone. A folder that cannot be
written costs a note, never the result.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from featcache.catalog import home
from featcache.errors import UserError
from featcache.runtime import strict_json
from featcache.storage import json_file
from featcache.storage.schema import schema_problem

NAME = "results.jsonl"
MOST_BYTES = 256 << 20  # that are read of it
FOLDER = "evals"
_LOG = logging.getLogger(__name__)


Text = Annotated[str, Field(max_length=4096)]
Percent = Annotated[float, Field(ge=0, le=100)]


class ResultLine(BaseModel):
    """Holds what is relied on of a line; the rest is for people."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    time: Text
    run: Text
    protocol: Text
    settings: dict[str, Any]
    test: Text
    score: Percent
    interval: Annotated[list[Percent], Field(min_length=2, max_length=2)]
    n_test: Annotated[int, Field(ge=1)]
    recipe: Text = ""
    checkpoint: int | None = None


def record(
    run: Path | None,
    facts: Mapping[str, Any],
    head: Mapping[str, Tensor] | None,
    also: Path | None = None,
) -> str:
    """Write a result and return the path of its head; empty where there is none, or nothing could
    be written. `facts` has `eval`, `settings`, and `tests` with a score for each; `also` is the run
    that the evaluation made itself."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    shared = {key: value for key, value in facts.items() if key not in ("tests", "per_class")}
    rows = [
        {"time": stamp, **_line(shared), "test": name, **_scores(scores)}
        for name, scores in facts["tests"].items()
    ]
    text = "".join(f"{json.dumps(row, sort_keys=True, allow_nan=False)}\n" for row in rows)
    folders = [each for each in (run, also) if each is not None]
    written = ""
    for folder in [*folders, _home()]:
        if folder is None:
            continue
        try:
            home.append(folder / NAME, text)
        except OSError as error:
            _LOG.warning("the result is not written to %r: %s", str(folder / NAME), error.strerror)
    target = run if run is not None else _home()
    if target is not None:
        written = _write(target / FOLDER, facts, head)
    return written


def _home() -> Path | None:
    try:
        return home.home()
    except UserError as error:
        _LOG.warning("the result is not written below FEATCACHE_HOME: %s", error)
        return None


def _line(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("eval", "of", "recipe", "checkpoint", "ema", "settings", "seconds", "commit")
    return {
        {"eval": "protocol", "of": "run"}.get(name, name): facts[name]
        for name in names
        if name in facts
    }


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "score": scores["top1"],
        "interval": scores["interval"],
        "n_test": scores["n_test"],
        **({"top5": scores["top5"]} if "top5" in scores else {}),
    }


def _write(folder: Path, facts: Mapping[str, Any], head: Mapping[str, Tensor] | None) -> str:
    """Write all facts, and the head, under a name that is a digest of the settings; return the
    head's path."""
    about = {name: facts.get(name) for name in ("eval", "of", "checkpoint", "ema", "settings")}
    path = folder / f"{facts['eval']}-{json_file.digest(about)[:8]}"
    try:
        if folder.is_symlink():
            raise UserError(f"{str(folder)!r} is a link")
        folder.mkdir(parents=True, exist_ok=True)
        json_file.write_file(
            path.with_suffix(".json"), (json.dumps(facts, indent=1, default=str) + "\n").encode()
        )
        if head is None:
            return ""
        plain = {name: value.detach().cpu().contiguous() for name, value in head.items()}
        json_file.write_file(path.with_suffix(".safetensors"), save(plain))
    except (OSError, UserError) as error:
        _LOG.warning("details of the result are not written to %r: %s", str(folder), error)
        return ""
    return str(path.with_suffix(".safetensors"))


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the results of a run, oldest first; lines that are none of ours are passed over, and a
    note counts them."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        return []
    try:
        data = strict_json.read_bytes(path, MOST_BYTES)
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}; move it away") from error
    rows, strange = list[dict[str, Any]](), 0
    for line in data.splitlines():
        row = _row(line)
        rows += [row] if row is not None else []
        strange += row is None
    if strange:
        _LOG.warning("%d lines of %r are none of ours; they are passed over", strange, str(path))
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = strict_json.parse_object(line)
    except ValueError:
        return None
    return None if schema_problem(ResultLine, row) else row
