"""The wheel holds all that the programs need: installed without this repository, they run from an
empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests import student_fixtures as fx

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Variables by which nothing of the repository is found."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77")
    out = tmp_path_factory.mktemp("wheel")
    # a copy of what is packed: the build leaves folders behind
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no repository to take the files from")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("featcache/", "student/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    subprocess.run([*pip, "-w", out, source], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `featcache` and `student` in an environment of the wheel, which sees the
    libraries of this one but not the repository."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin/python", "install")
    command = [*pip, "-q", "--no-deps", "--force-reinstall", wheel]
    subprocess.run(command, cwd=home, env=environment(), check=True, capture_output=True)
    (own,) = (home / "lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.mark.slow
def test_it_holds_two_packages_and_their_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "featcache", "student", f"{wheel.name.split('-py3')[0]}.dist-info",
    }  # fmt: skip
    assert {"featcache/py.typed", "student/py.typed"} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)
    tracked = {
        path.relative_to(ROOT).as_posix()
        for package in ("featcache", "student")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked <= set(names)


@pytest.mark.slow
def test_installed_it_extracts_trains_scores_and_exports(programs: Path, tmp_path: Path) -> None:
    env = {**environment(), "FEATCACHE_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}

    def call(name: str, *words: object) -> str:
        command = [str(programs / name), *map(str, words)]
        ran = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = "import featcache, student; print(featcache.__file__, student.__file__)"
    found = call("python", "-c", where).split()
    assert all(Path(path).is_relative_to(programs.parent) for path in found)
    pictures = tmp_path / "pictures"
    for number, path in enumerate(sorted(fx.pictures().glob("*.png"))):
        (pictures / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, pictures / "ab"[number % 2])
    words = ("--images", pictures, "--levels", "last:3", "--size", fx.SIZE, "--out", "cache")
    call("featcache", "extract", "--teacher", fx.TEACHER, *words)
    call("featcache", "verify", "cache")
    settings = [word for text in fx.RECIPES["mralign"] for word in ("--set", text)]
    words = ("--cache", "cache", "--images", pictures, "--steps", 2, "--batch-size", 8)
    call("student", "train", "--recipe", "mralign", *words, "--out", "run", *settings)
    call("student", "eval", "knn", "run", "--images", pictures, "--test", pictures)
    call("student", "export", "run", "--format", "timm", "--out", "exported")
    assert (tmp_path / "exported/model.safetensors").is_file()
