"""`featcache doctor` on machines and installations in which something is broken, each made so from
outside: by variables, folders, packages and what the system answers."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache.extraction import extract
from featcache.maintenance import check_home, check_machine, read_speed
from featcache.runtime import machine
from tests.conftest import Ran, Running, make_photos, make_plan, python
from tests.featcache.runtime.test_packages import write

Command = Callable[..., Ran]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_speed, "BYTES", 8 << 20)
    for name in [name for name in os.environ if name.startswith("FEATCACHE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = make_photos(tmp_path_factory.mktemp("doctor") / "pictures")
    extract.run(make_plan(photos), photos.parent / "origin", batch_size=4)
    return photos.parent / "origin"


@pytest.fixture
def doctor(featcache_command: Command, tmp_path: Path) -> Callable[[], Any]:
    """Run it, check that status, verdict and JSON agree, and return the findings by name."""
    (tmp_path / "home").mkdir()

    def run() -> dict[str, dict[str, Any]]:
        ran = featcache_command("doctor", "--json")
        facts = json.loads(ran.out)
        broken = {each["what"] for each in facts["findings"] if each["state"] == "broken"}
        assert set(facts["broken"]) == broken
        assert (ran.status, facts["well"]) == (int(bool(broken)), not broken)
        if broken:
            assert ran.error.startswith(f"error: doctor: broken: {', '.join(facts['broken'])}; ")
        wrong = [each for each in facts["findings"] if each["state"] != "ok"]
        assert all(each["advice"] or re.search("; (give|mount)", each["value"]) for each in wrong)
        return {each["what"]: each for each in facts["findings"]}

    return run


def broken(findings: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, each in findings.items() if each["state"] == "broken"]


def test_a_machine_on_which_all_is_well(
    featcache_command: Command, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, no network, and nothing is left in the home."""

    def no_network(*args: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    shutil.copytree(origin, tmp_path / "home/one")
    ran = featcache_command("doctor")
    assert ran.status == 0, ran.out + ran.err
    lines = ran.out.splitlines()
    assert lines.pop() == "all that work needs is well"
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    for word in ("python", "featcache", "torch", "torchvision", "timm", "open-clip-torch", "zarr",
                 "accelerate", "numcodecs", "pillow", "numba", "cores", "memory", "open files",
                 "shared memory", "FEATCACHE_HOME", "compiled code", "caches"):  # fmt: skip
        assert [line for line in lines if line[8:].startswith(word)], word
    size = sum(
        facts["bytes"]
        for record in origin.rglob("0*.json")
        for facts in json.loads(record.read_text())["files"].values()
    )
    assert [line for line in lines if f" 1, {size / 1e9:.2f} GB, 0 damaged" in line]
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["one"]


def test_a_missing_home_is_not_made(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "home").rmdir()
    found = doctor()
    assert found["home"]["exists"] is False
    assert "the first extraction makes it" in found["home"]["value"]
    assert found["read speed of the home"]["bytes"] == 8 << 20
    assert not (tmp_path / "home").exists()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("home", "told"),
    [
        ("/proc/here", "'/proc' cannot be written"),
        ("FILE", "is no folder"),
        ("FILE/below", "is no folder"),
        ("s3://bucket/caches", "s3:// is no place of this machine"),
        ("~nobody_of_this_name/caches", "no such user"),
    ],
)
def test_a_home_that_cannot_be(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, told: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATCACHE_HOME", home.replace("FILE", str(tmp_path / "file")))
    found = doctor()
    assert broken(found) == ["home"]
    assert told in found["home"]["value"]
    assert "FEATCACHE_HOME" in found["home"]["advice"] + found["home"]["value"]
    assert found["compiled code"]["state"] == "ok"


def test_damaged_caches_are_a_line_each(
    doctor: Any, featcache_command: Command, origin: Path, tmp_path: Path
) -> None:
    """Whatever their names hold."""
    names = ("bad1", "bad2\x1b[31m\nBROKEN", "good")
    for name in names:
        shutil.copytree(origin, tmp_path / "home" / name)
    for name in names[:2]:
        (tmp_path / "home" / name / "manifest.json").write_text("{")
    ran = featcache_command("doctor")
    lines = [line for line in ran.out.splitlines() if line.startswith("BROKEN")]
    assert ran.status == 1
    assert ran.error.startswith("error: doctor: broken: damaged cache; ")
    assert len(lines) == 2
    assert all("manifest.json" in line and "extract again" in line for line in lines)
    assert "\x1b" not in ran.out
    found = doctor()
    assert (found["caches"]["caches"], found["caches"]["damaged"]) == (3, 2)


def test_a_home_of_many_caches_is_looked_at_for_a_while(
    doctor: Any, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(origin, tmp_path / "home/one")
    monkeypatch.setattr(check_home, "_CACHES_S", -1.0)
    found = doctor()["caches"]
    assert (found["state"], found["caches"], found["looked_at"]) == ("note", 1, 0)
    assert "featcache ls" in found["advice"]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", ["torch", "numba", "psutil", "packaging.requirements"])
def test_a_library_that_cannot_be_imported(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The rest is looked at all the same."""
    named = {"torch": "torch works", "numba": "compiled code", "psutil": "memory"}
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "featcache.runtime.packages", raising=False)
    monkeypatch.delattr("featcache.runtime.packages", raising=False)
    found = doctor()
    if name == "packaging.requirements":
        assert {"versions", "extras"} <= set(broken(found))
    else:
        assert broken(found) == [named[name]]
        assert name in found[named[name]]["value"]
    assert found["open files"]["state"] == "ok"


@pytest.mark.slow
def test_a_torch_that_breaks_while_it_is_imported(tmp_path: Path) -> None:
    """As one whose CUDA libraries do not fit; in a process of its own."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so: no such \\x1b file')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = python(
        "import sys; sys.argv = ['featcache', 'doctor']; from featcache.cli import main; main()",
        PYTHONPATH=path,
        FEATCACHE_HOME=str(tmp_path / "home"),
    )
    assert ran.returncode == 1
    assert "broken: torch works;" in ran.stderr
    assert "Traceback" not in ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("BROKEN")]
    assert "OSError: libcudart.so: no such \\x1b file" in line


def test_versions_below_what_is_needed(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ("torch>=99", "zz-missing>=3", "numba", "click>=98")
    lines = ("Requires-Python: >=3.99", *(f"Requires-Dist: {need}" for need in needs))
    write(tmp_path / "site", "featcache", "9.0", *lines, "Provides-Extra: dear",
          'Requires-Dist: zz-dear>=7; extra == "dear"')  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = doctor()
    assert broken(found) == ["python", "torch", "zz-missing", "click"]
    assert found["torch"]["value"].endswith("; >=99 is needed")
    assert found["torch"]["advice"] == "pip install 'torch>=99'"
    assert found["zz-missing"]["value"] == "not installed; >=3 is needed"
    dear = found["extra dear"]
    assert (dear["state"], dear["missing"]) == ("ok", ["zz-dear>=7"])
    assert dear["advice"] == "for it: pip install 'featcache[dear]'"


def test_packages_that_do_not_go_together_are_told(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "site", "featcache", "9.0", "Requires-Dist: torchvision")
    write(tmp_path / "site", "torchvision", "0.1", "Requires-Dist: torch==1.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = doctor()["packages"]
    assert found["state"] == "note"
    assert found["value"].startswith("torchvision 0.1 needs torch==1.0, and ")


def test_code_that_cannot_be_kept_or_is_not_compiled(
    doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder of numba's can be written; then numba is turned off."""
    import numba

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refuse)
        found = doctor()
    assert (found["compiled code"]["state"], found["numba's cache"]["state"]) == ("ok", "note")
    assert "NUMBA_CACHE_DIR" in found["numba's cache"]["advice"]
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    found = doctor()
    assert broken(found) == ["compiled code"]
    assert "NUMBA_DISABLE_JIT" in found["compiled code"]["advice"]


def test_the_folder_that_a_variable_gives_numba_is_told(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    assert doctor()["numba's cache"]["path"].startswith(str(tmp_path / "kept"))
    assert (tmp_path / "kept").is_dir()


# ---------------------------------------------------------------- the machine


@pytest.mark.slow
def test_no_gpu(doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None there; a driver and none found, or a torch without CUDA; all hidden."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check_machine, "DRIVER", tmp_path / "nvidiactl")
    assert doctor()["GPUs"]["value"] == "none: work is done on the CPU"
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = doctor()["GPUs"]
    assert (found["state"], "nvidia-smi" in found["advice"]) == ("note", True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch built for CUDA" in doctor()["GPUs"]["advice"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor()["GPUs"]
    assert (found["state"], "CUDA_VISIBLE_DEVICES=''" in found["value"]) == ("ok", True)


def test_gpus(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is computed on the CPU here; the second device is lost."""
    about = SimpleNamespace(name="H\x1b200", total_memory=141 * 10**9, major=9, minor=0)

    def properties(index: int) -> SimpleNamespace:
        if index:
            raise RuntimeError("CUDA error: device lost\nmore of it")
        return about

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: tempfile.SpooledTemporaryFile())  # noqa: SIM115
    found = doctor()
    assert found["GPU 0"]["value"] == "H\x1b200, 141.00 GB, capability 9.0, bf16 yes"
    assert (found["GPU 0"]["computes"], found["GPU 0"]["capability"]) == (True, [9, 0])
    assert broken(found) == ["GPU 1"]
    assert found["GPU 1"]["value"] == "RuntimeError: CUDA error: device lost"
    monkeypatch.setattr(torch, "ones", lambda *shape, device: 2 * ones(*shape))
    assert "wrong products" in doctor()["GPU 0"]["value"]


@pytest.mark.slow
def test_disks_that_are_full_or_nearly(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [2 << 20]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=free[0])
    )
    found = doctor()
    names = ["disk of the temp folder", "disk of this folder", "disk of the home"]
    assert broken(found) == names
    assert "no room" in found["read speed of the home"]["value"]
    assert found["shared memory"]["state"] == "note"
    free[0] = 2 << 30
    found = doctor()
    assert [found[name]["state"] for name in names] == ["note"] * 3
    free[0] = 6 << 30
    assert [doctor()[name]["state"] for name in names] == ["ok"] * 3


def test_no_inodes(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = os.statvfs(os.curdir)
    blocks = {name: getattr(usage, name) for name in dir(usage) if name.startswith("f_")}
    full = SimpleNamespace(**{**blocks, "f_files": 100, "f_favail": 0})
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    found = doctor()["disk of the home"]
    assert (found["state"], "no inode free" in found["value"]) == ("broken", True)


def test_a_temp_folder_that_is_none(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", none)
        found = doctor()
    assert broken(found) == ["disk of the temp folder"]
    assert "TMPDIR" in found["disk of the temp folder"]["advice"]


def test_a_folder_that_is_no_longer_there(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        found = doctor()
    assert broken(found) == ["disk of this folder"]


def test_limits_of_the_process(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few cores' time, few files, hardly any shared memory: notes that say what to do."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1500000000\n")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (64, 64))
    found = doctor()
    assert found["cores"]["cgroup"] == 0.5
    assert "--workers 1" in found["cores"]["advice"]
    assert found["memory"]["value"].endswith("1.50 GB allowed by cgroup")
    assert "ulimit -Hn" in found["open files"]["advice"]
    states = [found[name]["state"] for name in ("cores", "open files", "shared memory")]
    assert states == ["note"] * 3
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, -1))
    assert doctor()["open files"]["value"] == "1024, at most any number"


def test_a_slow_disk(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_home, "_SLOW", 1e15)
    found = doctor()["read speed of the home"]
    assert (found["state"], "featcache copy" in found["advice"]) == ("note", True)


# ---------------------------------------------------------------- variables


def test_variables_that_make_no_sense(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of those that are not ours are nobody's business."""
    monkeypatch.setenv("FEATCACHE_HOEM", "secret")
    found = doctor()
    assert found["FEATCACHE_HOEM"]["state"] == "note"
    assert "did you mean FEATCACHE_HOME" in found["FEATCACHE_HOEM"]["advice"]
    assert "secret" not in json.dumps(found)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "images",
    ["DIR::DIR/none", "DIR/none", "DIR/none.beton", "DIR/{0..3}.tar", "hdfs://a/b", "DIR::"],
)
def test_pictures_that_are_not_there(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    monkeypatch.setenv("FEATCACHE_IMAGES", images.replace("DIR", str(tmp_path)))
    assert broken(doctor()) == ["FEATCACHE_IMAGES"]


@pytest.mark.slow
def test_pictures_that_are_there(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0.tar").touch()
    (tmp_path / "a.beton").touch()
    both = f"{tmp_path}::{tmp_path / 'a.beton'}"
    for images in (tmp_path, tmp_path / "?.tar", tmp_path / "a.beton", both):
        monkeypatch.setenv("FEATCACHE_IMAGES", str(images))
        assert doctor()["FEATCACHE_IMAGES"]["value"] == repr(str(images))
    monkeypatch.setenv("FEATCACHE_IMAGES", "gs://a/b.tar")  # would cost requests, perhaps money
    assert doctor()["FEATCACHE_IMAGES"]["value"].endswith("(an object store is not asked here)")


@pytest.mark.slow
@pytest.mark.parametrize("made", ["KeyboardInterrupt", "ImportError('cut short')"])
def test_stopped_while_it_works(start: Callable[..., Running], tmp_path: Path, made: str) -> None:
    """A signal within a check, and what a library may make of it, is no finding: one line, and
    nothing is left."""
    before = f"""
import os, signal, time
from featcache.maintenance import read_speed

def stop(*args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    except KeyboardInterrupt:
        raise {made} from None

read_speed._read = stop
"""
    (tmp_path / "home").mkdir()
    ran = start("doctor", before=before)
    assert ran.wait() == 75
    assert ran.said == "stopped; run the same command again\n"
    assert list((tmp_path / "home").iterdir()) == []
