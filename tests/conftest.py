"""Small deterministic inputs and a way to run the command, shared by the tests.

Pictures are made from a formula, not drawn: no generator's version can change them. Every colour
mode a dataset has is among them. S synthetic teacher's pixels are 28, so a whole extraction takes a
fraction of a second.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from featcache.pictures import beton
from featcache.runtime import signals
from tests.browser import chromium  # noqa: F401 (a fixture)
from tests.s3_server import as_admin, bucket, s3  # noqa: F401 (fixtures)
from tests.slurm_cluster import slurm  # noqa: F401 (a fixture)

# One thread, here and in every process a test starts: bit-equality is promised for one number of
# threads, and two threads of two processes on shared cores mostly wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Under nohup, or in the background of a script, Ctrl-C is ignored here and in what is started here;
# tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HANDLERS = {number: signal.getsignal(number) for number in (*signals.NOTICES, signal.SIGINT)}

if TYPE_CHECKING:
    from featcache.extraction.plan import Plan

settings.register_profile(
    "featcache", deadline=None, derandomize=True, max_examples=40, database=None
)
settings.load_profile("featcache")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the later cases of what is `slow_after` some; before any is left out by its marks."""
    seen: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("slow_after")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


SYNTHETIC = "synthetic:levels=3,tokens=4,width=8,size=28"  # L 3, P 4, D 8, S 28


