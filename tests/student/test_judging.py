"""`student eval`, `student embed` and what they leave behind, through the commands that users
have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from student import checkpoint
from student.checkpoint import Retention
from student.features import results
from tests import student_fixtures as fx

KNN = ("--k", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of which every checkpoint is kept."""
    path = tmp_path_factory.mktemp("judging") / "run"
    words = ("--steps", "4", "--batch-size", "8", "--save-every", "1", "--keep-checkpoints", "9")
    fx.good(fx.train("maskalign", path, "--cache", fx.cache_path(), *words))
    return path


@pytest.fixture
def run(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "run"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fx.save_pictures(tmp_path_factory.mktemp("judged") / "p", 60, seed=4, classes=3)


# --- checkpoints ----------------------------------------------------------------------------------


def test_the_newest_and_those_of_every_so_many_steps_stay() -> None:
    paths = [Path(f"step-{step:08d}.pt") for step in (3, 6, 9, 12, 15)]

    def kept(retention: Retention) -> list[int]:
        dropped = retention.dropped(paths)
        return [int(path.stem[5:]) for path in paths if path not in dropped]

    assert kept(Retention()) == [12, 15]
    assert kept(Retention(3)) == [9, 12, 15]
    assert kept(Retention(9)) == [3, 6, 9, 12, 15]
    assert kept(Retention(2, every=6)) == [6, 12, 15]
    assert kept(Retention(1, every=3)) == [3, 6, 9, 12, 15]


def test_training_keeps_the_checkpoints_that_were_asked_for(tmp_path: Path) -> None:
    """48 pictures in steps of 16 are three a epoch."""
    words = ("--cache", fx.cache_path(), "--batch-size", "16", "--epochs", "5")
    pictures = len(list(fx.pictures().rglob("*.png")))
    spe = pictures // 16
    fx.good(fx.train("mae", tmp_path / "run", *words, "--keep-checkpoints", "every:2"))
    steps = [int(path.stem[5:]) for path in checkpoint.list_checkpoints(tmp_path / "run")]
    assert steps == [2 * spe, 4 * spe, 5 * spe]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("0",), "a number of newest ones is allowed, or every:E"),
        (("often",), "a number of newest ones is allowed"),
        (("every:0",), "a number of newest ones is allowed"),
        (("each:2",), "a number of newest ones is allowed"),
        (("every:1", "--save-every", "7"), "which 7 does not divide"),
    ],
)
def test_checkpoints_that_cannot_be_kept(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    common = ("--cache", fx.cache_path(), "--batch-size", "16", "--steps", "1")
    ran = fx.train("mae", tmp_path / "run", *common, "--keep-checkpoints", *words)
    assert ran.status == 2
    assert told in ran.line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_by_its_step(run: Path, labelled: Path, home: Path) -> None:
    scores = {}
    for step in (1, 4):
        words = ("--checkpoint", step, "--images", labelled, "-o", run / f"{step}.npy")
        fx.good(fx.stud("embed", run, *words, "--device", "cpu", home=home))
        scores[step] = np.load(run / f"{step}.npy")
    encoder: Any = checkpoint.load_encoder(run, step=1)[0]
    newest: Any = checkpoint.load_encoder(run)[0]
    first = torch.load(run / "checkpoints/step-00000001.pt")["model"]
    assert torch.equal(encoder.cls_token, first["encoder.cls_token"])
    assert not torch.equal(encoder.cls_token, newest.cls_token)
    assert not np.array_equal(scores[1], scores[4])
    ran = fx.stud("eval", "knn", run, "--checkpoint", 7, "--images", labelled, *KNN, home=home)
    assert ran.status == 2
    assert "no checkpoint of step 7; there are those of 1, 2, 3, 4" in ran.line


def test_a_damaged_checkpoint_is_the_one_that_is_named(run: Path, labelled: Path) -> None:
    path = run / "checkpoints/step-00000002.pt"
    path.write_bytes(path.read_bytes()[:1000])
    ran = fx.stud("eval", "knn", run, "--checkpoint", 2, "--images", labelled, *KNN)
    assert ran.status == 1
    assert "step-00000002.pt" in ran.line
    fx.good(fx.stud("eval", "knn", run, "--checkpoint", 1, "--images", labelled, *KNN))


# --- results --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_result_is_a_line_in_the_run_and_at_home(
    run: Path, labelled: Path, home: Path, tmp_path: Path
) -> None:
    other = fx.save_pictures(tmp_path / "other", 15, seed=8, classes=3)
    words = ("--images", labelled, "--test", f"val={labelled}", "--test", f"ood={other}")
    linear = ("--epochs", 3, "--warmup-epochs", 1, "--train-views", 0, "--batch-size", 16)
    ran = fx.good(fx.stud("eval", "knn", run, *words, *KNN, home=home))
    assert ran.out.count("knn of") == 2
    assert "on ood: top-1" in ran.out
    shown = fx.good(fx.stud("eval", "linear", run, *words, *linear, "--json", home=home)).json
    rows = results.read(run)
    assert rows == results.read(home)
    assert [(row["protocol"], row["test"]) for row in rows] == [
        ("knn", "val"), ("knn", "ood"), ("linear", "val"), ("linear", "ood"),
    ]  # fmt: skip
    assert rows[0]["score"] == 100.0  # each picture's nearest is itself
    assert rows[0]["run"] == str(run)
    assert rows[0]["checkpoint"] == 4
    assert rows[2]["settings"]["blr"] == "0.025"  # MaskAlign's
    assert "note: linear as maskalign has it: --blr 0.025" in shown_notes(run, words, linear, home)
    head = load_file(shown["head"])
    assert head["linear.weight"].shape == (3, 48)
    assert json.loads(Path(shown["head"]).with_suffix(".json").read_text())["tests"].keys() == {
        "val", "ood",
    }  # fmt: skip
    assert shown["tests"]["ood"]["per_class"].keys() == {"c0", "c1", "c2"}


