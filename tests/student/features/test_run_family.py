"""A run is a teacher through the entry point of other packages' families, and a second generation
learns from its cache."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models.weights import weight_hash
from featcache.reading.cache import Cache
from student import checkpoint
from student.features.exported import Exported
from tests import announced, teacher_reference, written_runs
from tests import student_fixtures as fx

CLOSE = 1e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTRACT = ("--size", "32", "--pixels", "raw")
CONV = "tiny,embed_dim=24,depth=2,num_heads=2,stage1=8,stage2=8"
OTHERS = {  # family and encoder of runs that are only written, as a training writes them
    "beit": ("fd", "beit", "tiny,embed_dim=48,depth=3,num_heads=3"),
    "cae": ("cae", "cae", "tiny,embed_dim=48,depth=3,num_heads=3"),
    "conv": ("mrmae", "conv_vit", CONV),
}


@pytest.fixture(autouse=True)
def own_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced.announce_own(tmp_path / "metadata", monkeypatch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 4 patches a side: a trained one with an average of its weights, and others of other
    families with random weights."""
    root = tmp_path_factory.mktemp("runs")
    words = ("--images", fx.pictures(), "--size", "32", "--batch-size", "8", "--steps", "2")
    fx.good(fx.train("mae", root / "mae", *words, "--ema", "0.5", sets=("patch_size=8",)))
    for name, about in OTHERS.items():
        written_runs.write(root / name, *about)
    tuned = {"classes": 5, "pool": "mean", "rel_pos": False, "drop_path": 0.0}
    pixels = {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.5, 0.6, 0.7]}
    written_runs.write(root / "tuned", "finetune", "mae", fx.ENCODER, **tuned, **pixels)
    return {path.name: path for path in root.iterdir()}


def _raw_levels(encoder: Any, pixels: Tensor) -> list[Tensor]:
    """Return y_k (B, T, D) of every block, by hooks on the run's own encoder in float64."""
    blocks = getattr(encoder, "blocks3", None) or encoder.blocks
    return teacher_reference.block_outputs(blocks, lambda: encoder.forward_features(pixels))


