"""Checkpoints: complete or absent, two of them, never executed, and an encoder that timm takes by
name."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from featcache.errors import UserError
from student import checkpoint
from tests import student_fixtures as fx

OPTIONS = ("--steps", "6", "--batch-size", "8", "--save-every", "2")
EMPTY: dict[str, Any] = {"model": {}, "optimizer": {}, "scaler": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    fx.good(fx.train("mralign", run, "--cache", fx.cache_path(), *OPTIONS))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(run: Path) -> fx.Ran:
    return fx.train("mralign", run, "--cache", fx.cache_path(), *OPTIONS, "--resume")


def test_the_two_newest_stay(finished: Path) -> None:
    names = [path.name for path in sorted((finished / "checkpoints").iterdir())]
    assert names == ["step-00000004.pt", "step-00000006.pt"]


def test_the_order_is_that_of_the_steps(tmp_path: Path) -> None:
    for step in (8, 9, 10, 99, 100):
        checkpoint.save(tmp_path, step, {**EMPTY, "model": {"w": torch.tensor(float(step))}})
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000099.pt",
        "step-00000100.pt",
    ]
    assert checkpoint.load_latest(tmp_path)["step"] == 100
    assert checkpoint.load_latest(tmp_path)["model"]["w"].item() == 100


def test_a_write_that_fails_leaves_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, EMPTY)
    whole = torch.save

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, EMPTY)
    monkeypatch.setattr(torch, "save", whole)
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    checkpoint.save(tmp_path, 2, EMPTY)
    assert [
        path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []


def test_a_truncated_newest_is_one_line(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    before = (run / "metrics.jsonl").read_bytes()
    ran = resume(run)
    assert ran.status == 1
    assert "step-00000006.pt" in ran.line
    assert "remove it" in ran.line
    assert (run / "metrics.jsonl").read_bytes() == before
    newest.unlink()  # what the line says
    fx.good(resume(run))
    assert (run / "checkpoints" / "step-00000006.pt").is_file()


def test_going_on_from_the_one_before_gives_the_same(run: Path, finished: Path) -> None:
    (run / "checkpoints" / "step-00000006.pt").unlink()
    fx.good(resume(run))
    assert fx.same_weights(run, finished)
    assert fx.losses(run) == fx.losses(finished)


class Trap:
    """Unpickles into a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(form: str, run: Path, tmp_path: Path) -> None:
    path, mark = run / "checkpoints" / "step-00000006.pt", tmp_path / "executed"
    state = {"step": 6, "model": {}, "optimizer": Trap(mark), "scaler": {}}
    if form == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    assert resume(run).status == 1
    with pytest.raises(UserError, match=r"cannot be read|does not hold an optimizer"):
        checkpoint.load_latest(run)
    with pytest.raises(UserError, match=r"cannot be read|does not hold an optimizer"):
        checkpoint.load_encoder(run)
    assert not mark.exists()
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap was real


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"step": 6, "model": {}, "optimizer": {}, "scaler": {}}]
)
def test_another_files_content_is_one_line(content: Any, run: Path) -> None:
    torch.save(content, run / "checkpoints" / "step-00000006.pt")
    ran = resume(run)
    assert ran.status == 1
    assert "step-00000006.pt" in ran.line


def test_no_run_and_no_checkpoint(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        checkpoint.load_encoder(tmp_path / "nowhere")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load_encoder(run)
    (run / "config.json").write_text('{"recipe": ')
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load_encoder(run)
    assert resume(run).status == 1


def test_the_encoder_loads_strictly_in_timm_by_name(finished: Path) -> None:
    """A user at home loads it: a plain timm model, the encoder's part of the state, strict."""
    plain: Any = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
    )
    own = {
        k.removeprefix("encoder."): v
        for k, v in fx.weights(finished).items()
        if k.startswith("encoder.")
    }
    result = plain.load_state_dict(own, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    encoder: Any
    encoder, settings = checkpoint.load_encoder(finished)
    assert settings["img_size"] == 32
    assert not encoder.training
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # One library, another construction: eps of the norms is the recipe's 1e-6, which is timm's
    # default too.
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval().forward_features(picture), encoder.forward_features(picture)
        )


def test_trained_weights_are_not_the_starting_ones(finished: Path, tmp_path: Path) -> None:
    fx.good(fx.train("mralign", tmp_path / "zero", "--cache", fx.cache_path(), "--steps", "0"))
    start, end = fx.weights(tmp_path / "zero"), fx.weights(finished)
    fixed = {name for name in start if torch.equal(start[name], end[name])}
    assert fixed == {"encoder.pos_embed", "decoder.decoder_pos_embed"}
