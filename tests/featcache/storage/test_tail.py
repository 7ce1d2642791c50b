"""The end of a teacher in a cache: a file that holds anything else is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastcrc.crc32 import iscsi
from safetensors.torch import save_file

from featcache.errors import UserError
from featcache.storage.tail import read_tail


def test_numbers_that_numpy_does_not_know_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"gamma": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    data = path.read_bytes()
    facts = {"bytes": len(data), "crc32c": f"{iscsi(data):08x}"}
    about = {"files": {path.name: facts}, "identity": {"codec": "fp16", "teacher": {"width": 4}}}
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_tail(tmp_path, about)


@pytest.mark.parametrize("norm", ["gamma", "rms_gamma"])
def test_an_eps_below_zero_is_one_line(norm: str, tmp_path: Path) -> None:
    """A variance below it would have no root."""
    path = tmp_path / "x.safetensors"
    save_file({norm: torch.ones(4), "eps": torch.tensor(-0.5)}, path)
    data = path.read_bytes()
    facts = {"bytes": len(data), "crc32c": f"{iscsi(data):08x}"}
    about = {"files": {path.name: facts}, "identity": {"codec": "fp16", "teacher": {"width": 4}}}
    with pytest.raises(UserError, match=r"eps is -0\.5, below 0"):
        read_tail(tmp_path, about)