def shown_notes(run: Path, words: Any, linear: Any, home: Path) -> str:
    return str(fx.good(fx.stud("eval", "linear", run, *words, *linear, home=home)).err)


def test_a_run_is_resumed_after_it_was_evaluated(run: Path, labelled: Path) -> None:
    fx.good(fx.stud("eval", "knn", run, "--images", labelled, *KNN))
    words = ("--cache", fx.cache_path(), "--steps", "4", "--batch-size", "8", "--resume")
    fx.good(fx.train("maskalign", run, *words))
    assert results.read(run)


def test_few_shots_and_settings_are_told(run: Path, labelled: Path) -> None:
    ran = fx.good(fx.stud("eval", "knn", run, "--images", labelled, "--shots", 2, "--json", *KNN))
    assert ran.json["n_train"] == 6
    assert ran.json["settings"]["shots"] == 2
    assert "6 training pictures are used" in ran.err


def test_what_a_protocol_cannot_do_is_one_line(run: Path, labelled: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    shutil.copytree(labelled / "c0", only / "c0")
    strange = Path(shutil.copytree(labelled, tmp_path / "strange"))
    (strange / "c0").rename(strange / "zebra")
    for words, status, told in (
        (("--images", only), 1, "of one class, two at least"),
        (("--images", labelled, "--test", strange), 1, "the first is 'zebra'"),
        (("--images", labelled, "--shots", 99), 1, "cannot take 99 pictures of each class"),
        (("--images", labelled, "--blocks", 9), 2, "has 4 blocks; give at most that"),
        (("--images", labelled, "--pool", "max"), 2, "'max' given; known: cls, mean"),
        (("--images", labelled, "--subset", "x"), 2, "'x' is no test set"),
        (("--images", labelled, "--fraction", "0"), 2, "0"),
    ):
        ran = fx.stud("eval", "knn", run, *words, *KNN)
        assert (ran.status, told in ran.line) == (status, True), ran.line
        assert "Traceback" not in ran.err
    ran = fx.stud("eval", "knn", "--teacher", fx.TEACHER, "--checkpoint", 2, "--images", labelled)
    assert ran.status == 2
    assert "--checkpoint is about the weights of RUN" in ran.line
    ran = fx.stud("eval", "knn", run, "--weights", "random:1", "--images", labelled)
    assert ran.status == 2
    assert "--weights is about --teacher, and RUN is evaluated" in ran.line


@pytest.mark.slow
def test_results_of_other_classes_or_weights_lie_beside_each_other(
    run: Path, labelled: Path, home: Path, tmp_path: Path
) -> None:
    """A line says what it is of, and no result takes another's file."""
    names = tmp_path / "names.txt"
    names.write_text("c0\nc1\nc2\n")
    words = ("--images", labelled, "--test", f"a={labelled}", *KNN)
    for own in ((), ("--subset", "a"), ("--subset", f"a={names}")):
        fx.good(fx.stud("eval", "knn", run, *words, *own, home=home))
    assert [row["settings"].get("subset") for row in results.read(run)] == [
        None, ["a"], [f"a={names}"],
    ]  # fmt: skip
    assert len(list((run / "evals").glob("knn-*.json"))) == 3
    for weights in ("random:1", "random:2"):
        small = "timm:vit_tiny_patch16_224,img_size=32,embed_dim=24,depth=2,num_heads=2"
        teacher = ("--teacher", small, "--weights", weights)
        fx.good(fx.stud("eval", "knn", *teacher, *words, home=home))
    assert [row["settings"]["weights"] for row in results.read(home)[-2:]] == [
        "random:1", "random:2",
    ]  # fmt: skip
    assert len(list((home / "evals").glob("knn-*.json"))) == 2


@pytest.mark.slow
def test_pictures_left_out_are_no_training_pictures(
    run: Path, labelled: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(labelled, tmp_path / "broken"))
    first = min(broken.rglob("*.png"))
    first.write_bytes(first.read_bytes()[:60])
    words = ("--images", broken, "--test", labelled, "--skip-bad", 1, *KNN)
    ran = fx.good(fx.stud("eval", "knn", run, *words, "--json"))
    assert ran.json["n_train"] == len(list(labelled.rglob("*.png"))) - 1
    assert ran.json["skipped"]["count"] == 1
    ran = fx.good(fx.stud("eval", "knn", run, *words))
    assert ran.out.splitlines()[1:] == ["left out, as they cannot be decoded: 1"]


def test_what_training_pictures_chose_is_told(run: Path, labelled: Path) -> None:
    ran = fx.good(fx.stud("eval", "knn", run, "--images", labelled, "--k", "3,1"))
    k = fx.good(fx.stud("eval", "knn", run, "--images", labelled, "--k", "3,1", "--json")).json["k"]
    assert ran.out.splitlines()[1:] == [
        f"--k {k} --temperature 0.07: best of 2 on training pictures"
    ]


# --- kept features --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_protocol_reads_no_picture(
    run: Path, labelled: Path, home: Path, tmp_path: Path
) -> None:
    """The pictures are replaced by nonsense of the same size, and their times are set back; a
    change of the inode's time is all that is left, and it is forged too."""
    pictures = Path(shutil.copytree(labelled, tmp_path / "pictures"))
    words = ("--images", pictures, "--test", pictures, "--device", "cpu")
    fx.good(fx.stud("eval", "knn", run, *words, "--k", 1, home=home))
    before = os.stat

    def forged(path: Any, **options: Any) -> Any:
        found = before(path, **options)
        if str(path).startswith(str(pictures)) and path in stamps:
            return stamps[path]
        return found

    stamps = {str(path): path.stat() for path in pictures.rglob("*.png")}
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", forged)
        fx.good(fx.stud("eval", "knn", run, *words, "--k", 1, "--pool", "mean", home=home))
        linear = ("--epochs", 3, "--warmup-epochs", 1, "--train-views", 0, "--batch-size", 16)
        fx.good(fx.stud("eval", "linear", run, *words, *linear, home=home))
    ran = fx.stud("eval", "knn", run, *words, "--k", 1, home=home)
    assert ran.status == 1
    assert "cannot decode the picture" in ran.line


