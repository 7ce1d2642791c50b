"""The semantic-aware probe is compared with the encoder run by hand on patches chosen by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache import rng, teachers
from featcache.errors import UserError
from featcache.pictures.decode import decode
from featcache.views.draw import draw_views
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from student import checkpoint
from student.evals import semantic
from student.features import frozen, run_teacher
from student.features.task import Subject
from student.models import vit
from tests import student_fixtures as fx
from tests.student import toy_task as toys

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUICK = ("--epochs", "2", "--warmup-epochs", "1", "--device", "cpu", "--json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("milan") / "run"
    fx.good(fx.train("milan", out, "--cache", fx.cache_path(), "--steps", "3", "--batch-size", "8"))
    return out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fx.save_pictures(tmp_path_factory.mktemp("labelled"), 12, seed=3, classes=3)


def evaluated(run: Path, labelled: Path, *options: str, home: Path | None = None) -> fx.Ran:
    given = ("--images", labelled, "--train-views", "1", *QUICK, *options)
    return fx.stud("eval", "semantic", run, *given, home=home)


# --- which patches --------------------------------------------------------------------------------


def test_patches_are_kept_by_attention_and_of_equal_ones_the_first() -> None:
    attention = torch.tensor([
        [0.05, 0.30, 0.10, 0.20, 0.15, 0.20],
        [0.25, 0.25, 0.00, 0.25, 0.25, 0.00],
    ])  # fmt: skip
    assert semantic.most_attended(attention, 1).tolist() == [[1], [0]]
    assert semantic.most_attended(attention, 3).tolist() == [[1, 3, 5], [0, 1, 3]]
    assert semantic.most_attended(attention, 5).tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]


def hand_made(rows: Any, patches: int = 6) -> Any:
    """A teacher whose attention is given."""
    network = torch.nn.Linear(1, 1)

    def teacher(pixels: torch.Tensor, levels: Any) -> Any:
        return [torch.zeros(len(pixels), 1 + patches, 2)], rows

    teacher.__dict__.update(
        name="by-hand", patches=patches, depth=1, input_px=8, to=network.to,
        state_dict=network.state_dict,
    )  # fmt: skip
    return teacher


@pytest.mark.parametrize(
    ("patches", "share", "count"), [(196, 0.7, 137), (196, 0.5, 98), (16, 0.7, 11), (256, 0.7, 179)]
)
def test_the_share_is_rounded_down_as_the_released_code_has_it(
    patches: int, share: float, count: int
) -> None:
    """196 (1 - 0.3) = 137.2."""
    row = torch.rand(2, patches, generator=torch.Generator().manual_seed(0))
    visible = semantic.chosen_patches(hand_made(row, patches), share, "cpu")
    assert visible.count == count == int(patches * (1 - (1 - share)))
    assert visible.choose(torch.zeros(2, 3, 8, 8)).shape == (2, count)


def test_what_kept_features_depend_on_is_in_the_name() -> None:
    row = torch.ones(1, 6)
    names = [
        semantic.chosen_patches(teacher, share, "cpu").name
        for teacher, share in [
            (hand_made(row), 0.7), (hand_made(row), 0.5), (hand_made(torch.ones(1, 7), 7), 0.7)
        ]
    ]  # fmt: skip
    assert len(set(names)) == 3  # a teacher's weights, too, are others each time
    one = hand_made(row)
    assert semantic.chosen_patches(one, 0.7, "cpu").name == (
        f"the first int(6 * 0.7) = 4 patches by attention of by-hand {teachers.weight_hash(one)} "
        "at 8 pixels"
    )


@pytest.mark.parametrize("rows", [
    torch.empty(0), None, torch.ones(2, 5), torch.full((2, 6), torch.nan),
])  # fmt: skip
def test_a_teacher_without_attention_is_refused(rows: Any) -> None:
    visible = semantic.chosen_patches(hand_made(rows), 0.7, "cpu")
    with pytest.raises(UserError, match="'by-hand' gives no attention of "):
        visible.choose(torch.zeros(2, 3, 8, 8))


# --- their features -------------------------------------------------------------------------------


def pixels_of(source: Any, view: int | None, size: int, seed: int) -> torch.Tensor:
    """The uint8 crops (n,3,S,S) of a source: centre crops, or views of (0.08, 1)."""
    rows = []
    for i, key in enumerate(source.keys):
        picture = decode(source.read(i))
        if view is None:
            rows.append(render_centre(picture, size, 0.875, "bicubic"))
            continue
        policy = Policy(size=32, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=seed)
        shape = np.array([[picture.height, picture.width]])
        drawn = draw_views(policy, rng.key_digests([key]), shape, [view], clamp=True)
        parts = (drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0])
        rows.append(render(picture, *parts, size, "bicubic"))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("views", [None, [0, 3]])
@pytest.mark.parametrize("teacher_px", [32, 48])
def test_features_are_those_of_the_encoder_on_the_patches_kept(
    run: Path, labelled: Path, views: list[int] | None, teacher_px: int
) -> None:
    spec = f"synthetic:levels=4,tokens=16,width=24,size={teacher_px}"
    task = toys.folder_task(
        frozen.from_run(run), labelled, labelled, subject=Subject(run), seed=5, keep=False
    )
    visible = semantic.chosen_patches(teachers.load(spec), 0.7, "cpu")
    got, _ = task.pooled(task.train, views, stage="train", visible=visible)
    encoder: Any = checkpoint.load_encoder(run)[0]
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    kept = []
    for found, view in zip(got, views or [None], strict=True):
        seen = pixels_of(task.train.source, view, teacher_px, seed=5)
        _, attention = teachers.load(spec)(seen, (4,))
        ids = np.argsort(-attention.numpy(), 1, kind="stable")[:, :11]  # int(16 * 0.7)
        images = (pixels_of(task.train.source, view, 32, seed=5) / 255.0 - mean) / std
        with torch.no_grad():
            tokens = encoder.norm(vit.encode(encoder, images, torch.from_numpy(ids.copy()))[-1])
        torch.testing.assert_close(found, tokens[:, 0], rtol=1e-4, atol=1e-5)
        kept.append(ids)
    assert any((np.sort(row) != np.arange(11)).any() for ids in kept for row in ids)


# --- as a command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_and_test_pictures_are_shown_so_and_features_are_kept_by_share(
    run: Path, labelled: Path, tmp_path: Path
) -> None:
    first = fx.good(evaluated(run, labelled, home=tmp_path)).json
    assert (first["patches"], first["kept"], first["blr"], first["epochs"]) == (16, 11, 0.05, 2)
    assert (first["eval"], first["teacher"]) == ("semantic", fx.TEACHER)
    kept = sorted(path.name for path in (tmp_path / "features").iterdir())
    about = [json.loads((tmp_path / f"features/{name}/about.json").read_text()) for name in kept]
    wanted = f"the first int(16 * 0.7) = 11 patches by attention of {fx.TEACHER} "
    assert [each["of"]["what"] for each in about] == ["pooled", "pooled"]
    assert all(each["of"]["visible"].startswith(wanted) for each in about)
    again = fx.good(evaluated(run, labelled, home=tmp_path)).json
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == kept
    assert again["tests"] == first["tests"]
    half = fx.good(evaluated(run, labelled, "--keep-share", "0.5", home=tmp_path)).json
    assert half["kept"] == 8
    assert len(list((tmp_path / "features").iterdir())) == 4
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    shares = [json.loads(line)["settings"]["keep_share"] for line in lines]
    assert shares == [0.7, 0.7, 0.5]


def test_published_settings() -> None:
    assert semantic.OPTIONS["blr"][0] == "0.05"
    assert semantic.OPTIONS["epochs"][0] == 100
    assert semantic.DEFAULTS["milan", "large"] == {"blr": "0.02"}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("options", "error"), [
    (("--keep-share", "0"), "cannot keep 0 of 16 patches: --keep-share is at most 1 and leaves"),
    (("--keep-share", "0.05"), "cannot keep 0.05 of 16 patches"),
    (("--keep-share", "1.5"), "cannot keep 1.5 of 16 patches"),
    (("--blocks", "2"), "--blocks 2: student eval semantic reads the last block; leave it out"),
    (("--teacher-name", "clip-b16"), "records the teacher 'synthetic:levels=4,tokens=16,width=24"),
])  # fmt: skip
def test_what_cannot_be_is_told(
    run: Path, labelled: Path, options: tuple[str, ...], error: str
) -> None:
    assert error in evaluated(run, labelled, *options).line


def test_a_teacher_hides_no_patches(labelled: Path) -> None:
    given = ("--teacher", fx.TEACHER, "--images", labelled, *QUICK)
    line = fx.stud("eval", "semantic", *given).line
    assert "hides patches from a student, by its teacher's attention; --teacher evaluates a" in line


def test_an_encoder_that_sees_all_patches_is_refused(tmp_path: Path, labelled: Path) -> None:
    given = ("--cache", fx.cache_path(), "--steps", "1", "--batch-size", "8")
    fx.good(fx.train("fd", tmp_path / "run", *given))
    assert "cannot hide patches from the encoder of" in evaluated(tmp_path / "run", labelled).line


# --- whose teacher --------------------------------------------------------------------------------


def forged(run: Path, out: Path, **teacher: Any) -> Path:
    """The same run, whose record names another teacher."""
    record = json.loads((run / "config.json").read_text())
    record["targets"]["identity"]["teacher"].update(teacher)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(record))
    (out / "checkpoints").symlink_to(run / "checkpoints")
    return out


def test_other_weights_than_the_runs_are_refused(run: Path, labelled: Path, tmp_path: Path) -> None:
    other = forged(run, tmp_path / "run", weight_hash="0" * 32)
    line = evaluated(other, labelled).line
    own = teachers.weight_hash(teachers.load(fx.TEACHER))
    assert f"weights 'registered' of teacher {fx.TEACHER!r} have hash {own}" in line
    assert f"learned from {'0' * 32}; give those with --teacher-weights" in line


def test_a_run_chooses_no_code(run: Path, labelled: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    other = forged(run, tmp_path / "run", name=str(own))
    line = evaluated(other, labelled).line
    assert "name it with --teacher-name SPEC" in line
    assert not (tmp_path / "ran").exists()


def test_a_teacher_of_ones_own_is_named_on_the_command_line(
    run: Path, labelled: Path, tmp_path: Path
) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "from featcache import teachers\n"
        "def load(name, options, weights):\n"
        f"    return teachers.load({fx.TEACHER!r}, weights)\n"
    )
    hashed = teachers.weight_hash(teachers.load(str(own)))
    other = forged(run, tmp_path / "run", name="elsewhere/mine.py", weight_hash=hashed)
    got = fx.good(evaluated(other, labelled, "--teacher-name", str(own))).json
    assert (got["teacher"], got["kept"]) == (str(own), 11)


@pytest.mark.slow
def test_a_run_without_a_teacher_takes_the_one_that_is_named(
    tmp_path: Path, labelled: Path
) -> None:
    given = ("--teacher", "online", "--images", fx.pictures(), "--policy", fx.policy_file())
    made = fx.train("mae", tmp_path / "run", *given, "--steps", "1", "--batch-size", "8",
                    sets=("patch_size=8",))  # fmt: skip
    fx.good(made)
    line = evaluated(tmp_path / "run", labelled).line
    assert "records no teacher: it learned from none; name one with --teacher-name SPEC" in line
    got = fx.good(evaluated(tmp_path / "run", labelled, "--teacher-name", fx.TEACHER)).json
    assert got["kept"] == 11
    other = evaluated(tmp_path / "run", labelled, "--teacher-name", "synthetic").line
    assert "teacher 'synthetic' has 196 patches, the student 16" in other


@pytest.mark.parametrize("targets", [
    None, [], {"kind": "cached"}, {"kind": "cached", "identity": {"teacher": 3}}, {"teacher": 7},
])  # fmt: skip
def test_a_record_that_names_none(tmp_path: Path, targets: Any) -> None:
    about = {"recipe": "mae", "config": {}, "targets": targets}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="records no teacher"):
        run_teacher.find(tmp_path)
    assert run_teacher.find(tmp_path, "clip-b16").spec == "clip-b16"


def test_errors_of_loading_name_this_commands_option() -> None:
    with (
        pytest.raises(UserError, match=r"--teacher-weights random:x: random:SEED needs"),
        run_teacher.own_options(),
    ):
        raise UserError("--weights random:x: random:SEED needs")
