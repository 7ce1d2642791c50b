"""YAML of others is read within bounds and by YAML 1.2, and what is written reads back the same."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from featcache.runtime import strict_yaml

ODD = [
    "yes", "no", "on", "off", "y", "true", "null", "~", "", " ", "1", "1.5", "1e3", "1e-3", "-1",
    "012", "0x1f", "0o17", "1_000", "1:30", "2024-01-01", ".nan", ".inf", "<<", "=", "- a", "-",
    "?", "a: b", "a:", "#a", "a #b", "&a", "*a", "!a", "%a", "@a", "`a", "{a}", "[a", "a]", "'",
    '"', "a\nb", "\r", "\t", "\x1b[31m", "\x85", "\u2028", "\u202e", "\ufeff", "é", "\U0001f600",
    "\udc80", "---", "...", ".", "--flag", "x" * 300,
]  # fmt: skip
TEXTS = st.text(max_size=20) | st.sampled_from(ODD)
PLAIN = (
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | TEXTS
    | st.floats(allow_nan=False, allow_infinity=False)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr: 1e-3", 0.001),
        ("lr: 1E5", 1e5),
        ("lr: .5", 0.5),
        ("a: on", "on"),
        ("a: yes", "yes"),
        ("a: True", True),
        ("a: 012", "012"),
        ("a: 0x1f", "0x1f"),
        ("a: 1_000", "1_000"),
        ("a: 1:30", "1:30"),
        ("a: 2024-01-01", "2024-01-01"),
        ("a: 7", 7),
        ("a: -7", -7),
        ("a:", None),
        ("a: ~", None),
        ("a: [1, x]", [1, "x"]),
        ("<<: {b: 1}", {"b": 1}),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    (found,) = strict_yaml.parse(text.encode()).values()
    assert found == value
    assert type(found) is type(value) or isinstance(found, strict_yaml.WrittenFloat)


def test_a_number_keeps_how_it_was_written() -> None:
    assert strict_yaml.parse(b"1.10").text == "1.10"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: &b 1", "line 1: anchors"),
        (b"a: 1\nb: *a", "line 2: anchors"),
        (b"a: !!python/object/apply:os.system [x]", "tags"),
        (b"a: !x 1", "tags"),
        (b"a: 1\nb: 1\na: 2", "line 3: it names 'a' twice"),
        (b"1: a", "no text"),
        (b"~: a", "no text"),
        (b"[a]: b", "no text"),
        (b"[" * 5000, "nested more than 64 deep"),
        (b"\n".join(b" " * i + b"a:" for i in range(100)), "nested more than 64 deep"),
        (b"a: .nan", "no finite number"),
        (b"a: -.inf", "no finite number"),
        (b"a: 1e999", "too large"),
        (b"a: " + b"9" * 5000, "5000 digits"),
        (b"a: [", "line 1"),
        (b"a: b: c", "line 1"),
        (b"--- 1\n--- 2", "another document"),
        (b"a: \x00", "no YAML"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_refused_is_told_in_a_line(text: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        strict_yaml.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from("abc"), PLAIN | st.lists(PLAIN, max_size=3), min_size=1))
def test_what_is_written_reads_back_by_either_version(values: dict[str, Any]) -> None:
    lines = [strict_yaml.format_entry(key, value) for key, value in values.items()]
    assert all(line.isascii() and line.isprintable() for line in lines)
    text = "\n".join(lines)
    assert strict_yaml.parse(text.encode()) == values
    assert yaml.safe_load(text) == values


@pytest.mark.parametrize("text", ODD)
def test_a_text_stays_a_text(text: str) -> None:
    line = strict_yaml.format_entry("a", [text, {"b": text}])
    assert strict_yaml.parse(line.encode()) == {"a": [text, {"b": text}]}
    assert yaml.safe_load(line) == {"a": [text, {"b": text}]}