def waves(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """(height, width, 3) uint8: smooth and different in every channel, quadrant and phase."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    parts = [np.sin(x / (5 + c) + phase) + np.cos(y / (7 - c) - 2 * phase) for c in range(3)]
    return np.clip(np.round(np.stack(parts, -1) * 60 + 128), 0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    """A command that runs in this process, in a test or in a fixture of a module, may leave its
    handlers of signals, or ignore them: a program ends then, and this one goes on."""
    _restore_handlers()
    yield
    _restore_handlers()


def _restore_handlers() -> None:
    for number, handler in _HANDLERS.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def make_photos(root: Path) -> Path:
    """Eleven pictures of every common mode, in one flat folder."""
    root.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate([(48, 64), (70, 40), (33, 90)]):
        Image.fromarray(waves(height, width, i)).save(root / f"photo{i}.jpg", quality=92)
    rgb = Image.fromarray(waves(50, 60, 3.0))
    alpha = Image.fromarray(waves(50, 60, 4.0)[..., 0])
    rgb.save(root / "rgb.png")
    rgb.convert("L").save(root / "grey.png")
    rgb.convert("1").save(root / "bits.png")
    Image.merge("LA", (rgb.convert("L"), alpha)).save(root / "grey_alpha.png")
    rgb.quantize(32).save(root / "palette.png")
    Image.merge("RGBA", (*rgb.split(), alpha)).save(root / "rgba.png")
    rgb.convert("CMYK").save(root / "cmyk.jpg", quality=92)
    Image.fromarray(waves(50, 60, 5.0)[..., 0].astype(np.uint16) * 257).save(root / "grey16.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eleven readable pictures; do not write into it."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def ffcv() -> None:
    """Skips where FFCV is not installed, which needs Debian packages to build; .ci/run installs it
    and forbids that."""
    try:
        importlib.import_module("ffcv")
    except ImportError as error:
        if os.environ.get("FEATCACHE_REQUIRE_FFCV"):
            pytest.fail(f"FEATCACHE_REQUIRE_FFCV is set, and ffcv cannot be imported: {error}")
        pytest.skip(f"{error}; to run these tests: {beton.INSTALL}")
    finally:
        torch.set_num_threads(1)  # ffcv sets it as well


@pytest.fixture(scope="session")
def ffcv_files(ffcv: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tests.ffcv_files` wrote; do not write into it."""
    folder = tmp_path_factory.mktemp("ffcv")
    made = subprocess.run(
        [sys.executable, "-m", "tests.ffcv_files", str(folder)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder


def make_plan(
    folder: Path, teacher: str = SYNTHETIC, weights: str | None = None, **changes: Any
) -> Plan:
    """A plan over a folder's pictures: three views, the first and the last level, shards of five,
    unless changed."""
    from featcache import teachers
    from featcache.extraction import plan
    from featcache.pictures.open_source import open_source
    from featcache.views.policy import Policy

    loaded = teachers.load(teacher, weights)
    policy = changes.pop("policy", Policy(size=28))
    options = {"views": 3, "levels": (1, loaded.depth), "rows_per_shard": 5, **changes}
    return plan.Plan(source=open_source(folder), teacher=loaded, policy=policy, **options)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eleven photos, a truncated JPEG in their midst, and a text that calls itself a
    picture."""
    root = make_photos(tmp_path_factory.mktemp("odd") / "pictures")
    whole = (root / "photo1.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "lie.png").write_text("not a picture")
    return root


@functools.cache
def undisturbed(folder: Path) -> dict[str, bytes]:
    """Every file of a cache of `make_plan` that was made in one go; it lies at
    `folder`/../undisturbed."""
    from featcache.extraction import extract

    out = folder.parent / "undisturbed"
    extract.run(make_plan(folder), out, batch_size=4, workers=2)
    return files_below(out)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def copy_tree(source: Path, target: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, target))


def flip(path: Path, at: int = 0, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@dataclass(frozen=True)
class Ran:
    """A finished command: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that begins with `error:`, or says that it was stopped."""
        lines = [each for each in self.err.splitlines() if each.startswith(("error:", "stopped"))]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def featcache_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ran]:
    """Run `featcache ARGS` in this process, caches below a folder of the test's own."""
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)

    def run(*args: object) -> Ran:
        from featcache.cli import main

        monkeypatch.setattr(sys, "argv", ["featcache", *map(str, args)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capfd.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


def python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own, one thread, without the network's proxies."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=120
    )


# A process that has imported everything is forked for each command that needs one of its own: a
# tenth of a second instead of three.
_SERVER = multiprocessing.get_context("forkserver")
_SLOW = ["zarr.codecs", "featcache.teachers.clip", "featcache.teachers.timm_vit"]  # to import
_SLOW += [
    "student.cli",
    "student.setup.build",
    "student.training.train",
    "torch.nn.parallel",
    "torch.distributed",
]
_SLOW += [
    "featcache.extraction.extract",
    "featcache.extraction.extend",
    "featcache.commands.extract",
]
_SERVER.set_forkserver_preload(_SLOW)


class Running:
    """`featcache ARGS` in a process of its own; `before` is a piece of Python that it runs
    first."""

    def __init__(self, folder: Path, args: Sequence[object], before: str = "") -> None:
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        self.log.touch()
        environment = {
            "FEATCACHE_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        given = ([*map(str, args)], str(self.log), environment, before)
        self.process = _SERVER.Process(target=_run_command, args=given)
        self.process.start()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Exit status, -N after signal N."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s: {self.said}"
        return self.process.exitcode


def _run_command(args: list[str], log: str, environment: dict[str, str], before: str) -> None:
    os.environ.update(environment)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    sys.argv = ["featcache", *args]
    exec(before, {})
    from featcache.cli import main

    main()


def run_module(
    name: str, *args: object, cwd: Path | None = None, timeout_s: float = 500.0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m NAME ARGS` in a process of its own, forked from the one that has imported
    everything."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / each) for each in ("out", "err")]
        given = (name, [*map(str, args)], paths, str(cwd or Path.cwd()))
        process = _SERVER.Process(target=_run_module, args=given)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (Path(path).read_text(errors="replace") for path in paths)
        return subprocess.CompletedProcess([name, *given[1]], process.exitcode or 0, out, err)


def _run_module(name: str, args: list[str], paths: list[str], cwd: str) -> None:
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    for stream, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    torch.set_num_threads(1)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = [name, *args]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`start("extract", ..., before="...")` -> Running; what still runs at the end is killed."""
    started: list[Running] = []

    def begin(*args: object, before: str = "") -> Running:
        started.append(Running(tmp_path, args, before))
        return started[-1]

    yield begin
    for each in started:
        if each.process.exitcode is None:
            each.process.kill()
            each.process.join()
