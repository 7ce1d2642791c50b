"""Pictures that are appended to a cache: its rows are those of one extraction, what was there
stays, and a death at any moment loses nothing."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.extraction import append
from featcache.extraction.plan import ExtractJob
from featcache.storage import lease, manifest, picture_lists
from tests.conftest import Ran, Running, copy_tree, files_below, waves

Command = Callable[..., Ran]
Start = Callable[..., Running]
TEACHER = "synthetic:levels=3,tokens=4,width=64,size=28"
FIRST = ("extract", "--teacher", TEACHER, "--levels", "2,3", "--views", 2, "--size", 28)
FIRST = (*FIRST, "--rows-per-shard", 4, "--flip", 0.25, "--seed", 5)


def save(folder: Path, names: str, phase: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(waves(30 + i, 40 - i, phase + i)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten pictures and six; one of each cannot be used. Do not write into them."""
    root = tmp_path_factory.mktemp("lists")
    a, b = save(root / "a", "abcdefghij", 0.0), save(root / "b", "uvwxyz", 20.0)
    (a / "d.png").write_text("no picture")
    (b / "y.png").write_text("none either")
    return a, b


def good(ran: Ran) -> Ran:
    assert (ran.status, "Traceback" in ran.err) == (0, False), ran.err
    return ran