def test_ls_rm_and_gc_know_them(run: Path, labelled: Path, home: Path) -> None:
    words = ("--images", labelled, *KNN)
    fx.good(fx.stud("eval", "knn", run, *words, home=home))
    fx.good(fx.stud("eval", "knn", run, *words, "--no-keep", "--crop-pct", 0.5, home=home))
    listed = fx.good(fx.feat("ls", "--json", home=home)).json
    assert {row["kind"] for row in listed} == {"features"}
    assert len(listed) == 4  # pooled and tokens of training and held-out pictures
    shown = fx.good(fx.feat("ls", home=home)).out
    assert "kept features" in shown
    assert shown.count(f"{run}, step 4") == 4
    assert shown.count("centre 0.875") == 4
    first, second, *rest = (Path(row["path"]) for row in listed)
    fx.good(fx.feat("rm", str(first), "--yes", home=home))
    assert not first.exists()
    (second / "mine.txt").write_text("a note")
    ran = fx.feat("rm", str(second), "--yes", home=home)
    assert (ran.status, "did not write: 'mine.txt'" in ran.line) == (1, True)
    for path in rest:
        os.utime(path / "about.json", (1e9, 1e9))
    os.utime(second / "about.json", (1e9, 1e9))
    found = fx.good(fx.feat("gc", "--unused", "30", "--dry-run", "--json", home=home)).json
    assert set(found["unused"]) == {str(path) for path in rest}
    fx.good(fx.feat("gc", "--unused", "30", "--yes", home=home))
    assert [path.name for path in (home / "features").iterdir()] == [second.name]


