"""URLs of object stores are parsed strictly; what looks like one and is none is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UsageError
from featcache.objects import url


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s3://bucket/a/b", ("s3", "bucket", "a/b")),
        ("gs://my-bucket.x", ("gs", "my-bucket.x", "")),
        ("az://container/a/", ("az", "container", "a")),
    ],
)
def test_parsed(text: str, parts: tuple[str, str, str]) -> None:
    found = url.parse(text)
    assert (found.scheme, found.bucket, found.path) == parts
    assert url.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://host/x", "known are s3://, gs://, az://"),
        ("S3://bucket/x", "known are"),
        ("s3://b/x", "its bucket must have 3 to 63"),
        ("s3:///x", "its bucket must"),
        ("s3://user:secret@host/x", "its bucket must"),
        ("s3://bucket/a/../b", "'.' or '..'"),
        ("s3://bucket/a//b", "is empty"),
        ("s3://bucket/" + "x" * 1025, "1024 bytes at most"),
        ("s3://bucket/a\nb", "cannot be printed"),
        ("s3://bucket/a?x=1", "have no meaning"),
    ],
)
def test_refused(text: str, told: str) -> None:
    assert url.is_url(text)
    with pytest.raises(UsageError, match=told):
        url.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_a_place_or_a_usage_error(text: str) -> None:
    try:
        found = url.parse(f"s3://bucket/{text}")
    except UsageError:
        return
    assert ".." not in found.path.split("/")
    assert str(found).isprintable()
    assert found.join("x").path.endswith("/x") or found.path == ""
