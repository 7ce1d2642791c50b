"""Zero-shot scores are compared with open_clip's own functions, and a student's embedding with
numpy in float64 from its own tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)
from safetensors.torch import save_file

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.views.render import render_centre
from student import checkpoint, recipes
from student.config import build_config, read_settings
from student.evals import zeroshot
from student.features import class_texts, frozen
from student.features.labelled import SetOptions, open_sets
from student.features.task import Outcome, Subject, Task
from tests import student_fixtures as fx
from tests import teacher_reference

F64 = npt.NDArray[np.float64]
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["grey_cat", "old dog", "owl"]
CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip
OPTIONS = {"templates": "openai", "names": "", "teacher_name": "", "teacher_weights": ""}
BOTH = ("--device", "cpu", "--json")


class Clip:
    """A small CLIP of random weights, in files, and as open_clip has it."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "small.json"
        self.config.write_text(json.dumps(CONFIG))
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
        schema = f"local-dir:{folder}"
        self.model: Any = open_clip.create_model(schema, load_weights=False).eval()
        teacher_reference.randomise_parameters(self.model)
        self.tokenizer = open_clip.get_tokenizer(schema)
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        self.weights, self.tower = folder / "whole.safetensors", folder / "tower.safetensors"
        save_file(state, self.weights)
        visual = {name: value for name, value in state.items() if name.startswith("visual.")}
        save_file(visual, self.tower)
        self.spec = f"open_clip:{self.config}"

    def classes(self, names: list[str], templates: Any) -> torch.Tensor:
        return open_clip.build_zero_shot_classifier(self.model, self.tokenizer, names, templates)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    made = fx.save_pictures(folder / "made", 18, seed=4, classes=3)
    for i, name in enumerate(NAMES):
        (made / f"c{i}").rename(folder / name)
    made.rmdir()
    return folder


