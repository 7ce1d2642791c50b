"""CAE with other targets than tokens equals a second implementation and numbers by hand; its sizes
and what it reads are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student import config, recipes
from student.recipes import cae
from tests import student_fixtures as fx
from tests.student.models.test_vit import Weights
from tests.student.recipes.test_cae import reference_align, reference_prediction
from tests.student.recipes.test_recipes import (
    check_against,
    first_losses,
    parameters,
    tiny_batch,
    tiny_model,
)

ROWS = json.loads((Path(__file__).parents[2] / "golden/rows.json").read_text())


def reference_target(
    w: Weights, batch: dict[str, Tensor], constants: Weights, target: str
) -> tuple[Tensor, Tensor]:
    """Compute the error of another target, patch by patch, and the alignment: 1 - cosine with the
    teacher's output, or the squared distance from 4 x 4 pixels, channel fastest."""
    z, predicted = reference_prediction(w, batch)
    errors = []
    for b, ids in enumerate(batch["ids_masked"].tolist()):
        for m, i in enumerate(ids):
            p = predicted[b, m]
            if target == "pixels":
                row, col = 4 * (i // 4), 4 * (i % 4)
                patch = batch["images"][b, :, row : row + 4, col : col + 4]
                t = torch.stack([patch[c, y, x] for y in range(4) for x in range(4)
                                 for c in range(3)])  # fmt: skip
                mean = t.sum() / 48
                t = (t - mean) / (((t - mean) ** 2).sum() / 47 + 1e-6) ** 0.5
                errors.append(((p - t) ** 2).sum() / 48)
            else:
                t = batch["targets"][b, 1 + i]
                errors.append(1 - (p * t).sum() / ((p**2).sum() * (t**2).sum()) ** 0.5)
    return torch.stack(errors).mean(), reference_align(w, batch, z, constants)


@pytest.mark.parametrize(("target", "part"), [("z", "masked"), ("pixels", "pixel")])
@pytest.mark.parametrize("weight", [2.0, 0.0])
def test_other_targets_equal_the_second_implementation(
    target: str, part: str, weight: float
) -> None:
    model, _ = tiny_model("cae", f"target={target}", "teacher_out=10", f"align_weight={weight}")
    batch = tiny_batch()
    del batch["token_ids"], batch["features"]
    constants = {name: x.clone() for name, x in model.state_dict().items()}
    out = model(batch)

    def reference(w: dict[str, Tensor]) -> Tensor:
        error, align = reference_target(w, batch, constants, target)
        return error + weight * align

    check_against(model, out["loss"], reference)
    torch.testing.assert_close(out[part], reference_target(constants, batch, constants, target)[0])
    assert ("align" in out) == (weight > 0)


def of_hidden_patches(target: str, rows: list[list[float]], *settings: str) -> float:
    """Return the loss of target where the decoder gives these rows for the two hidden patches of
    2 x 2 pixels; the picture's hidden patches hold 0 and 1, three of each in four pixels, and 0."""
    given = [f"target={target}", "img_size=4", "patch_size=2", "teacher_out=2", "align_weight=0"]
    model, _ = tiny_model("cae", *given, *settings)
    assert isinstance(model, cae.Model)
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    images[0, :, 0, :2] = 1  # patch 0: its upper row
    batch = {
        "images": images,
        "targets": torch.tensor([[[9.0, 9], [3, 4], [7, 7], [0, 2], [7, 7]]]).double(),
        "ids_masked": torch.tensor([[0, 2]]),
        "ids_keep": torch.tensor([[1, 3]]),
    }
    return model._target_loss(torch.tensor([rows]).double(), batch)[0].item()


def test_error_of_the_teachers_output_by_hand() -> None:
    """(4, 3) and (3, 4) have the cosine 24/25, (5, 0) and (0, 2) the cosine 0: the mean of 1/25 and
    1 is 0.52. Neither length nor CLS nor the visible patches count."""
    assert of_hidden_patches("z", [[4, 3], [5, 0]]) == pytest.approx(0.52, rel=1e-12)
    assert of_hidden_patches("z", [[8, 6], [0, 1]]) == pytest.approx(0.02, rel=1e-12)


def test_error_of_the_colours_by_hand() -> None:
    """Zeros against patches of six ones and six zeros and of zeros. As they are: 1/2 and 0, their
    mean 1/4. Normalised, 0.5 / sqrt(3/11 + 1e-6) squared is 0.25 / (3/11 + 1e-6) = 0.91666, and 0:
    their mean 0.45833. Ones in the first six places, which are the upper row, meet the first
    patch."""
    zeros = [[0.0] * 12] * 2
    assert of_hidden_patches("pixels", zeros, "norm_pix=false") == pytest.approx(0.25)
    assert of_hidden_patches("pixels", zeros) == pytest.approx(0.125 / (3 / 11 + 1e-6), rel=1e-12)
    rows = [[1.0] * 6 + [0.0] * 6, [0.0] * 12]
    assert of_hidden_patches("pixels", rows, "norm_pix=false") == 0


@pytest.mark.parametrize("target", ["z", "pixels"])
def test_first_losses_of_other_targets(target: str) -> None:
    """tests/golden/make_rows.py made them with the second implementation and AdamW written out."""
    given = (f"target={target}", "teacher_out=10")
    expected = ROWS[f"cae target={target}"]
    assert first_losses("cae", more=given) == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["f", "pixels"])
