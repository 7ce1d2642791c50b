"""The network is found in a checkpoint, whatever program and wrapper wrote before its names."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from featcache import teachers
from featcache.errors import UserError
from featcache.models.state_names import entry_of, network_state

SPEC = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=24,depth=2,num_heads=3"


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.tensor(float(i)) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "start",
    [
        "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "state_dict.",
        "state_dict.module.", "model.module._orig_mod.", "module.model.", "teacher.backbone.",
        "teacher.module.backbone.", "teacher.backbone._orig_mod.", "model.teacher.backbone.",
        "backbone.", "module.backbone.", "_fsdp_wrapped_module.", "model._fsdp_wrapped_module.",
        "state_dict.model.",
    ],
)  # fmt: skip
def test_prefixes_are_taken_off_in_any_order(start: str) -> None:
    names = ("cls_token", "blocks.0.attn.qkv.weight", "norm.bias")
    found = network_state(named(*(start + name for name in names)))
    assert list(found.tensors) == list(names)
    assert [float(value) for value in found.tensors.values()] == [0.0, 1.0, 2.0]
    assert found.others == ()


def test_a_prefix_inside_a_name_is_torch_compiles_alone() -> None:
    found = network_state(named("visual._orig_mod.conv1.weight", "a.module.b", "a.backbone.c"))
    assert list(found.tensors) == ["visual.conv1.weight", "a.module.b", "a.backbone.c"]


def test_names_with_and_without_a_prefix_are_refused_where_they_meet() -> None:
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        network_state(named("module.w", "w"))
    assert list(network_state(named("module.w", "v")).tensors) == ["w", "v"]


@pytest.mark.parametrize(
    ("parts", "taken", "others"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema", ("state_dict",)),
        (("model", "model_ema"), "model_ema", ("model",)),
        (("model", "ema"), "model", ("ema",)),
        (("student", "teacher"), "teacher", ("student",)),
        (("model", "optimizer"), "model", ()),
    ],
)
def test_the_network_that_is_there_twice_is_told(
    parts: tuple[str, str], taken: str, others: tuple[str, ...]
) -> None:
    inner = ("a.w", "b.w", "c.w") if "optimizer" not in parts else ("a.w",)
    state = named(*(f"{parts[0]}.{name}" for name in ("a.w", "b.w", "c.w")))
    state |= named(*(f"{parts[1]}.module.{name}" for name in inner))
    found = network_state(state)
    assert (found.taken, found.others) == (taken, others)


def test_a_part_by_name() -> None:
    state = named("model.a", "model_ema.a", "model_ema.b")
    assert list(entry_of(state, "model_ema")) == ["a", "b"]
    assert entry_of(state, "mod") == {}


def _network(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


def test_the_ema_of_a_timm_checkpoint_is_told_and_can_be_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pth.tar.pth"
    plain, ema = _network(0), _network(1)
    torch.save({"epoch": 3, "state_dict": plain, "state_dict_ema": ema, "arch": "x"}, path)
    with caplog.at_level(logging.WARNING):
        teacher = teachers.load(SPEC, str(path))
    timms = timm.models.load_state_dict(str(path), weights_only=True)
    for taken in (timms, ema):
        assert torch.equal(teacher.state_dict()["vit.cls_token"], taken["cls_token"])
    assert "'state_dict_ema' is taken" in caplog.text
    assert f"--weights {path}#state_dict" in caplog.text
    caplog.clear()
    parts = {"#ema": ema, "#model": plain, "#state_dict": plain, ":state_dict_ema": ema}
    for part, wanted in parts.items():
        with caplog.at_level(logging.WARNING):
            teacher = teachers.load(SPEC, f"{path}{part}")
        assert torch.equal(teacher.state_dict()["vit.cls_token"], wanted["cls_token"])
        assert teacher.weights == f"{path}{part}"
    assert caplog.text == ""
    with pytest.raises(UserError, match="no named tensor"):
        teachers.load(SPEC, f"{path}:nothing")
    with pytest.raises(UserError, match="no such file"):
        teachers.load(SPEC, f"{path}x:state_dict")


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.int8, "is int8"), (torch.uint8, "is uint8"), (torch.int64, "is int64"),
        (torch.bool, "is bool"), (torch.complex64, "is complex64"),
        (torch.float8_e4m3fn, "is float8_e4m3fn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_weights_that_are_codes_are_refused(
    tmp_path: Path, dtype: torch.dtype, told: str, form: str
) -> None:
    from safetensors.torch import save_file

    state = _network(0)
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].to(dtype)
    path = tmp_path / f"w.{form}"
    if form == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(UserError, match=rf"blocks.1.mlp.fc1.weight {told}"):
        teachers.load(SPEC, str(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_sizes_are_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in _network(0).items()}, tmp_path / "w.pt")
    teachers.load(SPEC, str(tmp_path / "w.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = _network(0)
    state["norm.weight"][3] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"norm\.weight has values that are not finite"):
        teachers.load(SPEC, str(tmp_path / "w.pt"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "long", "null"])
def test_what_is_no_file_of_weights_is_one_line(tmp_path: Path, kind: str) -> None:
    import os

    path = tmp_path / "w.pt"
    given = str(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        given = f"{'x' * 5000}.pt" if kind == "long" else "a\0b.pt"
    with pytest.raises(UserError, match=r"no such file|cannot be read"):
        teachers.load(SPEC, given)


def test_a_whole_checkpoint_of_dino_is_read(tmp_path: Path) -> None:
    """The layout of facebookresearch/dino, main_dino.py: `save_dict` at the end of an epoch."""
    head = {"head.mlp.0.weight": torch.ones(4, 24), "head.last_layer.weight_v": torch.ones(8, 4)}
    ours, theirs = _network(0), _network(1)
    path = tmp_path / "checkpoint.pth"
    teacher_part = {f"backbone.{name}": value for name, value in ours.items()} | head
    student_part = {f"backbone.{name}": value for name, value in theirs.items()} | head
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    torch.save(
        {
            "student": {f"module.{name}": value for name, value in student_part.items()},
            "teacher": teacher_part,
            "optimizer": optimizer.state_dict(),
            "epoch": 1,
            "args": argparse.Namespace(arch="vit_tiny", lr=np.float64(0.1)),
            "dino_loss": {"center": torch.zeros(1, 8)},
            "fp16_scaler": {"scale": 65536.0},
        },
        path,
    )
    for part, wanted in {"": ours, "#teacher": ours, "#student": theirs}.items():
        found = teachers.load(SPEC, f"{path}{part}").state_dict()
        assert all(torch.equal(found[f"vit.{name}"], value) for name, value in wanted.items())


@pytest.mark.slow
def test_wrapped_and_saved_by_torch_itself(tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    wrapped = {
        "compiled": torch.compile(net).state_dict(),
        "parallel": torch.nn.DataParallel(net).state_dict(),  # the prefix of DDP's
        "both": torch.nn.DataParallel(torch.compile(net)).state_dict(),
        # as pytorch_lightning's Trainer.save_checkpoint writes a module's `self.model`
        "lightning": {
            "state_dict": {f"model.{name}": value for name, value in net.state_dict().items()},
            "pytorch-lightning_version": "2.0",
        },
    }
    for name, saved in wrapped.items():
        torch.save(saved, tmp_path / f"{name}.pt")
        found = teachers.load(SPEC, str(tmp_path / f"{name}.pt")).state_dict()
        assert all(torch.equal(found[f"vit.{k}"], v) for k, v in net.state_dict().items()), name


def test_another_projects_layout_is_named(tmp_path: Path) -> None:
    own = {
        "base.blocks.0.attn.qkv.lora_A.weight": "a LoRA adapter",
        "backbone.bottom_up.net.pos_embed": "Detectron2",
        "proposal_generator.rpn_head.conv.weight": "Detectron2",
        "down_blocks.0.resnets.0.conv1.weight": "diffusers",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": "give the folder",
        "layer.encoder.layer.0.attention.output.dense.weight": "give the folder",
        "something.else": "give the file of this architecture",
    }
    for i, (name, told) in enumerate(own.items()):
        path = tmp_path / f"{i}.pt"
        torch.save({name: torch.ones(2, 2), "other.w": torch.ones(1)}, path)
        with pytest.raises(UserError, match=told) as error:
            teachers.load(SPEC, str(path))
        assert "\n" not in str(error.value)