@pytest.mark.slow
def test_levels_and_attention_are_those_of_the_encoder(runs: dict[str, Path]) -> None:
    images = teacher_reference.photographs(32)
    for name, run in runs.items():
        encoder, settings = checkpoint.load_encoder(run)
        mean, std = (settings.get(key, d) for key, d in (("pixel_mean", MEAN), ("pixel_std", STD)))
        pixels = teacher_reference.normalise_in_float64(images, mean, std)
        encoder = encoder.double()
        teacher: Any = teachers.load(f"run:{run}")
        assert (teacher.input_px, teacher.patches) == (32, (32 // settings["patch_size"]) ** 2)
        ys, attention = teacher(images, tuple(range(1, teacher.depth + 1)))
        wanted = _raw_levels(encoder, pixels)
        assert len(ys) == len(wanted) == teacher.depth
        for y, own in zip(ys, wanted, strict=True):
            if name == "conv":  # which has no [CLS]: the mean of the patches is in its place
                own = torch.cat([own.mean(1, keepdim=True), own], 1)
            assert teacher_reference.relative_error(y, own) < CLOSE, name
        if name == "conv":
            assert attention.shape == (3, 0)
            continue
        weights = teacher_reference.timm_attention_map(encoder, pixels)[:, :, 0, 1:].mean(1)
        assert teacher_reference.attention_error(attention, weights) < CLOSE, name
        if name == "tuned":  # it pools before it norms; its head is no part of the teacher
            assert set(teacher.tail()) == {"identity"}
            assert not any("head" in key or "fc_norm" in key for key in teacher.state_dict())
            continue
        assert np.allclose(teacher.tail()["gamma"], encoder.norm.weight.detach().numpy())


def test_a_convolutional_encoder_with_a_class_token_has_its_attention() -> None:
    from student.features.run_family import _wrap
    from student.models import conv_vit

    net = conv_vit.build(CONV, img_size=32, patch_size=8, cls_token=True)
    teacher_reference.randomise_parameters(net)
    settings = {"img_size": 32, "patch_size": 8}
    given = Exported(Path("x"), net.eval(), settings, {}, 1, False)
    teacher: Any = _wrap(given, "run:x", "step-00000001.pt#model")
    images = teacher_reference.photographs(32)
    ys, attention = teacher(images, (1, 2))
    net = net.double()
    maps: list[Tensor] = []
    attn: Any = net.blocks3[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    wanted = _raw_levels(net, teacher_reference.normalise_in_float64(images, MEAN, STD))
    assert all(
        teacher_reference.relative_error(y, own) < 1e-4 for y, own in zip(ys, wanted, strict=True)
    )
    assert teacher_reference.attention_error(attention, maps[-1][:, :, 0, 1:].mean(1)) < 1e-4


@pytest.mark.slow
def test_the_second_generation(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, extract with the run as the teacher, train from that cache, by the command lines of
    docs/guides/teachers.md."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs["mae"], tmp_path / "runs/mralign-s0")
    (tmp_path / "train").symlink_to(fx.pictures())
    monkeypatch.chdir(tmp_path)
    first, second = _documented()
    home = tmp_path / "home"
    made = fx.feat(*first, *EXTRACT, "--levels", "last:3", home=home)
    fx.good(made)
    assert "takes the average" in made.err
    encoder = checkpoint.load_encoder(Path("runs/mralign-s0"))[0].double()
    with Cache(Path("second")) as cache:
        teacher = cache.identity["teacher"]
        assert teacher["name"] == "run:runs/mralign-s0"
        assert teacher["weight_hash"] == weight_hash(teachers.load("run:runs/mralign-s0"))
        assert (teacher["input_px"], teacher["patches"], teacher["depth"]) == (32, 16, 4)
        assert cache.manifest["provenance"]["weights"] == "step-00000002.pt#model"
        found = cache.read(range(len(cache)), 0, ("features", "feature_stats", "pixels"))
        images = torch.from_numpy(found["pixels"].copy()).permute(0, 3, 1, 2)
        raw = _raw_levels(encoder, teacher_reference.normalise_in_float64(images, MEAN, STD))[1:]
        for k, y in enumerate(raw):
            mean, std = found["feature_stats"][:, k, :, 0], found["feature_stats"][:, k, :, 1]
            stored = found["features"][:, k].astype(np.float64) * std[..., None] + mean[..., None]
            error = teacher_reference.relative_error(torch.from_numpy(stored), y)
            assert error < 1e-3, (k, error)  # of fp16
    settings = [word for text in fx.RECIPES["maskalign"] for word in ("--set", text)]
    small = ("--steps", "2", "--batch-size", "8", "--device", "cpu")
    fx.good(fx.stud(*second, *settings, *small, home=home))
    about = json.loads(Path("runs/second-s0/config.json").read_text())
    assert about["targets"]["identity"]["teacher"]["name"] == "run:runs/mralign-s0"
    # what the first run learns afterwards is another teacher; the cache's own one is still found
    fx.good(fx.stud("train", "--resume", "runs/mralign-s0", "--steps", "3", home=home))
    check = ("verify", "second", "--recompute", "3", "--images", str(fx.pictures()))
    refused = fx.feat(*check, home=home)
    assert "--teacher SPEC" in refused.line
    fx.good(fx.feat(*check, "--teacher", "run:runs/mralign-s0", home=home))
    told = fx.good(fx.feat("info", "second", home=home)).out
    assert "step-00000002.pt#model" in told


def _documented() -> list[list[str]]:
    page = (announced.PYPROJECT.parent / "docs/guides/teachers.md").read_text()
    block = page.split("## A run of your own")[1].split("```")[1].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in block.strip().splitlines()]


@pytest.mark.slow
def test_the_part_is_the_one_that_is_asked_for(
    runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run, loaded = runs["mae"], {}
    with caplog.at_level(logging.WARNING, "student"):
        for part in ("", "#model", "#ema"):
            caplog.clear()
            loaded[part] = teachers.load(f"run:{run}{part}")
            assert ("takes the average" in caplog.text) == (not part)
        assert "the weights are taken" not in caplog.text
    saved = torch.load(max((run / "checkpoints").glob("*.pt")), weights_only=True)
    for part, key in {"": "model", "#model": "model", "#ema": "ema"}.items():
        state = loaded[part].state_dict()
        own = {f"vit.{n[8:]}": v for n, v in saved[key].items() if n.startswith("encoder.")}
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], value) for name, value in own.items())
        assert loaded[part].weights == f"step-00000002.pt#{key}"
    assert weight_hash(loaded[""]) == weight_hash(loaded["#model"]) != weight_hash(loaded["#ema"])
    recorded = teachers.load(f"run:{run}", "step-00000002.pt#ema")
    assert weight_hash(recorded) == weight_hash(loaded["#ema"])
    hashed = run.with_name("a#b=c")
    shutil.copytree(run, hashed)
    assert weight_hash(teachers.load(f"run:{hashed}#ema")) == weight_hash(loaded["#ema"])


def test_what_is_no_such_run_is_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs["mae"], tmp_path / name))

    bare, cut, other, code = (copy(name) for name in ("bare", "cut", "other", "code"))
    for path in (bare / "checkpoints").iterdir():
        path.unlink()
    newest = max((cut / "checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:2000])
    (other / "config.json").write_text(json.dumps({"model_type": "vit"}))
    newest = max((code / "checkpoints").glob("*.pt"))
    torch.save({"step": 2, "model": {"encoder.x": Evil(tmp_path / "ran")}}, newest)
    larger = copy("larger")
    config = json.loads((larger / "config.json").read_text())
    config["config"]["encoder"] = "tiny"
    (larger / "config.json").write_text(json.dumps(config))
    cases = {
        f"run:{bare}": "has no checkpoint",
        f"run:{cut}": "cannot be read",
        f"run:{other}": "is not of a run",
        f"run:{code}": "what are no named tensors",
        f"run:{larger}": "does not fit the encoder",
        f"run:{tmp_path / 'gone'}": "no run at",
        "run:": "can be no path",
        "run:s3://a/b": "only a local path",
        f"run:{runs['beit']}#ema": "keeps no average of its weights",
        f"run:{runs['mae']}#teacher": "has the parts model and ema",
        f"run:{runs['mae']},grid=2": "unknown option 'grid'",
    }
    for spec, told in cases.items():
        with pytest.raises(UserError, match=told) as caught:
            teachers.load(spec)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    for given, told in {
        "random:0": "has the weights of its run",
        "step-00000009.pt": "step-00000002.pt#model",
        "../step-00000002.pt": "has the weights of its run",
        "step-00000002.pt#x": "has the weights of its run",
    }.items():
        with pytest.raises(UsageError, match=told):
            teachers.load(f"run:{runs['mae']}", given)
    with pytest.raises(UsageError, match="give one of them"):
        teachers.load(f"run:{runs['mae']}#ema", "step-00000002.pt#model")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_file_chooses_no_run() -> None:
    for spec in ("run:a", "run:runs/a", "run:runs/a#ema", "run:/etc"):
        assert not teachers.is_registered(spec)
        with pytest.raises(UserError, match="only from your own command line"):
            teachers.recorded_spec(spec, [], "cache 'c'", "--teacher")