def test_other_targets_train_from_a_cache_without_tokens(target: str, tmp_path: Path) -> None:
    """As with the teacher in the loop; pixels need no cache at all."""
    steps = (
        "--images",
        fx.pictures(),
        "--steps",
        "12",
        "--batch-size",
        "12",
        "--precision",
        "fp32",
    )
    sets = (f"target={target}", "drop_path=0")
    for name, more in {"a": (), "b": ("--teacher", "online")}.items():
        options = ("--cache", fx.cache_path(), *steps, *more)
        fx.good(fx.train("cae", tmp_path / name, *options, sets=sets))
    losses = fx.losses(tmp_path / "a")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert losses == pytest.approx(fx.losses(tmp_path / "b"), rel=2e-3)
    ran = fx.train("cae", tmp_path / "c", *steps, sets=sets, home=tmp_path)
    assert ran.status == (0 if target == "pixels" else 1), ran.err
    assert target == "pixels" or "--teacher clip-b16 --levels last:1 --scale 0.08,1" in ran.line


@pytest.mark.slow
def test_sizes_with_other_targets() -> None:
    """In place of 768 * 8,192 + 8,192 = 6,299,648 of the tokens' Linear: 768 * 512 + 512 = 393,728
    of CLIP-B/16's output; 768 * 768 + 768 = 590,592 of CLIP-L/14's, and of 16 x 16 x 3 colours."""
    without = 148_984_064 - 6_299_648
    assert parameters("cae", "target=z")[0] == without + 393_728
    assert parameters("cae", "target=z", "teacher_out=768")[0] == without + 590_592
    assert parameters("cae", "target=f")[0] == without + 590_592
    assert parameters("cae", "target=pixels")[0] == without + 590_592


def test_needs_of_other_targets() -> None:
    """No tokens: the teacher's last level, or nothing but what the mask is drawn from."""
    whole = recipes.TargetSpec(
        teacher="clip-b16",
        levels=(12,),
        fields=("features",),
        patches=196,
        scale=(0.08, 1.0),
        derive="z",
    )
    nothing = recipes.TargetSpec(teacher="", levels=(), fields=(), patches=196, scale=(0.08, 1.0))
    for setting, expected in {"target=z": whole, "target=pixels": nothing}.items():
        assert cae.needs(config.from_overrides(cae.Config, [setting])) == expected
    drawn = cae.needs(config.from_overrides(cae.Config, ["target=pixels", "mask=attentive"]))
    assert (drawn.teacher, drawn.fields) == ("clip-b16", ("attention",))