@pytest.fixture(scope="module")
def cache(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "clip"
    return fx.extract(fx.pictures(), out, "--weights", str(clip.weights), teacher=clip.spec)


SMALL = (*fx.SMALL_BEIT, *fx.REGRESSOR)
STUDENTS = {
    "kd": ("kd", fx.COMMON),
    "kd f": ("kd", (*fx.COMMON, "target=f")),
    "milan": ("milan", (*fx.COMMON, *fx.DECODER)),
    "maskalign": ("maskalign", (*fx.COMMON, "level_weights=top:2")),
    "maskalign bn": ("maskalign", (*fx.COMMON, "level_weights=top:2", "target_norm=bn")),
    "mralign": ("mralign", (*fx.COMMON, *fx.DECODER, "level_weights=last")),
    "caev2": ("caev2", SMALL),
    "caev2 ln": ("caev2", (*SMALL, "loss=mse")),
    "caev2 paper": ("caev2", (*SMALL, "reduction=paper")),
    "milan patches": ("milan", (*fx.COMMON, *fx.DECODER, "cls_loss=false")),
    "maskalign patches": ("maskalign", (*fx.COMMON, "level_weights=last", "cls_loss=false")),
    "maskalign below": ("maskalign", (*fx.COMMON, "level_weights=mean", "align_levels=2")),
    "mvp": ("mvp", fx.SMALL_BEIT),
    "fd": ("fd", fx.SMALL_BEIT),
    "mrmae": ("mrmae", (*fx.COMMON, *fx.DECODER)),
    "mae": ("mae", (*fx.COMMON, *fx.DECODER)),
}


@pytest.fixture(scope="module")
def run_of(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train each student once, for two steps."""
    folder = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        out = folder / name.replace(" ", "-")
        if not out.exists():
            recipe, sets = STUDENTS[name]
            chosen = [part for text in sets for part in ("--set", text)]
            given = ("--cache", cache, "--images", fx.pictures(), "--steps", 2, "--batch-size", 8)
            ran = fx.stud("train", "--recipe", recipe, "--out", out, "--device", "cpu", *chosen,
                          *given, "--ema", "0.5")  # fmt: skip
            fx.good(ran)
        return out

    return made


def task_of(encoder: frozen.FrozenEncoder, images: Path, subject: Subject, **options: Any) -> Task:
    sets = open_sets(SetOptions(str(images), trains=False))
    return Task(encoder, sets.train, sets.tests, sets.names, subject=subject, **options)


def of_teacher(clip: Clip, images: Path, **options: str) -> Outcome:
    weights = str(clip.weights)
    task = task_of(
        frozen.from_teacher(clip.spec, weights), images,
        Subject(teacher=clip.spec, weights=weights), keep=False,
    )  # fmt: skip
    return zeroshot.evaluate(task, **{**OPTIONS, **options})


def of_run(clip: Clip, run: Path, images: Path, **options: Any) -> Outcome:
    given = {"teacher_name": clip.spec, "teacher_weights": str(clip.weights)}
    subject = Subject(run, ema=options.pop("ema", False))
    task = task_of(frozen.from_run(run), images, subject, keep=False)
    return zeroshot.evaluate(task, **{**OPTIONS, **given, **options})


def pixels(images: Path) -> torch.Tensor:
    """Centre crops (n,3,32,32), uint8, in the order of the class folders."""
    paths = [path for name in sorted(NAMES) for path in sorted((images / name).iterdir())]
    rows = [render_centre(decode(path.read_bytes()), 32, 0.875, "bicubic") for path in paths]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def normed(images: Path, statistics: Any) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in statistics)
    return (pixels(images) / 255.0 - mean) / std


# --- the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", ["openai", "simple"])
def test_a_teacher_scores_as_open_clip_does(clip: Clip, labelled: Path, templates: str) -> None:
    own = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}[templates]
    with torch.no_grad():
        embedded = clip.model.encode_image(normed(labelled, OPENAI), normalize=True)
    wanted = embedded @ clip.classes(["grey cat", "old dog", "owl"], own)
    outcome = of_teacher(clip, labelled, templates=templates)
    (scored,) = outcome.scored
    torch.testing.assert_close(scored.scores, wanted, rtol=0, atol=1e-5)
    assert torch.equal(scored.scores.argmax(1), wanted.argmax(1))
    assert scored.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert wanted.std() > 1e-3  # of which 1e-5 is little
    assert outcome.facts == {"teacher": clip.spec, "texts": 3 * len(own)}


def test_names_and_templates_of_files(clip: Clip, labelled: Path, tmp_path: Path) -> None:
    """A class of two names is the mean of all its sentences."""
    names, lines = tmp_path / "names.json", tmp_path / "lines.txt"
    names.write_text(json.dumps({"grey_cat": ["cat", "{tabby}"], "old dog": "dog", "owl": "owl"}))
    lines.write_text("one {}.\n\n  a {} at night \n")
    outcome = of_teacher(clip, labelled, names=str(names), templates=str(lines))
    columns = []
    for texts in [
        ["one cat.", "a cat at night", "one {tabby}.", "a {tabby} at night"],
        ["one dog.", "a dog at night"], ["one owl.", "a owl at night"],
    ]:  # fmt: skip
        with torch.no_grad():
            each = clip.model.encode_text(clip.tokenizer(texts)).numpy().astype(np.float64)
        mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(0)
        columns.append(mean / np.linalg.norm(mean))
    with torch.no_grad():
        z = clip.model.encode_image(normed(labelled, OPENAI)).numpy().astype(np.float64)
    wanted = z / np.linalg.norm(z, axis=1, keepdims=True) @ np.stack(columns, 1)
    np.testing.assert_allclose(outcome.scored[0].scores, wanted, rtol=0, atol=1e-5)
    assert outcome.facts["texts"] == 8


def test_weights_of_a_seed_are_said_to_be_drawn(clip: Clip, labelled: Path) -> None:
    task = task_of(
        frozen.from_teacher(clip.spec, "random:3"), labelled,
        Subject(teacher=clip.spec, weights="random:3"), keep=False,
    )  # fmt: skip
    outcome = zeroshot.evaluate(task, **{**OPTIONS, "templates": "simple"})
    assert outcome.facts["note"] == "random:3: the texts' weights are drawn, not trained"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = open_clip.create_model(
            f"local-dir:{clip.config.parent}", load_weights=False
        ).eval()
    images = normed(labelled, OPENAI)
    with torch.no_grad():
        wanted = model.encode_image(images, normalize=True) @ open_clip.build_zero_shot_classifier(
            model, clip.tokenizer, ["grey cat", "old dog", "owl"], SIMPLE_IMAGENET_TEMPLATES
        )
    torch.testing.assert_close(outcome.scored[0].scores, wanted, rtol=0, atol=1e-5)


# --- a student ------------------------------------------------------------------------------------


def layer_norm(y: F64, gamma: Any = 1.0, beta: Any = 0.0, eps: float = 1e-5) -> F64:
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gamma + beta


def blocks_and_weights(run: Path, images: Path) -> tuple[list[F64], dict[str, F64]]:
    """The [CLS] (n,D) after every block of the encoder in float64, and all weights."""
    encoder: Any = checkpoint.load_encoder(run)[0].double()
    outputs: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, __, y: outputs.append(y[:, 0]))
    with torch.no_grad():
        encoder.forward_features(normed(images, IMAGENET).double())
    weights = {name: value.double().numpy() for name, value in fx.weights(run).items()}
    return [each.numpy() for each in outputs], weights


def linear(x: F64, w: dict[str, F64], name: str) -> F64:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def final(x: F64, w: dict[str, F64], name: str = "encoder.norm") -> F64:
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def predicted(name: str, run: Path, images: Path) -> F64:
    """What each recipe's heads make of [CLS], by its formula."""
    x, w = blocks_and_weights(run, images)
    if name.startswith("kd"):
        return linear(final(x[-1], w), w, "head")
    if name == "milan":
        prompt = linear(final(x[-1], w), w, "decoder.decoder_embed")
        prompt = prompt + w["decoder.decoder_pos_embed"][0, 0]
        return linear(final(prompt, w, "decoder.decoder_norm"), w, "decoder.decoder_pred")
    if name == "caev2":
        narrow = linear(final(x[-1], w), w, "encoder_to_regresser")
        narrow = final(narrow, w, "encoder_to_regresser_norm")
        return linear(final(narrow, w, "decoder.norm"), w, "decoder.head")
    mixed = np.einsum("s,snd->nd", w["align.mix"][-1], np.stack(x))
    q = linear(mixed, w, "align.adaptors.3")
    return layer_norm(q) if name == "maskalign bn" else q


SERVE = ["kd", "kd f", "milan", "caev2", "maskalign", "maskalign bn", "mralign"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVE)
def test_a_students_embedding_is_its_prediction_of_the_teachers_cls(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path], name: str
) -> None:
    z = predicted(name, run_of(name), labelled)
    visual = clip.model.visual.state_dict()
    tail = {key: visual[key].double().numpy() for key in ("ln_post.weight", "ln_post.bias", "proj")}
    if "align" in name:
        z = tail["ln_post.weight"] * z + tail["ln_post.bias"]
    if "align" in name or name == "kd f":
        z = z @ tail["proj"]
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    texts = clip.classes(["grey cat", "old dog", "owl"], SIMPLE_IMAGENET_TEMPLATES).double()
    outcome = of_run(clip, run_of(name), labelled, templates="simple")
    np.testing.assert_allclose(outcome.scored[0].scores, z @ texts.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_average_of_weights(clip: Clip, labelled: Path, run_of: Callable[[str], Path]) -> None:
    one, two = (
        of_run(clip, run_of("kd"), labelled, ema=ema, templates="simple").scored[0].scores
        for ema in (False, True)
    )
    assert not torch.allclose(one, two, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "predicts"), [
    ("mvp", "predicts z, and not the teacher's output at [CLS]"),
    ("fd", "predicts fd, and not"),
    ("mrmae", "predicts fd, and not"),
    ("mae", "predicts nothing of a teacher, and not"),
    ("caev2 ln", "predicts ln_z, and not"),
    ("caev2 paper", "predicts z, and not"),
    ("milan patches", "predicts z, and not"),
    ("maskalign patches", "predicts 3, and not"),
    ("maskalign below", "predicts 2, and not"),
])  # fmt: skip
def test_recipes_that_predict_no_cls_are_told(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path], name: str, predicts: str
) -> None:
    with pytest.raises(UserError) as caught:
        of_run(clip, run_of(name), labelled)
    assert predicts in str(caught.value)
    assert "kd, milan, caev2, maskalign and mralign, with [CLS] in the loss" in str(caught.value)


