"""Results of several runs count as the same evaluation where protocol, settings, test pictures,
checkpoint and kind of weights are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from student.reporting.differences import differing

Row = Mapping[str, Any]
Key = tuple[str, str]  # protocol, and all that the score depends on beside the weights, as JSON
# what results of fine-tuned runs say in their settings and config.json says already
OWN = "finetune"
VALUE = 24  # characters of a value in a label: the end, by which paths differ


def newest(rows: Sequence[Row], record: Row) -> dict[Key, Row]:
    """Return the newest result of each evaluation of a run, whose config.json holds `record`."""
    return {(row["protocol"], json.dumps(_about(row, record), sort_keys=True)): row for row in rows}


def _about(row: Row, record: Row) -> dict[str, Any]:
    """Return what a score depends on beside the weights: of the test sets only its own. Where a run
    was fine-tuned to be scored, its settings are compared as the run's own."""
    settings = dict(row["settings"])
    is_own = row["protocol"] == record["recipe"] == OWN
    if is_own:
        settings = {key: value for key, value in settings.items() if key not in record["config"]}
    tests = settings.pop("tests", {})
    spec = tests.get(row["test"]) if isinstance(tests, dict) else tests
    about = {"test": row["test"], "pictures": spec, "n_test": row["n_test"], "settings": settings}
    if is_own:  # the checkpoint is the one that it began from
        return about
    return {**about, "checkpoint": row.get("checkpoint"), "ema": bool(row.get("ema"))}


def compare(found: Sequence[Mapping[Key, Row]]) -> dict[str, list[Any]]:
    """Return what differs between the evaluations of runs: nothing of a protocol by which one run
    alone was judged, or of which all that were have an evaluation in common. Else the newest ones
    are compared key by key."""
    out: dict[str, list[Any]] = {}
    for protocol in dict.fromkeys(key[0] for keys in found for key in keys):
        own = [[key for key in keys if key[0] == protocol] for keys in found]
        judged = [set(keys) for keys in own if keys]
        if len(judged) > 1 and not set.intersection(*judged):
            last = [json.loads(keys[-1][1]) if keys else None for keys in own]
            out |= _differences(protocol, last)
    return out


def _differences(protocol: str, last: list[Any]) -> dict[str, list[Any]]:
    """Compare those that were judged; another has null everywhere."""
    judged = [each for each in last if each is not None]
    found = {}
    for name, values in differing(judged):
        rest = iter(values)
        found[f"{protocol}.{name}"] = [None if each is None else next(rest) for each in last]
    return found or {protocol: ["several settings" if each else None for each in last]}


def scores(found: Sequence[Mapping[Key, Row]]) -> list[dict[str, Any]]:
    """Return a line for each evaluation: protocol, all it depends on, a label, and for each run its
    score and interval, or null."""
    keys = sorted({key for each in found for key in each})
    return [
        {
            "protocol": key[0],
            **json.loads(key[1]),
            "label": _label(key, keys),
            "values": [_score(each.get(key)) for each in found],
        }
        for key in keys
    ]


def _score(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else {"score": row["score"], "interval": list(row["interval"])}


def _label(key: Key, keys: Sequence[Key]) -> str:
    """Name an evaluation by PROTOCOL/TEST and what parts it from others of the protocol."""
    alike = [json.loads(text) for protocol, text in keys if protocol == key[0]]
    mine = json.loads(key[1])
    place = alike.index(mine)
    parts = [
        f"{name.removeprefix('settings.')}={str(values[place])[-VALUE:]}"
        for name, values in differing(alike)
        if name != "test"
    ]
    return " ".join([f"{key[0]}/{mine['test']}", *parts])
