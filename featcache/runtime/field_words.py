"""A value of the wrong kind is told in our words, whatever the checking library calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# by pydantic's names of errors (docs.pydantic.dev, "Validation Errors"); {} are an error's `ctx`
_WORDS = {
    "missing": "it is needed",
    "extra_forbidden": "it is not known",
    "bool": "true or false is needed",
    "int": "a whole number is needed",
    "float": "a number is needed",
    "string": "a text is needed",
    "list": "a list is needed",
    "tuple": "a list is needed",
    "dict": "an object is needed",
    "model": "an object is needed",
    "dataclass": "an object is needed",
    "none_required": "null is needed",
    "int_parsing_size": "a smaller number is needed",
    "finite_number": "a finite number is needed",
    "greater_than": "more than {gt} is needed",
    "greater_than_equal": "at least {ge} is needed",
    "less_than": "less than {lt} is needed",
    "less_than_equal": "at most {le} is needed",
    "multiple_of": "a multiple of {multiple_of} is needed",
    "literal_error": "{expected} is needed",
    "too_short": "a length of at least {min_length} is needed",
    "too_long": "a length of at most {max_length} is needed",
    "string_too_short": "a length of at least {min_length} is needed",
    "string_too_long": "a length of at most {max_length} is needed",
    "string_pattern_mismatch": "a text that {pattern} fits is needed",
    "json_invalid": "it is no JSON",
    "recursion_loop": "it holds itself",
}


def field_reason(error: Mapping[str, Any]) -> str:
    """Say what is wrong with a value: one of the `errors()` of a pydantic.ValidationError."""
    kind = str(error["type"])
    words = _WORDS.get(kind) or _WORDS.get(kind.partition("_")[0])
    if words is not None:
        return words.format(**error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
