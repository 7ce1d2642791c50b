"""Exports of networks that no small run has: timm's other vision transformers with a head, and
whole base encoders on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from student import exporting
from student.features import export_folder
from student.features.exported import Exported
from student.models import classifier
from student.models.build import build_encoder
from tests.student.exporting.readers import READERS, images

TEACHERS = {
    "clip": "vit_base_patch16_clip_224,embed_dim=64,depth=2,num_heads=2,act_layer=quick_gelu",
    "registers": "vit_small_patch16_dinov3,depth=1",  # with rotations in its attention
    "relative": "beitv2_base_patch16_224,embed_dim=64,depth=1,num_heads=2",
    "pooled": "vit_pe_core_tiny_patch16_384,depth=1",
    "norm behind the pool": "vit_base_patch16_siglip_224,embed_dim=64,depth=1,num_heads=2",
}


def network(encoder: str, family: str, px: int, **head: Any) -> Exported:
    """A network whose biases and LayerScales are no zeros and ones."""
    settings = {"encoder": encoder, "img_size": px, "patch_size": 16, "family": family, **head}
    build = classifier.build if head else build_encoder
    torch.manual_seed(0)
    net = build(settings, family).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name.endswith(("bias", "gamma_1", "gamma_2", "gamma", "table")):
            parameter.uniform_(-0.5, 0.5)
    return Exported(Path("no-run"), net, settings, {"recipe": "finetune"}, 1, False)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("name", TEACHERS)
def test_timm_reads_every_teacher_with_a_head(name: str, pool: str, tmp_path: Path) -> None:
    if (name, pool) == ("norm behind the pool", "cls"):
        return  # it has no [CLS]
    head = {"classes": 4, "pool": pool, "rel_pos": False, "drop_path": 0.1}
    given = network(TEACHERS[name], "timm", 64, **head)
    export_folder.export(given, exporting.load("timm"), tmp_path / "out", None)
    net, x = given.net.float(), images(64)
    with torch.no_grad():
        _, logits = READERS["timm"](tmp_path / "out")(x)
        torch.testing.assert_close(logits, net(x), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("mae", "mae"), ("cae", "timm"), ("cae", "hf")])
def test_whole_base_encoders(family: str, form: str, tmp_path: Path) -> None:
    given = network("base", family, 224)
    export_folder.export(given, exporting.load(form), tmp_path / "out", None)
    net: Any = given.net.float()
    x = images(224)
    with torch.no_grad():
        tokens, _ = READERS[form](tmp_path / "out")(x)
        torch.testing.assert_close(tokens, net.forward_features(x), rtol=0, atol=1e-5)
