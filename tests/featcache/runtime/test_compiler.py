"""--compile asks for its compiler before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import UsageError
from featcache.runtime.compiler import check_compiler, failure


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; no variable is set."""
    for name in ("CC", "CXX", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_a_cpu_needs_a_cpp_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"g\+\+ is not on PATH; run `apt-get install g\+\+`"):
        check_compiler("cpu")
    program(tools / "g++")
    check_compiler("cpu")
    monkeypatch.setenv("CXX", "mine -O2")
    with pytest.raises(UsageError, match="mine is not on PATH"):
        check_compiler("cpu")
    program(tools / "mine")
    check_compiler("cpu")


def test_a_gpu_needs_triton_and_a_c_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="triton is not installed; run `pip install triton`"):
        check_compiler("cuda:0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UsageError, match="gcc or clang or cc is not on PATH"):
        check_compiler("cuda")
    program(tools / "clang")
    check_compiler("cuda")


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_variable_that_turns_it_off_is_named(
    name: str, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tools / "g++")
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=f"{name}=1 turns it off"):
        check_compiler("cpu")


def test_a_compiler_that_fails_at_work_is_one_line() -> None:
    class CppCompileError(RuntimeError):
        """Stands for torch's own."""

    CppCompileError.__module__ = "torch._inductor.exc"
    line = failure(CppCompileError("C++ compile error\n\nfatal error: Python.h"))
    assert line is not None
    assert "fails on this machine: C++ compile error fatal error: Python.h; it needs" in line
    assert "leave --compile out" in line
    assert failure(RuntimeError("torch._inductor")) is None
