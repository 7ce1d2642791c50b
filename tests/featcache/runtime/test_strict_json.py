"""JSON of others: within bounds, and what JSON has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from featcache.runtime import strict_json


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[NaN]", "NaN"), ("[-Infinity]", "-Infinity"), ("[1e999]", "too large"),
        ("[" * 100_000 + "]" * 100_000, "nested"), ('{"a":' * 100_000, "nested"),
        ("[" * 65 + "]" * 65, "nested more than 64"), ("[" * 900 + "]" * 900, "nested"),
        ("1" * 5000, "digits"), ("", "Expecting value"), ("{", "Expecting"), ("\x00", "Expecting"),
        ("[1] x", "Extra data"), ("{'a': 1}", "Expecting"),
        ('{"lr": 1, "b": 2, "lr": 3}', "'lr' twice"), ('[{"": {"x": 1, "x": 1}}]', "'x' twice"),
    ],
)  # fmt: skip
def test_what_is_no_plain_json_is_a_value_error_of_one_line(text: str, told: str) -> None:
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=told) as caught:
            strict_json.parse(form)
        assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decode"):
        strict_json.parse(b'["\xff"]')


def test_plain_values_come_through() -> None:
    value = {"a": [1, -2.5, None, True, "\udc80", {"b": [[]]}], "": {}, "n": 10**30}
    assert strict_json.parse(json.dumps(value)) == value
    deep = json.loads("[" * 64 + "]" * 64)
    assert strict_json.parse(json.dumps(deep)) == deep


def test_a_file_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 100 + "]")
    assert strict_json.read_file(path) == []
    with pytest.raises(ValueError, match="more than 0 KiB"):
        strict_json.read_file(path, 50)
    with pytest.raises(IsADirectoryError):
        strict_json.read_file(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no regular file"):
            strict_json.read_file(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[]", "a list"), ("3", "a number"), ('"x"', "a text"), ("null", "null"), ("true", "true")],
)
def test_another_value_than_an_object(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"{told}.*no object"):
        strict_json.parse_object(text)
