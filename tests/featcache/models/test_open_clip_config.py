"""A config of open_clip's that others wrote opens no file and no address."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from featcache import teachers
from featcache.errors import UserError
from featcache.models import open_clip_config
from featcache.models.open_clip_config import read_config

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def write(folder: Path, config: Any) -> Path:
    path = folder / "tiny.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def changed(**parts: dict[str, Any] | Any) -> dict[str, Any]:
    config = copy.deepcopy(TINY)
    for key, value in parts.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    return config


def test_every_config_that_open_clip_ships_is_one(tmp_path: Path) -> None:
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        model = read_config(write(tmp_path, config), name)["model_cfg"]
        assert {key: value for key, value in model.items() if not key.endswith("_cfg")} == {
            key: value for key, value in config.items() if not key.endswith("_cfg")
        }


@pytest.mark.parametrize(
    "config",
    [
        "", "[]", "3", "null", "{}", "[" * 100_000, '{"embed_dim": NaN}', "\ud83d",
        {"model_cfg": []}, {"architectures": ["CLIPModel"], "model_type": "clip"},
        changed(vision_cfg=[]), changed(text_cfg="x"), changed(nonsense=1),
        changed(vision_cfg={"checkpoint_path": "x"}), changed(vision_cfg={"width": 10**7}),
        changed(vision_cfg={"layers": 10**9}), changed(vision_cfg={"layers": [10**9]}),
        changed(text_cfg={"vocab_size": 10**9}), changed(text_cfg={"layers": 0}),
        changed(vision_cfg={"image_size": 10**6}), changed(embed_dim=-1),
        changed(vision_cfg={"timm_model_name": "hf-hub:a/b"}),
        changed(vision_cfg={"timm_model_name": "local-dir:/tmp"}),
        changed(vision_cfg={"timm_model_name": "../x"}), changed(vision_cfg={"timm_model_name": 3}),
        {"model_cfg": TINY, "preprocess_cfg": []},
        {"model_cfg": TINY, "preprocess_cfg": {"mean": [0, 0]}},
        {"model_cfg": TINY, "preprocess_cfg": {"std": [0, 1, 1]}},
        {"model_cfg": TINY, "preprocess_cfg": {"mean": ["a", 0, 0]}},
        {"model_cfg": TINY, "preprocess_cfg": {"std": [1e300, 1, 1]}},
    ],
)  # fmt: skip
def test_another_config_is_one_line_that_names_the_file(tmp_path: Path, config: Any) -> None:
    path = tmp_path / "tiny.json"
    if isinstance(config, str):
        path.write_bytes(config.encode(errors="surrogatepass"))
    else:
        path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tiny\.json") as caught:
        teachers.load(f"open_clip:{path}", "random:0")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "values",
    [
        {"vision_cfg": {"width": "x"}}, {"vision_cfg": {"layers": None}},
        {"vision_cfg": {"patch_size": 0}}, {"vision_cfg": {"head_width": 0}}, {"embed_dim": "x"},
        {"vision_cfg": {"norm_kwargs": {"a": 1}}}, {"vision_cfg": {"pos_embed_type": "x"}},
        {"text_cfg": {"heads": 3}}, {"vision_cfg": {"image_size": [32]}},
        {"vision_cfg": {"timm_model_name": "no_such_network"}}, {"cast_dtype": "x"},
    ],
)  # fmt: skip
def test_what_builds_no_network_is_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write(tmp_path, changed(**values))
    with pytest.raises(UserError):
        teachers.load(f"open_clip:{path}", "random:0")


def test_a_config_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = {"hf_model_name": "./here", "hf_model_pretrained": True, "hf_tokenizer_name": "x"}
    path = write(tmp_path, changed(text_cfg=text))
    teacher = teachers.load(f"open_clip:{path}", "random:0")
    assert teacher.width == 32
    model = read_config(
        write(tmp_path, changed(vision_cfg={"timm_model_name": "vit_tiny_patch16_224",
                                            "timm_model_pretrained": True})), "x",
    )["model_cfg"]  # fmt: skip
    assert model["vision_cfg"]["timm_model_pretrained"] is False


def test_a_network_that_no_memory_holds(tmp_path: Path, monkeypatch: Any) -> None:
    memory = type("Memory", (), {"total": 8 << 30})
    monkeypatch.setattr(open_clip_config.psutil, "virtual_memory", lambda: memory)
    path = write(tmp_path, changed(vision_cfg={"width": 16384, "layers": 200}))
    with pytest.raises(UserError, match="do not fit"):
        read_config(path, "x")


def test_the_small_text_tower_changes_no_weight_of_the_picture_tower(tmp_path: Path) -> None:
    import torch

    plain = teachers.load(f"open_clip:{write(tmp_path, TINY)}", "random:3").state_dict()
    text = changed(text_cfg={"hf_model_name": "roberta-base"})
    other = teachers.load(f"open_clip:{write(tmp_path, text)}", "random:3").state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
