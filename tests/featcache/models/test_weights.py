"""Weight files are read as people have them: other projects' layouts, wrappers, wrong files; and
what lies on this machine."""

from __future__ import annotations

import argparse
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, hub

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import position_embedding, quick_gelu, weights
from featcache.models.contract import REGISTERED
from tests import teacher_reference
from tests.featcache.teachers.test_families import small_clip

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
TEXT = ",".join(f"{key}={value}" for key, value in SMALL.items())


def _network(arch: str, px: int) -> Any:
    network: Any = timm.create_model(arch, num_classes=0, img_size=px, **SMALL)
    teacher_reference.randomise_parameters(network)
    return network


def _as_mae(own: dict[str, Tensor]) -> dict[str, object]:
    """Return MAE's published pre-training checkpoint: with a mask token, a decoder and the
    program's arguments."""
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
    return {"model": {**own, **decoder}, "args": argparse.Namespace(lr=1), "epoch": 1}


def _as_dinov2(own: dict[str, Tensor]) -> dict[str, object]:
    """Return DINOv2's own names: [CLS] and its position apart, registers under another name."""
    own = dict(own)
    position = torch.full((1, 1, 24), 0.25)
    own["cls_token"] = own["cls_token"] - position
    own["pos_embed"] = torch.cat([position, own["pos_embed"]], 1)
    own["register_tokens"] = own.pop("reg_token")
    return {**own, "mask_token": torch.zeros(1, 24)}


def _as_dinov3(own: dict[str, Tensor]) -> dict[str, object]:
    """Return DINOv3's own names for registers and layer scale, with a fused bias and the table of
    periods."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    out: dict[str, object] = {
        "mask_token": torch.zeros(1, 24),
        "rope_embed.periods": torch.zeros(2),
    }
    for name, value in own.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = value
    for k in range(2):
        q, v = out.pop(f"blocks.{k}.attn.q_bias"), out.pop(f"blocks.{k}.attn.v_bias")
        assert isinstance(q, Tensor)
        assert isinstance(v, Tensor)
        out[f"blocks.{k}.attn.qkv.bias"] = torch.cat([q, torch.zeros(24), v])
    return out


def _as_dinov2_giant(own: dict[str, Tensor]) -> dict[str, object]:
    """Return DINOv2's own SwiGLU: w12 and w3."""
    swiglu = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    out: dict[str, object] = {"mask_token": torch.zeros(1, 24)}
    for name, value in own.items():
        for ours, theirs in swiglu.items():
            name = name.replace(ours, theirs)
        out[name] = value
    return out


def _in_chunks(own: dict[str, object]) -> dict[str, object]:
    """Return a training checkpoint of DINOv2, one block a chunk: the teacher beside the student and
    their heads. Blocks count through all chunks."""
    backbone = {re.sub(r"^blocks\.(\d+)", r"backbone.blocks.\1.\1", k): v for k, v in own.items()}
    backbone = {k if k.startswith("back") else f"backbone.{k}": v for k, v in backbone.items()}
    heads = {
        "dino_head.last_layer.weight_v": torch.ones(3, 2),
        "ibot_head.mlp.0.bias": torch.ones(2),
    }
    return {"teacher": {**backbone, **heads}, "iteration": 9}


def _as_eva02(own: dict[str, Tensor]) -> dict[str, object]:
    """Return EVA-02's own names, with mask token, head and the table of its rotary positions; the
    norm is before the pool in pre-training."""
    names = {
        "attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias",
        "attn.norm": "attn.inner_attn_ln", "mlp.norm": "mlp.ffn_ln", "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3", "fc_norm": "norm",
    }  # fmt: skip
    out: dict[str, object] = {
        "rope.freqs_cos": torch.ones(9, 8),
        "rope.freqs_sin": torch.ones(9, 8),
    }
    for name, value in own.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = value
    return out


def _as_eva02_mim(own: dict[str, Tensor]) -> dict[str, object]:
    more = {"mask_token": torch.zeros(1, 1, 24), "lm_head.weight": torch.zeros(9, 24)}
    return {"model": {**_as_eva02(own), **more}}


def _as_eva02_clip(own: dict[str, Tensor]) -> dict[str, object]:
    visual = {f"visual.{name}": value for name, value in _as_eva02(own).items()}
    text = {"text.positional_embedding": torch.zeros(7, 8), "logit_scale": torch.ones(())}
    return {**visual, "visual.head.weight": torch.zeros(16, 24), **text}