# --- as a command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_pictures_are_scored_and_embeddings_are_kept(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = shutil.copytree(run_of("kd"), tmp_path / "run")
    given = ("--images", labelled, "--teacher-name", clip.spec, "--teacher-weights", clip.weights,
             "--templates", "simple", *BOTH)  # fmt: skip
    got = fx.good(fx.stud("eval", "zeroshot", run, *given, home=tmp_path)).json
    assert (got["n_test"], got["n_train"], got["classes"]) == (18, 0, 3)
    assert list(got["tests"]) == ["test"]
    want = of_run(clip, run, labelled, templates="simple").scored[0]
    right = (want.scores.argmax(1) == want.labels).float().mean().item()
    assert got["top1"] == pytest.approx(100 * right, abs=1e-3)
    kept = sorted((tmp_path / "features").iterdir())
    again = fx.stud("eval", "zeroshot", run, *given[:-4], "openai", *BOTH, home=tmp_path)
    assert fx.good(again).json["texts"] == 240
    assert sorted((tmp_path / "features").iterdir()) == kept  # texts are no part of a picture
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [row["settings"]["templates"] for row in rows] == ["simple", "openai"]
    assert all(row["protocol"] == "zeroshot" for row in rows)


def test_test_sets_are_scored_in_place_of_the_images_that_name_classes(
    clip: Clip, labelled: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(labelled / "owl", other / "owl")
    (other / "owl" / "broken.png").write_bytes(b"no picture")
    given = ("--teacher", clip.spec, "--weights", clip.weights, "--images", labelled, *BOTH,
             "--templates", "simple", "--test", f"a={other}", "--test",
             f"b={labelled}")  # fmt: skip
    assert "cannot decode the picture 'owl/broken'" in fx.stud("eval", "zeroshot", *given).line
    got = fx.good(fx.stud("eval", "zeroshot", *given, "--skip-bad", "1", "--subset", "a")).json
    assert {name: each["n_test"] for name, each in got["tests"].items()} == {"a": 6, "b": 18}
    assert got["tests"]["a"]["top1"] == 100  # there is one class to choose
    assert got["skipped"]["count"] == 1


def test_a_text_of_the_result_names_no_training_pictures(clip: Clip, labelled: Path) -> None:
    given = ("--teacher", clip.spec, "--weights", clip.weights, "--images", labelled)
    ran = fx.good(fx.stud("eval", "zeroshot", *given, "--templates", "simple", "--device", "cpu"))
    assert "18 test pictures)" in ran.out
    assert "training" not in ran.out


@pytest.mark.parametrize(("options", "error"), [
    (("--shots", "1"), "unknown option '--shots'"),
    (("--pool", "mean"), "unknown option '--pool'"),
    (("--templates", "opnai"), "--templates opnai: it is neither openai nor simple, nor a text fi"),
    (("--names", "imagenet"), "names the 1,000 classes of ImageNet-1k, n01440764 to n15075141; th"),
    (("--names", "none.json"), "--names none.json: "),
    (("--teacher-name", "clip-b16"), "--teacher-name names the teacher of a run, and --teacher is"),
])  # fmt: skip
def test_what_cannot_be_is_told(
    clip: Clip, labelled: Path, options: tuple[str, ...], error: str
) -> None:
    given = ("--teacher", clip.spec, "--weights", clip.weights, "--images", labelled, *BOTH)
    assert error in fx.stud("eval", "zeroshot", *given, *options).line


@pytest.mark.parametrize(("content", "error"), [
    ("{", "a JSON object from class to name, or to a list of names, is needed"),
    ('{"grey_cat": "a", "old dog": "b"}', "class 'owl' is missing; add it"),
    ('{"grey_cat": "a", "old dog": "b", "owl": []}', "class 'owl' is []; a name, or a list of"),
    ('{"grey_cat": "a", "old dog": "b", "owl": 3}', "class 'owl' is 3; a name, or a list of"),
    ('{"grey_cat": "a", "old dog": "b", "owl": " "}', "class 'owl' is ' '; a name, or a list"),
    ('{"gray_cat": "a"}', "'gray_cat' is no class (did you mean grey_cat?"),
])  # fmt: skip
def test_files_of_names(labelled: Path, tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(UserError) as caught:
        class_texts.class_texts(
            open_sets(SetOptions(str(labelled), trains=False)).train.source, NAMES,
            str(tmp_path / "names.json"),
        )  # fmt: skip
    assert error in str(caught.value)


@pytest.mark.parametrize("content", ["a photo of it\n", "{} and {}\n", "", "a {}.\nno place\n"])
def test_files_of_templates(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"a sentence a line with one \{\} in the place of"):
        class_texts.templates(str(path))


class Named:
    spec, classes = "pictures", None


def test_classes_that_say_nothing_are_refused() -> None:
    source: Any = Named()
    with pytest.raises(UserError, match="are numbers without names; give them with --names FILE"):
        class_texts.class_texts(source, ["0", "1"], "")
    source.classes = ["n01440764", "n01443537"]
    with pytest.raises(UserError, match="are WordNet's numbers, such as n01440764"):
        class_texts.class_texts(source, source.classes, "")


def test_imagenet_has_open_clips_names() -> None:
    names = ["n01440764", *[f"n0{2000000 + i}" for i in range(998)], "n15075141"]
    found = class_texts.class_texts(Named(), names, "imagenet")  # type: ignore[arg-type]
    assert found == [[name] for name in IMAGENET_CLASSNAMES]
    assert found[0] == ["tench"]


# --- whose texts ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_of_the_picture_tower_alone(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path]
) -> None:
    tower = {"teacher_weights": str(clip.tower)}
    for bare in (False, True):
        if bare:  # as a tower's own state dict has its names
            visual = clip.model.visual.state_dict()
            save_file({k: v.contiguous() for k, v in visual.items()}, clip.tower)
        with pytest.raises(UserError, match=r"hold the picture tower of .* only; classes"):
            of_run(clip, run_of("kd"), labelled, **tower)


def test_other_weights_than_the_runs_are_refused(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=r"have hash .* learned from .* with --teacher-weights"):
        of_run(clip, run_of("kd"), labelled, teacher_weights="random:1")


def test_a_text_tower_of_another_size_is_told(clip: Clip, labelled: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "layers": 1}}
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit the text tower of .* are unknown"):
        teachers.load_text(f"open_clip:{tmp_path / 'other.json'}", str(clip.weights))
    short = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 500}}
    (tmp_path / "short.json").write_text(json.dumps(short))
    tower = teachers.load_text(f"open_clip:{tmp_path / 'short.json'}", "random:0")
    with pytest.raises(UserError, match=r"gives token \d+, its text tower knows 500"):
        tower.embed_class(["a cat"])


