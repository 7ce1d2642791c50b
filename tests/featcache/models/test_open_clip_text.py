"""Text towers come from whole files of every form, and embed as open_clip's own functions do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from featcache import teachers
from tests import teacher_reference

CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip
TEXTS = ["a photo of a cat.", "the cat", "x"]


def network(folder: Path, **changes: Any) -> Any:
    """Write a config as a folder of open_clip's has it, and build its network of random weights."""
    about = json.dumps({"model_cfg": {**CONFIG, **changes}})
    (folder / "open_clip_config.json").write_text(about)
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    teacher_reference.randomise_parameters(model)
    return model


def embedding(model: Any, folder: Path) -> torch.Tensor:
    """The mean of the texts, each of length 1, by encode_text."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        mean = model.double().encode_text(tokens, normalize=True).mean(0)
    return (mean / mean.norm()).float()


def saved(model: Any, path: Path, **more: torch.Tensor) -> str:
    save_file({**{k: v.contiguous() for k, v in model.state_dict().items()}, **more}, path)
    return str(path)


@pytest.mark.parametrize("changes", [{}, {"custom_text": True}, {"quick_gelu": False}])
def test_a_folder_of_open_clips(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = network(tmp_path, **changes)
    saved(model, tmp_path / "open_clip_model.safetensors")
    tower = teachers.load_text(f"open_clip:local-dir:{tmp_path}")
    wanted = embedding(model, tmp_path)
    torch.testing.assert_close(tower.embed_class(TEXTS), wanted, rtol=0, atol=1e-6)
    assert tower.embed_class(TEXTS).norm().item() == pytest.approx(1, abs=1e-6)


def test_sizes_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    """As OpenAI's own files have them."""
    model, number = network(tmp_path), torch.tensor(8)
    weights = saved(model, tmp_path / "whole.safetensors", input_resolution=number,
                    context_length=number.clone(), vocab_size=number.clone())  # fmt: skip
    config = tmp_path / "small.json"
    config.write_text(json.dumps(CONFIG))
    tower = teachers.load_text(f"open_clip:{config}", weights)
    wanted = embedding(model, tmp_path)
    torch.testing.assert_close(tower.embed_class(TEXTS), wanted, rtol=0, atol=1e-6)


def test_a_seed_draws_the_tower_beside_the_pictures(tmp_path: Path) -> None:
    network(tmp_path)
    config = tmp_path / "small.json"
    config.write_text(json.dumps(CONFIG))
    teacher: Any = teachers.load(f"open_clip:{config}", "random:5")
    tower = teachers.load_text(f"open_clip:{config}", "random:5")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model: Any = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    assert torch.equal(teacher.visual.proj, model.visual.proj)
    wanted = embedding(model, tmp_path)
    torch.testing.assert_close(tower.embed_class(TEXTS), wanted, rtol=0, atol=1e-6)