LAYOUTS: dict[str, tuple[str, int, Callable[[dict[str, Tensor]], dict[str, object]]]] = {
    "mae": ("vit_base_patch16_224.mae", 48, _as_mae),
    "dinov2-reg": ("vit_base_patch14_reg4_dinov2.lvd142m", 42, _as_dinov2),
    "dinov3": ("vit_base_patch16_dinov3_qkvb.lvd1689m", 48, _as_dinov3),
    "dinov2-reg in chunks": (
        "vit_base_patch14_reg4_dinov2.lvd142m",
        42,
        lambda own: _in_chunks(_as_dinov2(own)),
    ),
    "dinov2-giant": ("vit_giant_patch14_dinov2.lvd142m", 42, _as_dinov2_giant),
    "dinov2-giant in chunks": (
        "vit_giant_patch14_dinov2.lvd142m",
        42,
        lambda own: _in_chunks(_as_dinov2_giant(own)),
    ),
    "eva02": ("eva02_base_patch14_224.mim_in22k", 42, _as_eva02_mim),
    "eva02-clip": ("eva02_base_patch16_clip_224.merged2b", 48, _as_eva02_clip),
    "dino's program": (
        "vit_base_patch16_224.dino",
        48,
        lambda own: {"teacher": own, "student": {"x": torch.ones(1)}},
    ),
    "a classifier": (
        "deit_base_patch16_224.fb_in1k",
        48,
        lambda own: {"model": {**own, "head.bias": torch.ones(9)}},
    ),
}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_as_their_projects_publish_them(tmp_path: Path, layout: str) -> None:
    arch, px, write = LAYOUTS[layout]
    network = _network(arch, px)
    torch.save(
        write({name: value.clone() for name, value in network.state_dict().items()}),
        tmp_path / "w.pth",
    )
    teacher: Any = teachers.load(f"timm:{arch},img_size={px},{TEXT}", str(tmp_path / "w.pth"))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(teacher.vit.state_dict()[name], value)