def test_gc_removes_what_a_dead_process_left(home: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "from featcache.storage.owner import writer_id; print(writer_id())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left = home / "features" / f".{'a' * 32}.{done.stdout.strip()}.tmp"
    left.mkdir(parents=True)
    (left / "features.npy").write_bytes(b"half")
    mine = home / "features" / f".{'b' * 32}.{done.stdout.strip()}.tmp"
    mine.mkdir()
    (mine / "mine.txt").write_text("not featcache's")
    ran = fx.good(fx.feat("gc", "--yes", "--json", home=home))
    assert ran.json["removed"] == [str(left)]
    assert "mine.txt" in ran.json["left"][str(mine)]
    assert (mine / "mine.txt").exists()


def test_rm_takes_no_other_folder_for_features(home: Path, tmp_path: Path) -> None:
    """Not by its name, not by what lies in it alone."""
    about = json.dumps({"kind": "kept features"})
    for path in (
        tmp_path / "elsewhere" / ("a" * 32), home / "features/notes", home / "features" / ("b" * 32)
    ):  # fmt: skip
        path.mkdir(parents=True)
        (path / "about.json").write_text(about if path.name != "b" * 32 else "{}")
        ran = fx.feat("rm", str(path), "--yes", home=home)
        assert ran.status == 1
        assert (path / "about.json").exists()


# --- embed ----------------------------------------------------------------------------------------


def test_embed_writes_what_eval_judges(run: Path, labelled: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    words = ("--images", labelled, "--device", "cpu", "--pool", "mean", "--blocks", 2)
    shown = fx.good(fx.stud("embed", run, *words, "-o", tmp_path / "f.npy", "--json")).json
    assert (shown["pictures"], shown["width"]) == (60, 96)
    fx.good(fx.stud("embed", run, *words, "-o", tmp_path / "f.parquet"))
    rows, about = np.load(tmp_path / "f.npy"), json.loads((tmp_path / "f.json").read_text())
    table = pq.read_table(tmp_path / "f.parquet")
    assert rows.dtype == np.float32
    assert np.array_equal(np.array(table["features"].to_pylist(), "f4"), rows)
    assert table["key"].to_pylist() == about["keys"]
    assert [about["classes"][label] for label in about["labels"]] == table["class"].to_pylist()
    assert [key.split("/")[0] for key in about["keys"]] == table["class"].to_pylist()
    ran = fx.stud("embed", run, *words, "-o", tmp_path / "f.npy")
    assert (ran.status, "is there already" in ran.line) == (2, True)
    ran = fx.stud("embed", run, *words, "-o", tmp_path / "f.csv")
    assert (ran.status, ".npy or .parquet" in ran.line) == (2, True)
    ran = fx.stud("embed", run, *words, "-o", tmp_path / "no/f.npy")
    assert (ran.status, "is missing; make it" in ran.line) == (2, True)


def test_embed_needs_no_labels_and_takes_a_teacher(tmp_path: Path) -> None:
    words = ("--teacher", fx.TEACHER, "--images", fx.pictures(), "--device", "cpu")
    fx.good(fx.stud("embed", *words, "-o", tmp_path / "t.npy"))
    about = json.loads((tmp_path / "t.json").read_text())
    assert about["labels"] is None
    assert np.load(tmp_path / "t.npy").shape == (len(about["keys"]), 24)
