"""Wrong values are told in plain words; each by the library's own error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from featcache.runtime.field_words import field_reason

CASES = [
    (int, "x", "a whole number is needed"),
    (int, 1.5, "a whole number is needed"),
    (float, "x", "a number is needed"),
    (float, float("nan"), "a finite number is needed"),
    (bool, 3, "true or false is needed"),
    (str, 3, "a text is needed"),
    (list[int], 3, "a list is needed"),
    (tuple[int, int], 3, "a list is needed"),
    (dict[str, int], 3, "an object is needed"),
    (None, 3, "null is needed"),
    (Annotated[int, Field(gt=2)], 2, "more than 2 is needed"),
    (Annotated[int, Field(ge=2)], 1, "at least 2 is needed"),
    (Annotated[float, Field(lt=1)], 1.0, "less than 1.0 is needed"),
    (Annotated[float, Field(le=1)], 2.0, "at most 1.0 is needed"),
    (Annotated[int, Field(multiple_of=8)], 9, "a multiple of 8 is needed"),
    (Literal["a", "b"], "c", "'a' or 'b' is needed"),
    (Annotated[list[int], Field(min_length=2)], [1], "a length of at least 2 is needed"),
    (Annotated[list[int], Field(max_length=1)], [1, 2], "a length of at most 1 is needed"),
    (Annotated[str, Field(min_length=2)], "a", "a length of at least 2 is needed"),
    (Annotated[str, Field(max_length=1)], "ab", "a length of at most 1 is needed"),
    (Annotated[str, Field(pattern="^a$")], "b", "a text that ^a$ fits is needed"),
]


@pytest.mark.parametrize(("kind", "value", "told"), CASES)
def test_a_wrong_value(kind: Any, value: object, told: str) -> None:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind, config=strict).validate_python(value)
    assert field_reason(caught.value.errors()[0]) == told


def test_a_check_of_our_own_keeps_its_words() -> None:
    assert field_reason({"type": "value_error", "msg": "Value error, it is odd"}) == "it is odd"
    assert field_reason({"type": "unheard_of", "msg": "Something else"}) == "Something else"