def test_dinov3s_biases_are_not_dropped_unless_they_are_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm leaves them out of a network without such biases, and prints; zero ones are nothing."""
    arch, px, write = LAYOUTS["dinov3"]
    network = _network(arch, px)
    given = write({name: value.clone() for name, value in network.state_dict().items()})
    torch.save(given, tmp_path / "w.pth")
    bare = f"timm:vit_base_patch16_dinov3.lvd1689m,img_size={px},{TEXT}"
    with pytest.raises(UserError, match=r"qkv\.bias is not zero.*dinov3_qkvb"):
        teachers.load(bare, str(tmp_path / "w.pth"))
    for name, value in given.items():
        if name.endswith("qkv.bias"):
            assert isinstance(value, Tensor)
            value[:24], value[48:] = 0, 0
            value[24:48] = 7  # of the keys, which DINOv3 masks
    torch.save(given, tmp_path / "zero.pth")
    teacher: Any = teachers.load(bare, str(tmp_path / "zero.pth"))
    own = network.state_dict()
    assert all(torch.equal(own[name], v) for name, v in teacher.vit.state_dict().items())
    assert capsys.readouterr().out == ""


def test_chunks_that_count_for_themselves_are_refused(tmp_path: Path) -> None:
    own = _network("vit_base_patch14_dinov2.lvd142m", 42).state_dict()
    chunks = {name.replace("blocks.1.", "blocks.1.0.").replace("blocks.0.", "blocks.0.0.", 1)
              .replace("blocks.1.0.0.", "blocks.1.0."): v for name, v in own.items()}  # fmt: skip
    torch.save({**chunks, "mask_token": torch.zeros(1, 24)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="blocks lie in chunks"):
        teachers.load(f"timm:vit_base_patch14_dinov2.lvd142m,img_size=42,{TEXT}",
                      str(tmp_path / "w.pth"))  # fmt: skip


def test_a_layout_of_another_network_is_named(tmp_path: Path) -> None:
    plain = f"timm:vit_base_patch16_224.mae,img_size=48,{TEXT}"
    told = {"dinov2-reg": "DINOv2", "dinov2-giant": "DINOv2", "dinov3": "DINOv3", "eva02": "EVA-02"}
    for layout, whose in told.items():
        arch, px, write = LAYOUTS[layout]
        torch.save(write(_network(arch, px).state_dict()), tmp_path / "w.pth")
        with pytest.raises(UserError, match=f"those of {whose}.*give --teacher") as caught:
            teachers.load(plain, str(tmp_path / "w.pth"))
        assert "\n" not in str(caught.value)


def test_big_visions_files_are_named(tmp_path: Path) -> None:
    """Of JAX, as the program publishes them, and the same names in safetensors."""
    name = "params/img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    np.savez(tmp_path / "w.npz", **{name: np.ones((2, 3), np.float32)})
    save_file({name: torch.ones(2, 3)}, tmp_path / "w.safetensors")
    for file in ("w.npz", "w.safetensors"):
        with pytest.raises(UserError, match=r"big_vision \(JAX\)") as caught:
            teachers.load(f"timm:vit_base_patch16_siglip_224.webli,{TEXT}", str(tmp_path / file))
        assert "timm" in str(caught.value)
        assert "\n" not in str(caught.value)


def _whole_module(path: Path, network: Any) -> None:
    torch.save(network, path)


def _half(path: Path, network: Any) -> None:
    torch.save({name: value.half() for name, value in network.state_dict().items()}, path)


@pytest.mark.parametrize("write", [_whole_module, _half])
def test_a_pickled_module_and_half_precision_are_read(
    tmp_path: Path, write: Callable[[Path, Any], None]
) -> None:
    network = _network("vit_base_patch16_224", 32)
    write(tmp_path / "w.pt", network)
    teacher: Any = teachers.load(
        f"timm:vit_base_patch16_224,img_size=32,{TEXT}", str(tmp_path / "w.pt")
    )
    for name, value in network.state_dict().items():
        expected = value.half().float() if write is _half else value
        assert teacher.vit.state_dict()[name].dtype == torch.float32
        assert torch.equal(teacher.vit.state_dict()[name], expected)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


WRONG = [
    "text",
    "empty",
    "cut",
    "code",
    "numbers",
    "other network",
    "cut safetensors",
    "other safetensors",
]
FAMILIES = {
    "clip": "",  # a small one, by its config
    "dino": "dino-s16",
    "dinov2": "dinov2-s14",
    "dinov3": f"timm:vit_small_patch16_dinov3.lvd1689m,{TEXT}",
    "siglip": f"timm:vit_base_patch16_siglip_224.webli,{TEXT}",
    "mae": f"timm:vit_base_patch16_224.mae,{TEXT}",
    "dvae": "dvae",
}


def _wrong(folder: Path, kind: str) -> Path:
    path = folder / ("w.safetensors" if "safetensors" in kind else "w.pt")
    good = {"first.weight": torch.zeros(40, 40), "first.bias": torch.zeros(40)}
    if kind in ("text", "empty"):
        path.write_text("these are not the weights\n" if kind == "text" else "")
    elif kind == "code":
        torch.save({"a": Evil(folder / "ran")}, path)
    elif kind == "numbers":
        torch.save([1, 2, 3], path)
    elif "safetensors" in kind:
        save_file(good, path)
    else:
        torch.save(good, path)
    if kind.startswith("cut"):
        path.write_bytes(path.read_bytes()[:900])
    return path


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_file_is_one_clear_line_in_every_family(
    tmp_path: Path, family: str, kind: str
) -> None:
    path = _wrong(tmp_path, kind)
    load = teachers.load_tokenizer if family == "dvae" else teachers.load
    with pytest.raises(UserError) as caught:
        load(
            FAMILIES[family] if family != "clip" else f"open_clip:{small_clip(tmp_path)}", str(path)
        )
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 600
    assert ("do not fit" in line) == kind.startswith("other")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- what is on this machine


@pytest.fixture
def hub_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, dict[str, Tensor]], Path]:
    """No name resolves; `put(repository, state)` lays weights where the Hugging Face hub's client
    keeps them."""
    from huggingface_hub import constants

    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository: str, state: dict[str, Tensor]) -> Path:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("abc")
        (folder / "snapshots/abc").mkdir(parents=True)
        save_file(state, folder / "snapshots/abc/model.safetensors")
        return folder / "snapshots/abc/model.safetensors"

    return put


@pytest.mark.parametrize("grid", [14, 10])
def test_registered_weights_that_are_here_need_no_network(
    hub_cache: Callable[[str, dict[str, Tensor]], Path], grid: int
) -> None:
    """With the classifier that the published file has, and on another grid by our own rule."""
    arch = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    network: Any = timm.create_model(arch)
    teacher_reference.randomise_parameters(network, std=0.05)
    hub_cache(f"timm/{arch}", network.state_dict())
    teacher: Any = teachers.load(f"timm:{arch},grid={grid}")
    assert (teacher.weights, teacher.input_px, teacher.patches) == (
        REGISTERED,
        16 * grid,
        grid * grid,
    )
    expected = {
        name: value for name, value in network.state_dict().items() if not name.startswith("head.")
    }
    if grid != 14:
        expected["pos_embed"] = position_embedding.resize_positions(
            expected["pos_embed"], grid, "bicubic", 1
        )
    own = teacher.vit.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())


def test_a_hub_file_that_lacks_tensors_is_refused(
    hub_cache: Callable[[str, dict[str, Tensor]], Path],
) -> None:
    arch = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    state = timm.create_model(arch).state_dict()
    path = hub_cache(
        f"timm/{arch}", {name: v for name, v in state.items() if not name.startswith("blocks.3")}
    )
    with pytest.raises(UserError, match="augreg_in21k_ft_in1k"):
        teachers.load(f"timm:{arch}")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="augreg_in21k_ft_in1k"):
        teachers.load(f"timm:{arch}")


@pytest.mark.parametrize("size", [48, 32])
def test_a_tag_of_open_clips_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A small architecture and a tag put into open_clip's tables: its own reader, the tag's
    activation and pixels."""
    config = json.loads(small_clip(tmp_path, quick=False).read_text())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "Tiny-quickgelu", {**config, "quick_gelu": True}
    )
    whole = open_clip.create_model("Tiny-quickgelu", load_weights=False)
    teacher_reference.randomise_parameters(whole)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pt")
    tag = {
        "file": str(tmp_path / "w.pt"),
        "quick_gelu": True,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    for arch in ("Tiny", "Tiny-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, arch, {"here": tag})
    teacher: Any = teachers.load(f"open_clip:Tiny-quickgelu/here,img_size={size}")
    assert (teacher.pixel_mean, teacher.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = whole.visual.state_dict()
    if size == 32:
        position = expected["positional_embedding"][None]
        expected["positional_embedding"] = position_embedding.resize_positions(
            position, 4, "bicubic", 1
        )[0]
    assert all(
        torch.equal(value, expected[name]) for name, value in teacher.visual.state_dict().items()
    )
    assert quick_gelu.uses_quick_gelu(teacher)
    with pytest.raises(UsageError, match="give open_clip:Tiny-quickgelu/here"):
        teachers.load("open_clip:Tiny/here")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:3000])
    with pytest.raises(UserError, match="open_clip:Tiny-quickgelu/here"):
        teachers.load("open_clip:Tiny-quickgelu/here")


def test_weights_are_found_where_the_libraries_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_hub_dir", str(tmp_path / "torch"))
    row = teachers.model_cards()["dino-b16"]
    assert weights.find_local(row.hub, row.file) is None
    folder = tmp_path / "hub" / "models--timm--vit_base_patch16_224.dino"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/model.safetensors").write_bytes(b"x")
    assert weights.find_local(row.hub, row.file) == folder / "snapshots/abc/model.safetensors"
    row = teachers.model_cards()["dvae"]
    assert weights.find_local(row.hub, row.file) is None
    (tmp_path / "torch/checkpoints").mkdir(parents=True)
    (tmp_path / "torch/checkpoints/dall_e_encoder.pkl").write_bytes(b"x")
    assert (
        weights.find_local(row.hub, row.file) == tmp_path / "torch/checkpoints/dall_e_encoder.pkl"
    )
    assert weights.find_local("", "") is None


def test_a_download_that_breaks_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_hub_dir", str(tmp_path))

    def broken(url: str, target: str, progress: bool) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("connection lost")

    monkeypatch.setattr(hub, "download_url_to_file", broken)
    with pytest.raises(OSError, match="connection lost"):
        weights.download("https://example.invalid/w", "w.pkl")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(
        hub,
        "download_url_to_file",
        lambda url, target, progress: Path(target).write_bytes(b"whole"),
    )
    assert weights.download("https://example.invalid/w", "w.pkl").read_bytes() == b"whole"
    monkeypatch.setattr(hub, "download_url_to_file", broken)
    # it is there already
    assert weights.download("https://example.invalid/w", "w.pkl").read_bytes() == b"whole"