@pytest.mark.parametrize("text", [
    {"hf_model_name": "roberta-base"}, {**CONFIG["text_cfg"], "hf_tokenizer_name": "bert"},
])  # fmt: skip
def test_a_text_tower_that_would_be_fetched_is_refused(tmp_path: Path, text: Any) -> None:
    (tmp_path / "far.json").write_text(json.dumps({**CONFIG, "text_cfg": text}))
    with pytest.raises(UserError, match="names a text tower or a tokenizer to be fetched"):
        teachers.load_text(f"open_clip:{tmp_path / 'far.json'}", "random:0")


def test_pictures_that_are_pooled_have_no_embedding_of_cls(tmp_path: Path) -> None:
    vision = {**CONFIG["vision_cfg"], "pool_type": "avg"}
    (tmp_path / "pool.json").write_text(json.dumps({**CONFIG, "vision_cfg": vision}))
    with pytest.raises(UserError, match=r"stand beside pictures that are pooled, not beside \[CLS"):
        teachers.load_text(f"open_clip:{tmp_path / 'pool.json'}", "random:0")


@pytest.mark.parametrize("spec", [fx.TEACHER, "dino-b16"])
def test_a_teacher_without_texts(spec: str) -> None:
    with pytest.raises(UserError, match="has no text tower; a CLIP is needed here, such as clip-"):
        teachers.load_text(spec)