@pytest.fixture(scope="module")
def base(lists: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "c"
    featcache.extract(
        teacher=TEACHER, levels="2,3", views=2, size=28, rows_per_shard=4, flip=0.25, seed=5,
        images=lists[0], out=out, workers=1,
    )  # fmt: skip
    return out


@pytest.fixture
def begun(base: Path, tmp_path: Path) -> Path:
    """The cache of the first list, to be appended to."""
    return copy_tree(base, tmp_path / "c")


def numbers(path: Path) -> dict[str, dict[str, bytes]]:
    """Every array of every view, by key."""
    found: dict[str, dict[str, bytes]] = {}
    with featcache.open(path) as cache:
        for view in range(cache.views):
            for name in cache.fields:
                values = cache.read(np.arange(len(cache)), view, (name,))[name]
                for row, key in enumerate(cache.keys):
                    found.setdefault(key, {})[f"{name}-{view}"] = values[row].tobytes()
    return found


def test_rows_are_those_of_one_extraction_and_the_first_stay(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    a, b = lists
    before = files_below(begun)
    ran = good(featcache_command("extract", "--append", "--images", b, "--out", begun))
    assert "appended 6 pictures x 2 views" in ran.out
    after = files_below(begun)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"manifest.json", "quarantine.json", "shards/manifest.copy.json"}
    with featcache.open(begun) as cache:
        assert list(cache.keys) == list("abcefghij" + "uvwxz")
        assert {row["key"] for row in cache.quarantined} == {"d", "y"}
        assert [r["rows"] for r in cache.records] == [3, 4, 2, 4, 1]
    assert good(featcache_command("verify", begun)).out.startswith("5 shards checked, 0 problems")
    one = tmp_path / "one"
    good(featcache_command(*FIRST, "--images", f"{a}::{b}", "--out", one))
    assert numbers(begun) == numbers(one)


def test_the_identity_keeps_both_lists_and_the_ids_before(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    first = manifest.read(begun)
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", begun))
    grown = manifest.read(begun)
    assert grown["identity"]["pictures"] == first["identity"]["pictures"]
    assert grown["identity"]["appended"] == [picture_lists.list_of(list("uvwxyz"))]
    assert picture_lists.ids(grown["identity"]) == [grown["id"], first["id"]]
    assert grown["provenance"]["source"] == str(lists[0])
    assert grown["provenance"]["appended"] == [str(lists[1])]
    assert json.loads(featcache_command("info", begun, "--json").out)["complete"]
    told = good(featcache_command("info", begun)).out
    assert "5 of 5 shards, 14 of 16 pictures stored" in told


@pytest.mark.slow
def test_the_commands_of_before_have_nothing_to_do(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    a, b = lists
    good(featcache_command("extract", "--append", "--images", b, "--out", begun))
    there = files_below(begun)
    for words in (
        (*FIRST, "--images", a),
        (*FIRST, "--images", b),
        (*FIRST, "--images", f"{a}::{b}"),
        ("extract", "--append", "--images", b),
        ("extract", "--append", "--images", a),
    ):
        assert "nothing to do" in good(featcache_command(*words, "--out", begun)).out
    assert files_below(begun) == there


@pytest.mark.slow
def test_the_state_of_a_codec_stays_and_what_was_typed_by_default_is_compared(
    lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    out = tmp_path / "q"
    good(featcache_command(*FIRST, "--codec", "q8", "--images", lists[0], "--out", out))
    before = files_below(out)
    words = ("extract", "--append", "--images", lists[1], "--out", out)
    ran = featcache_command(*words, "--codec", "fp16")  # the default, typed
    assert "identity.codec is 'fp16'" in ran.error
    good(featcache_command(*words))
    after = files_below(out)
    states = [name for name in before if name.endswith(".safetensors")]
    assert len(states) == 3  # the teacher's end, the state and its copy
    assert all(after[name] == before[name] for name in states)
    good(featcache_command("verify", out))


@pytest.mark.slow
def test_a_third_list_follows_the_second(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    c = save(tmp_path / "third", "klm", 40.0)
    for source in (lists[1], c):
        good(featcache_command("extract", "--append", "--images", source, "--out", begun))
    assert len(picture_lists.ids(manifest.read(begun)["identity"])) == 3
    one = tmp_path / "one"
    text = "::".join(map(str, (*lists, c)))
    good(featcache_command(*FIRST, "--images", text, "--out", one))
    assert numbers(begun) == numbers(one)


def test_a_dry_run_appends_nothing(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    there = files_below(begun)
    words = ("extract", "--append", "--images", lists[1], "--out", begun, "--dry-run")
    facts = json.loads(good(featcache_command(*words, "--json")).out)
    assert (facts["new_pictures"], facts["new_shards"], facts["complete"]) == (6, 2, False)
    assert files_below(begun) == there


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--codec", "q8"), "identity.codec is 'q8'"),
        (("--add",), "--append and --add do not go together"),
        (("--for", "mae"), "--append and --for do not go together"),
        (("--teacher", "synthetic", "--teacher", "dino-b16"), "2 teachers are given"),
        (("--views", 3), "identity.views is 3"),
        (("--seed", 6), "identity.policy.seed is 6"),
        (("--rows-per-shard", 5), "identity.rows_per_shard is 5"),
        (("--teacher", "synthetic:levels=3,tokens=4,width=64,size=56"), "identity.teacher"),
    ],
)
def test_other_options_than_the_caches_are_one_line(
    words: tuple[object, ...], told: str, begun: Path, lists: tuple[Path, Path],
    featcache_command: Command,
) -> None:  # fmt: skip
    there = files_below(begun)
    ran = featcache_command("extract", "--append", "--images", lists[1], "--out", begun, *words)
    assert ran.status in (1, 2)
    assert told in ran.error
    assert files_below(begun) == there


@pytest.mark.slow
def test_pictures_that_are_there_are_refused(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    there = files_below(begun)
    for key in ("c", "d"):  # with a row, and in quarantine
        mixed = save(tmp_path / f"mixed-{key}", f"1{key}", 3.0)
        ran = featcache_command("extract", "--append", "--images", mixed, "--out", begun)
        assert ran.status == 1
        assert f"1 of 2 pictures of '{mixed}' are in cache" in ran.error
        assert f"the first is '{key}'" in ran.error
    assert files_below(begun) == there


def test_no_cache_and_no_out_are_one_line(
    lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    words = ("extract", "--append", "--images", lists[1])
    assert "name it with --out CACHE" in featcache_command(*words).error
    assert "no cache at" in featcache_command(*words, "--out", tmp_path / "none").error
    assert not (tmp_path / "none").exists()


def test_an_incomplete_cache_is_finished_first(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    (begun / "shards/000001.json").unlink()
    ran = featcache_command("extract", "--append", "--images", lists[1], "--out", begun)
    assert "is incomplete" in ran.error
    assert "appended" not in manifest.read(begun)["identity"]


def test_a_cache_with_additions_is_refused(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    words = (*FIRST, "--images", lists[0], "--out", begun, "--add", "--levels", "1,2,3")
    good(featcache_command(*words))
    ran = featcache_command("extract", "--append", "--images", lists[1], "--out", begun)
    assert "has 1 addition (--add)" in ran.error
    assert "append before adding" in ran.error


def test_a_disk_without_room_leaves_the_cache_as_it_was(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there, usage = files_below(begun), shutil.disk_usage(begun)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ran = featcache_command("extract", "--append", "--images", lists[1], "--out", begun)
    assert (ran.status, "GB are free" in ran.error) == (1, True)
    assert files_below(begun) == there


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_leaves_the_cache_as_it_was(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    there = files_below(begun)
    with socket.socket() as taken:  # a port that nobody listens at
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = featcache_command(
            "extract", "--append", "--images", lists[1], "--out", begun,
            "--engine", "ray", "--address", address,
        )  # fmt: skip
    assert (ran.status, "no Ray cluster answers there" in ran.error) == (1, True)
    assert files_below(begun) == there


def test_a_teacher_of_code_that_a_cache_names_is_not_run(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    about = manifest.read(begun)
    about["identity"] = {
        **about["identity"], "teacher": {**about["identity"]["teacher"], "name": str(mine)}
    }  # fmt: skip
    about["id"] = picture_lists.ids(about["identity"])[0]
    manifest.write(begun / manifest.NAME, about)
    ran = featcache_command("extract", "--append", "--images", lists[1], "--out", begun)
    assert "never from what a file says" in ran.error
    assert not mine.with_suffix(".ran").exists()


@pytest.mark.slow
def test_a_shard_of_the_new_list_is_repaired(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", begun))
    whole = files_below(begun)
    for shard in ("000000", "000003"):
        path = min((begun / f"shards/{shard}.zarr/features").glob("c*"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert featcache_command("verify", begun).status == 1
    ran = featcache_command("repair", begun, "--images", lists[0])
    assert "the pictures of shard 000003 are of another list" in ran.error
    good(featcache_command("repair", begun))
    assert files_below(begun) == whole


def test_a_death_between_manifest_and_copy_is_repaired(
    begun: Path, lists: tuple[Path, Path], featcache_command: Command
) -> None:
    old = (begun / "shards" / manifest.COPY).read_bytes()
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", begun))
    whole = files_below(begun)
    (begun / "shards" / manifest.COPY).write_bytes(old)
    assert "differs from manifest.json" in featcache_command("verify", begun).out
    good(featcache_command("repair", begun))
    assert files_below(begun) == whole


def test_another_process_that_appended_first_is_told(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    from tests.conftest import make_plan

    plan = make_plan(
        lists[1], TEACHER, views=2, levels=(2, 3), rows_per_shard=4,
        policy=policy_of(begun),
    )  # fmt: skip
    job = append.plan_append(plan, begun)
    other = save(tmp_path / "other", "klm", 40.0)
    good(featcache_command("extract", "--append", "--images", other, "--out", begun))
    with pytest.raises(featcache.errors.UserError, match="another process appended"):
        append.begin(job, lambda: None)
    again = append.plan_append(plan, begun)
    held = lease.acquire(begun, "000000")
    assert held is not None
    waited: list[None] = []

    def waiting() -> None:
        waited.append(None)
        held.release()

    append.begin(ExtractJob(again.plan, begun), waiting)
    assert len(waited) == 1
    assert len(picture_lists.lists(manifest.read(begun)["identity"])) == 3


def policy_of(cache: Path) -> object:
    from featcache.views.policy import policy_from_dict

    return policy_from_dict(manifest.read(cache)["identity"]["policy"])


_DIE = """
import os, signal
from featcache.storage import commit
count = 0
publish = commit.publish
def dying(*args, **more):
    global count
    count += 1
    if count > {shards}:
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(*args, **more)
commit.publish = dying
from featcache.storage import zarr_store
if hasattr(zarr_store, "publish"):
    zarr_store.publish = dying
"""


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 0])
def test_killed_in_the_middle_it_goes_on(
    shards: int, begun: Path, lists: tuple[Path, Path], tmp_path: Path, start: Start,
    featcache_command: Command,
) -> None:  # fmt: skip
    undisturbed = copy_tree(begun, tmp_path / "undisturbed")
    words = ("extract", "--append", "--images", lists[1], "--out")
    good(featcache_command(*words, undisturbed))
    killed = start(*words, begun, before=_DIE.format(shards=shards))
    assert killed.wait() == -signal.SIGKILL, killed.said
    with featcache.open(begun) as cache:
        assert not cache.complete
        assert list(cache.keys)[:9] == list("abcefghij")
    line = featcache_command("info", begun).out
    assert f"--images {lists[0]}::{lists[1]}" in line.replace("'", "")
    good(featcache_command(*words, begun))
    assert files_below(begun) == files_below(undisturbed)


@pytest.mark.slow
def test_two_processes_append_one_list(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, start: Start, featcache_command: Command
) -> None:
    undisturbed = copy_tree(begun, tmp_path / "undisturbed")
    words = ("extract", "--append", "--images", lists[1], "--out")
    good(featcache_command(*words, undisturbed))
    both = [start(*words, begun) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0], [each.said for each in both]
    assert files_below(begun) == files_below(undisturbed)
    shutil.rmtree(undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("as_admin")
def test_a_cache_in_a_bucket_is_appended_to(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    url = "s3://lab/append/c"
    good(featcache_command(*FIRST, "--images", lists[0], "--out", url))
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", url))
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", begun))
    good(featcache_command("verify", url))
    good(featcache_command("copy", url, tmp_path / "back"))
    assert numbers(tmp_path / "back") == numbers(begun)
    assert manifest.read(tmp_path / "back")["id"] == manifest.read(begun)["id"]


@pytest.mark.slow
def test_a_call_appends_as_the_command_does(
    begun: Path, lists: tuple[Path, Path], tmp_path: Path, featcache_command: Command
) -> None:
    other = copy_tree(begun, tmp_path / "other")
    good(featcache_command("extract", "--append", "--images", lists[1], "--out", begun))
    found = featcache.extract(images=lists[1], out=other, append=True, workers=1)
    assert (found.new_pictures, found.complete) == (6, True)
    assert files_below(other) == files_below(begun)
