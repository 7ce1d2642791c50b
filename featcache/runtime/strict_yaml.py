"""YAML that others wrote is read within bounds and by the core schema of YAML 1.2; what is written
reads back the same by YAML 1.1 as well.

PyYAML reads YAML 1.1, where `on` is true, `012` is ten, `1e-3` is a text and `2024-01-01` a date.
Here `true` and `false` alone are booleans, 1e-3 is a number, and dates are texts. Tags, anchors and
aliases are refused: with them a few lines make gigabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from featcache.runtime.strict_json import DEPTH

_TAG = "tag:yaml.org,2002:"
_DIGITS = 40  # of a whole number; hashes of 128 bits fit


class WrittenFloat(float):
    """Keeps how a number was written: a text option given as 1.10 is the text 1.10."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


class _Loader(yaml.SafeLoader):
    """Builds plain values; the mistakes of a file are ValueErrors that name the line."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {line}: anchors and aliases (&, *) are not read; repeat it")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line}: tags (!) are not read; leave it out")
        if self.depth >= DEPTH:
            raise ValueError(f"line {line}: it is nested more than {DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping of texts, of which none is named twice."""
        found: dict[Hashable, Any] = {}
        assert isinstance(node, yaml.MappingNode)
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"line {line}: the key {str(key)[:60]!r} is no text; quote it")
            if key in found:
                raise ValueError(f"line {line}: it names {key[:60]!r} twice")
            found[key] = self.construct_object(value_node, deep=deep)
        return found


def _whole(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    if len(node.value) > _DIGITS:
        raise ValueError(f"it holds a number of {len(node.value)} digits")
    return int(node.value)


def _float(loader: yaml.SafeLoader, node: yaml.Node) -> WrittenFloat:
    text = node.value
    if not re.search("[0-9]", text):
        raise ValueError(f"it holds {text}, which is no finite number")
    if not math.isfinite(number := WrittenFloat(text)):
        raise ValueError(f"it holds the number {text[:20]}, which is too large")
    return number


# Those of YAML 1.2's core schema, but that numbers have one way to be written: 012, 0x1F and 1_000
# are texts, which an option reads as on the command line.
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    (
        "float",
        r"-?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as the text that it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quoted = not text.isprintable() or not text.isascii()
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if quoted else None)


def _number(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    text = float.__repr__(number)  # 1e-05 is a text in YAML 1.1, and 1.0e-05 is not
    return dumper.represent_scalar(
        f"{_TAG}float", text if "." in text else text.replace("e", ".0e")
    )


for _name, _pattern, _first in _RESOLVERS:
    _compiled = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _compiled, _first)
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _compiled, _first)
_Loader.add_constructor(f"{_TAG}int", _whole)
_Loader.add_constructor(f"{_TAG}float", _float)
_Dumper.add_representer(str, _text)
for _kind in (float, WrittenFloat):
    _Dumper.add_representer(_kind, _number)


def parse(text: bytes) -> Any:
    """Parse one YAML document in UTF-8; ValueError with a reason in one line for what is none, or
    is not read here.

    >>> parse(b"lr: 1e-3\\ndevice: on\\nlevels: [last:5, -1]")
    {'lr': 0.001, 'device': 'on', 'levels': ['last:5', -1]}
    """
    try:
        return yaml.load(text.decode("utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {str(error).splitlines()[0]}") from error


def format_entry(key: str, value: Any) -> str:
    r"""Write `key: value` in one line of printable ASCII, which `parse` reads back.

    >>> format_entry("out", "a: b\n"), format_entry("levels", ["last:5", "-1"])
    ('out: "a: b\\n"', "levels: ['last:5', '-1']")
    """
    text: str = yaml.dump(
        {key: value}, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False
    )
    return text.rstrip("\n").removeprefix("{").removesuffix("}")