def test_a_student_of_another_teacher(labelled: Path, tmp_path: Path) -> None:
    given = ("--cache", fx.cache_path(), "--steps", "1", "--batch-size", "8")
    fx.good(fx.train("kd", tmp_path / "run", *given))
    line = fx.stud("eval", "zeroshot", tmp_path / "run", "--images", labelled, *BOTH).line
    assert "has no projection into a space of texts; only a student of a CLIP has one" in line


# --- a run folder of somebody else's --------------------------------------------------------------


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("change", "error"), [
    ({"recipe": "./mine.py"}, "names the recipe './mine.py', which is none of ours"),
    ({"recipe": "fd"}, "cannot set|unknown setting"),
    ({"config": {"encoder": "base"}}, r"does not fit the model of its config.json"),
    ({"config": {"encoder": "nonsense"}}, "config.json: unknown encoder"),
    ({"config": {"img_size": 33}}, "config.json"),
    ({"config": {"target": 3}}, "config.json"),
])  # fmt: skip
def test_a_record_is_not_trusted(
    clip: Clip, labelled: Path, run_of: Callable[[str], Path], tmp_path: Path, change: Any,
    error: str,
) -> None:  # fmt: skip
    run = shutil.copytree(run_of("kd"), tmp_path / "run")
    encoder = frozen.from_run(run)
    record = json.loads((run / "config.json").read_text())
    record["config"] |= change.pop("config", {})
    (run / "config.json").write_text(json.dumps(record | change))
    task = task_of(encoder, labelled, Subject(run), keep=False)
    given = {"teacher_name": clip.spec, "teacher_weights": str(clip.weights)}
    with pytest.raises(UserError, match=error):
        zeroshot.evaluate(task, **{**OPTIONS, **given})


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipes_model_is_loaded_whole(name: str, tmp_path: Path) -> None:
    """Its weights are compared without memory first."""
    given = ("--cache", fx.cache_of(name), "--steps", "1", "--batch-size", "8")
    fx.good(fx.train(name, tmp_path / "run", *given))
    record = checkpoint.read_config(tmp_path / "run")
    recipe = recipes.load(name)
    config = build_config(recipe.Config, read_settings(recipe.Config, record["config"]))
    model = checkpoint.load_model(tmp_path / "run", lambda: recipe.Model(config))
    wanted = fx.weights(tmp_path / "run")
    assert not model.training
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    with pytest.raises(UsageError, match="keeps no average of its weights"):
        checkpoint.load_model(tmp_path / "run", lambda: recipe.Model(config), ema=True)
