"""A name that a JSON gives to a file stays below the folder that it is joined to."""

from __future__ import annotations

import pytest

from featcache.storage.names import check_file_name

OURS = (
    "zarr.json",
    "features/zarr.json",
    "features/c.0.1.0.0.0",
    "v0.tar",
    "index.safetensors",
    "prefix_crc.v3.npy",
    "synthetic_levels_3_tokens_4.safetensors",
    "._mine.py.safetensors",
    "ünïcödé-日本.safetensors",
)
OTHERS = (
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "a/..",
    "./x",
    "/x",
    "//x",
    "a//b",
    "a/",
    "a\\b",
    "..\\x",
    "C:x",
    "C:\\x",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "\u202etxt",
    "a ",
    " a",
    "a.",
    "...",
    "x" * 256,
    "ü" * 128,
    "a/b/c/d/e",
    ".manifest.json.host-1-0x0.tmp",
    "000000.zarr.HOST.TMP",
    "000000.lease",
    "000000.zarr.bad",
    "a*",
    "a?",
    "\udc80",
)


@pytest.mark.parametrize("name", OURS)
def test_names_that_the_stores_give(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_lead_elsewhere_or_are_a_writers_own(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a file inside the cache"):
        check_file_name(name)
