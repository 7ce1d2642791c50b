"""The actors of a Ray cluster, and who makes which shard, are decided by arithmetic: no cluster is
needed here."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache.api import planned_jobs
from featcache.console import extract_parameters, keywords
from featcache.console.engine_options import check_engine
from featcache.console.extract_options import ExtractOptions
from featcache.errors import UsageError, UserError
from featcache.extraction import engine, ray_cluster, ray_probe, ray_worker
from featcache.extraction.ray_plan import ActorSize, actor_size
from featcache.extraction.shard_board import MOST_IN_A_ROW, ShardBoard
from tests.conftest import SYNTHETIC, Ran, python

Command = Callable[..., Ran]


# ---------------------------------------------------------------- sizes of actors


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "device", "size"),
    [
        ([{"CPU": 2.0}], 8, None, None, ActorSize(2, 0.0, "cpu")),
        ([{"CPU": 64.0}, {"CPU": 2.0}], 8, None, None, ActorSize(8, 0.0, "cpu")),
        # 8 GPUs, 96 CPUs: 12 for each, 6 for each half
        ([{"CPU": 96.0, "GPU": 8.0}], 96, None, None, ActorSize(12, 1.0, "cuda")),
        ([{"CPU": 96.0, "GPU": 8.0}], 96, 0.5, None, ActorSize(6, 0.5, "cuda")),
        ([{"CPU": 96.0, "GPU": 8.0}], 4, 0.5, "cuda", ActorSize(4, 0.5, "cuda")),
        # fewer CPUs than GPUs: one at least
        ([{"CPU": 2.0, "GPU": 8.0}], 4, None, None, ActorSize(1, 1.0, "cuda")),
        ([{"CPU": 96.0, "GPU": 8.0}], 4, None, "cpu", ActorSize(4, 0.0, "cpu")),
        # a head without CPUs beside a node with GPUs
        ([{}, {"CPU": 8.0, "GPU": 1.0}], 16, None, None, ActorSize(8, 1.0, "cuda")),
    ],
)
def test_the_size_of_actors(
    nodes: list[dict[str, float]],
    workers: int,
    gpus: float | None,
    device: str | None,
    size: ActorSize,
) -> None:
    assert actor_size(nodes, workers, gpus, device) == size


@pytest.mark.parametrize(
    ("nodes", "gpus", "device", "told"),
    [
        ([{"CPU": 2.0}], 0.5, None, "--gpus-per-actor 0.5: none of the cluster's 1 node has a GPU"),
        ([{"CPU": 2.0}] * 2, None, "cuda", "--device cuda: none of the cluster's 2 nodes has a"),
        ([{}], None, None, "none of the cluster's 1 node offers a CPU"),
    ],
)
def test_a_cluster_without_what_is_asked_for(
    nodes: list[dict[str, float]], gpus: float | None, device: str | None, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        actor_size(nodes, 2, gpus, device)
    assert told in str(caught.value)


def test_versions_of_a_node_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ray_worker.versions()
    assert {"featcache", "torch", "pillow", "python"} <= here.keys()
    ray_probe.check_same_versions({"node": "n1 (10.0.0.1)", "versions": dict(here)})
    there = {**here, "torch": "2.0.0\x1b[31m", "pillow": None}
    with pytest.raises(UserError) as caught:
        ray_probe.check_same_versions({"node": "n1 (10.0.0.1)", "versions": there})
    told = str(caught.value)
    assert "node n1 (10.0.0.1)" in told
    assert f"torch 2.0.0\\x1b[31m there and {here['torch']} here" in told
    assert f"pillow none there and {here['pillow']} here" in told
    assert "timm" not in told.partition("; ")[0]


# ---------------------------------------------------------------- who makes which shard


def test_shards_are_handed_out_in_order_and_once() -> None:
    board = ShardBoard({"a": 5, "b": 5, "c": 3})
    assert [board.take(worker, 0.0) for worker in (7, 8, 9, 10)] == ["a", "b", "c", None]
    assert [board.done(worker) for worker in (8, 7)] == ["b", "a"]
    assert board.left == 1
    assert board.take(7, 0.0) is None
    board.done(9)
    assert board.left == 0


def test_a_lost_workers_shard_is_the_next_one_given() -> None:
    board = ShardBoard({"a": 5, "b": 5, "c": 3})
    board.take(0, 0.0)
    board.take(1, 0.0)
    assert board.lose(0, "n", "gone") == "a"
    assert board.take(2, 0.0) == "a"
    with pytest.raises(UserError, match="shard a has ended its actor 2 times, the last on n2: why"):
        board.lose(2, "n2", "why")


def test_what_another_writer_holds_is_asked_for_again_later() -> None:
    board = ShardBoard({"a": 5, "b": 5})
    board.take(0, 0.0)
    board.put_off(0, until=10.0)
    assert board.take(0, 1.0) == "b"
    board.done(0)
    assert board.take(0, 9.0) is None
    assert board.left == 1
    assert board.take(0, 10.0) == "a"


def test_losses_are_counted_as_long_as_nothing_is_finished() -> None:
    board = ShardBoard({str(i): 1 for i in range(20)})
    for worker in range(MOST_IN_A_ROW - 1):
        board.lose(worker, "n", "gone")
    board.take(50, 0.0)
    board.done(50)
    for worker in range(MOST_IN_A_ROW - 1):
        board.lose(100 + worker, "n", "gone")
    with pytest.raises(UserError, match="4 actors were lost in a row and no shard was finished"):
        board.lose(200, "n", "gone")


# ---------------------------------------------------------------- the command's options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--address auto", "--address auto is an option of a cluster: give --engine ray"),
        ("--actors 2", "--actors 2 is an option of a cluster: give --engine ray"),
        ("--gpus-per-actor 0.5", "--gpus-per-actor 0.5 is an option of a cluster"),
        ("--engine ray --devices cpu,cpu", "--devices cpu,cpu and --engine ray"),
        ("--engine ray --shard 0/2", "--shard 0/2 and --engine ray"),
        ("--engine ray --device cuda:1", "--device 'cuda:1' and --engine ray: cpu or cuda"),
        ("--engine ray --device cpu --gpus-per-actor 1", "--device cpu and --gpus-per-actor 1"),
        ("--engine ray --actors 3:2", "'3:2' given; N, or MIN:MAX"),
        ("--engine ray --actors 0", "'0' given; N, or MIN:MAX"),
        ("--engine ray --actors 0:4", "'0:4' given"),
        ("--engine ray --actors two", "'two' given"),
        ("--engine ray --gpus-per-actor 0", "--gpus-per-actor"),
        ("--engine ray --gpus-per-actor -1", "--gpus-per-actor"),
        ("--engine ray --gpus-per-actor 2", "--gpus-per-actor"),
        ("--engine rai", "did you mean ray?"),
    ],
)
def test_options_that_contradict_are_one_line(
    featcache_command: Command, words: str, told: str
) -> None:
    ran = featcache_command("extract", "--teacher", SYNTHETIC, "--images", "x", *words.split())
    assert ran.status == 2
    assert told in ran.error


@pytest.mark.parametrize("address", ["", "head", "ray://head", "head:0", "head:99999", "head:x1"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="auto, HOST:PORT or ray://HOST:PORT is needed"):
        ray_cluster.find_address(address)


def test_the_address_is_the_options_then_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_cluster.find_address(None) is None
    assert ray_cluster.find_address("ray://h:1") == ("--address", "ray://h:1")
    monkeypatch.setenv("RAY_ADDRESS", "h:2")
    assert ray_cluster.find_address(None) == ("RAY_ADDRESS", "h:2")
    assert ray_cluster.find_address("auto") == ("RAY_ADDRESS", "h:2")
    assert ray_cluster.find_address("g:3") == ("--address", "g:3")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_cluster.find_address(None) is None


def test_nobody_answers() -> None:
    with pytest.raises(
        UserError, match=r"--address '127\.0\.0\.1:9': no Ray cluster answers there"
    ):
        ray_cluster.check_answers("--address", "127.0.0.1:9")


def test_without_ray_a_line_says_how_to_install_it(
    featcache_command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    ran = featcache_command(
        "extract", "--teacher", SYNTHETIC, "--images", photos, "--size", 28, "--levels", 1,
        "--out", tmp_path / "c", "--engine", "ray",
    )  # fmt: skip
    assert ran.status == 2
    assert ran.error.endswith(
        "--engine ray needs the package ray; run `pip install 'featcache[ray]'`"
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_no_local_extraction_imports_ray(photos: Path, tmp_path: Path) -> None:
    code = """
