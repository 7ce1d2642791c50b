"""The network is found in a checkpoint, whatever program and wrapper wrote before its names."""

from __future__ import annotations

import logging
from pathlib import Path

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
        (("state_dict", "state_dict_ema"), "state_dict", ("state_dict_ema",)),
        (("model", "model_ema"), "model", ("model_ema",)),
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
    assert torch.equal(teacher.state_dict()["vit.cls_token"], plain["cls_token"])
    assert "'state_dict' is taken" in caplog.text
    assert f"--weights {path}:state_dict_ema" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        teacher = teachers.load(SPEC, f"{path}:state_dict_ema")
    assert torch.equal(teacher.state_dict()["vit.cls_token"], ema["cls_token"])
    assert teacher.weights == f"{path}:state_dict_ema"
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