import sys
import featcache
featcache.extract(
    teacher=sys.argv[1], images=sys.argv[2], out=sys.argv[3], size=28, levels=[1], workers=1
)
print([name for name in ("ray", "grpc") if name in sys.modules])
"""
    ran = python(code, SYNTHETIC, photos, tmp_path / "c", FEATCACHE_HOME=str(tmp_path))
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_a_complete_cache_needs_no_cluster(
    featcache_command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("extract", "--teacher", SYNTHETIC, "--images", photos, "--size", 28, "--levels", 1)
    words += ("--out", tmp_path / "c")
    assert featcache_command(*words).status == 0
    again = featcache_command(*words, "--engine", "ray", "--address", "127.0.0.1:9")
    assert again.status == 0
    assert "was complete already; nothing to do" in again.out
    other = featcache_command(*words, "--engine", "ray", "--out", tmp_path / "d", "--dry-run")
    assert "the pace of its actors is not known before they work" in other.out
    assert not (tmp_path / "d").exists()


def test_the_guides_python_is_a_call() -> None:
    """It is bound, and not run, which would start a cluster."""
    page = Path(__file__).parents[3] / "docs/guides/ray.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    (call,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    given = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    bound = inspect.signature(featcache.extract).bind(**given)
    bound.apply_defaults()
    del bound.arguments["progress"]
    values = keywords.read(extract_parameters.parameters(), bound.arguments)
    check_engine(ExtractOptions(**values, as_json=True))
    assert (values["engine"], values["actors"]) == ("ray", "1:2")


# ---------------------------------------------------------------- an actor, in this process


def setup(photos: Path, out: Path, folder: str = "/", **changes: Any) -> ray_worker.Setup:
    words = [f"--teacher={SYNTHETIC}", f"--images={photos}", f"--out={out}", "--size=28"]
    words += ["--levels=1", "--rows-per-shard=5", "--device=cpu", *changes.pop("words", ())]
    jobs = planned_jobs.plan_again(words)
    values = {
        "plan_again": planned_jobs.plan_again, "words": words, "ids": engine.job_ids(jobs),
        "folder": folder, "threads": 1, "batch_size": 4, "workers": 1, "strict": False,
    }  # fmt: skip
    return ray_worker.Setup(**{**values, **changes})


@pytest.fixture
def at_home() -> Any:
    before = os.getcwd()  # noqa: PTH109
    yield
    os.chdir(before)


@pytest.mark.usefixtures("at_home")
def test_an_actor_extracts_what_it_is_told(photos: Path, tmp_path: Path) -> None:
    actor = ray_worker.ShardActor()
    assert actor.load(setup(photos, tmp_path / "c")).outcome == "done"
    assert actor.begin(is_begun=False).outcome == "done"
    told = actor.extract("000001")
    assert told.outcome == "done"
    assert told.counts["picture_bytes"] > 0
    assert actor.extract("000001").outcome == "there"
    with ray_cluster.contextlib.closing(_lease(tmp_path / "c", "000000")):  # type: ignore[attr-defined]
        assert actor.extract("000000").outcome == "held"
    assert actor.extract("000000").outcome == "done"
    actor.stop()
    assert actor.extract("000002").outcome == "stopped"
    shards = sorted(path.name for path in (tmp_path / "c/shards").iterdir())
    assert [name for name in shards if name.startswith("0")] == [
        "000000.json", "000000.zarr", "000001.json", "000001.zarr",
    ]  # fmt: skip


class _lease:
    """A lease of another writer, which is this process."""

    def __init__(self, cache: Path, shard: str) -> None:
        from featcache.storage import lease

        held = lease.acquire(cache, shard)
        assert held is not None
        self.held = held

    def close(self) -> None:
        self.held.release()


@pytest.mark.usefixtures("at_home")
def test_a_folder_that_is_not_on_the_node(photos: Path, tmp_path: Path) -> None:
    given = setup(photos, tmp_path / "c")
    words = [word.replace(str(photos), "photos") for word in given.words]
    lost = ray_worker.Setup(**{**vars(given), "words": words, "folder": str(tmp_path / "gone")})
    told = ray_worker.ShardActor().load(lost)
    assert told.outcome == "failed"
    assert "'photos'" in told.line
    assert (
        f"{str(tmp_path / 'gone')!r}, where it was given, is not there: No such file" in told.line
    )
    assert "\n" not in told.line


@pytest.mark.usefixtures("at_home")
def test_other_pictures_under_the_same_path_are_refused(photos: Path, tmp_path: Path) -> None:
    given = setup(photos, tmp_path / "c", ids=[(str(tmp_path / "c"), "0" * 64)])
    told = ray_worker.ShardActor().load(given)
    assert told.outcome == "failed"
    assert "the same command means another cache here" in told.line


def test_a_folder_that_nodes_do_not_share_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was written by another node and is not seen here"):
        ray_worker.await_file(tmp_path, tmp_path / "manifest.json", timeout_s=0.0)
    assert "ray" not in vars(sys.modules["featcache.extraction.ray_worker"])


def test_a_complete_cache_needs_no_cluster_and_its_index_is_renewed(
    photos: Path, tmp_path: Path
) -> None:
    from featcache.extraction import extract, ray_engine
    from featcache.extraction.plan import ExtractJob
    from featcache.extraction.progress import ExtractProgress
    from featcache.storage import index, index_build, manifest
    from tests.conftest import make_plan

    out = tmp_path / "cache"
    job = ExtractJob(make_plan(photos), out)
    extract.run(*job, batch_size=4)
    index_build.write(out)
    os.utime(out / "shards", ns=(1, 1))  # as if a shard had been replaced
    assert isinstance(index.look(out, manifest.read(out)), index.Unused)
    work = engine.EngineWork(
        jobs=[job],
        words=[],
        plan_again=planned_jobs.plan_again,
        begin=lambda: None,
        batch_size=4,
        workers=1,
        strict=False,
        progress=ExtractProgress(),
        say=lambda text: None,
    )
    ray_engine.run(work, engine.EngineOptions(address="nowhere:1"), engine.EngineReport())
    assert isinstance(index.look(out, manifest.read(out)), index.ShardIndex)
