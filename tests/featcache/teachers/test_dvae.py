"""DALL-E's tokenizer equals its description written out with plain convolutions, reads the
published form of its weights, and gives token ids of real photographs.

B batch, P patches, C channels.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models.weights import weight_hash
from featcache.teachers import dvae
from tests import teacher_reference

WIDTH, WORDS = 8, 24


@pytest.fixture
def encoder() -> dvae.Dvae:
    """Draw weights; the words' biases are such that none wins everywhere."""
    encoder = dvae.Dvae("drawn", WIDTH, WORDS)
    teacher_reference.randomise_parameters(encoder, std=0.3)
    encoder.eval().requires_grad_(False)
    encoder.blocks.output.conv.bias -= encoder.logits(
        0.8 * (teacher_reference.photographs(112) / 255) + 0.1
    ).mean((0, 2, 3))
    return encoder


def published(encoder: nn.Module) -> dict[str, Tensor]:
    """Rename tensors as the published module names them."""
    return {
        name.replace(".weight", ".w").replace(".bias", ".b"): value.clone()
        for name, value in encoder.state_dict().items()
    }


def described(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the encoder by its description, from the published names, in float64: logits (B,
    words, S / 8, S / 8)."""

    def conv(name: str, x: Tensor) -> Tensor:
        w, b = weights[f"blocks.{name}.w"].double(), weights[f"blocks.{name}.b"].double()
        return F.conv2d(x, w, b, padding=w.shape[-1] // 2)

    x = conv("input", x)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            here = f"group_{group}.block_{block}"
            branch = x
            for layer in (1, 2, 3, 4):
                branch = conv(f"{here}.res_path.conv_{layer}", branch.clamp_min(0))
            straight = conv(f"{here}.id_path", x) if f"blocks.{here}.id_path.w" in weights else x
            x = straight + branch / 64  # 8 blocks
        if group < 4:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    return conv("output.conv", x.clamp_min(0))


def test_the_network_is_the_described_one(encoder: dvae.Dvae) -> None:
    images = teacher_reference.photographs(112)
    pixels = 0.8 * (images.double() / 255) + 0.1
    expected = described(published(encoder), pixels)
    got = encoder.logits(pixels.float())
    assert got.shape == expected.shape == (3, WORDS, 14, 14)
    assert (got.double() - expected).norm() / expected.norm() < 1e-5
    ids = encoder(images)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.argmax(1).reshape(3, 196))  # raster order
    assert len(ids.unique()) > WORDS // 2


def test_shapes_of_every_tensor_are_the_published_ones() -> None:
    """Widths 256, 512, 1024 and 2048, a quarter inside, 8192 words."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in published(dvae.Dvae("x")).items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert "blocks.group_1.block_1.id_path.w" not in shapes
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.block_1.res_path.conv_1.w"] == (512, 1024, 3, 3)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert len(shapes) == 2 * (1 + 8 * 4 + 3 + 1)


class _Conv(nn.Module):
    """Keep a convolution as the published module does: parameters `w` and `b`, plain attributes
    beside them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.n_in, self.use_float16, self.device = conv.in_channels, True, torch.device("cpu")
        self.w, self.b = nn.Parameter(conv.weight.clone()), nn.Parameter(conv.bias.clone())  # type: ignore[union-attr]


def _published_module(network: nn.Module) -> nn.Module:
    for name, child in network.named_children():
        setattr(
            network,
            name,
            _Conv(child) if isinstance(child, nn.Conv2d) else _published_module(child),
        )
    return network


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Put classes under the published package's name while a file is written; they are gone when it
    is read."""
    module = types.ModuleType("dall_e")
    for kind in (_Conv, dvae.Dvae, dvae.Block):
        made = type(kind.__name__, (kind,), {"__module__": "dall_e"})
        setattr(module, kind.__name__, made)
    monkeypatch.setitem(sys.modules, "dall_e", module)
    return module


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])
def test_the_published_pickle_is_read_without_its_package(
    tmp_path: Path,
    encoder: dvae.Dvae,
    foreign: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    zipped: bool,
) -> None:
    expected = {name: value.clone() for name, value in encoder.state_dict().items()}
    whole = _published_module(encoder)
    for module in whole.modules():
        if hasattr(foreign, type(module).__name__):
            module.__class__ = getattr(foreign, type(module).__name__)
    torch.save(whole, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "dall_e")
    assert b"dall_e" in (tmp_path / "encoder.pkl").read_bytes()
    read = dvae.Dvae("x", WIDTH, WORDS)
    dvae.load_weights(read, str(tmp_path / "encoder.pkl"), "dvae")
    assert "dall_e" not in sys.modules
    assert all(torch.equal(value, expected[name]) for name, value in read.state_dict().items())


@pytest.mark.parametrize("names", ["published", "ours"])
def test_a_state_dict_is_read_by_either_names(
    tmp_path: Path, encoder: dvae.Dvae, names: str
) -> None:
    state = published(encoder) if names == "published" else encoder.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    read = dvae.Dvae("x", WIDTH, WORDS)
    dvae.load_weights(read, str(tmp_path / "w.safetensors"), "dvae")
    assert weight_hash(read) == weight_hash(encoder)


def test_another_network_is_one_line(tmp_path: Path, encoder: dvae.Dvae) -> None:
    save_file(published(encoder), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"do not fit dvae: blocks\.\S+ is .* is needed"):
        teachers.load_tokenizer("dvae", str(tmp_path / "w.safetensors"))


def test_the_last_layer_stays_in_float32_under_autocast(encoder: dvae.Dvae) -> None:
    seen: list[Any] = []
    encoder.blocks.output.register_forward_hook(lambda _, x, y: seen.extend([x[0].dtype, y.dtype]))
    encoder.blocks.group_4.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(teacher_reference.photographs(112)[:1])
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_it_is_loaded_as_a_tokenizer_only() -> None:
    assert teachers.is_tokenizer("dvae")
    assert not teachers.is_tokenizer("clip-b16")
    with pytest.raises(UsageError, match="gives token ids, not features"):
        teachers.load("dvae", "random:0")
    with pytest.raises(UsageError, match=r"gives features, not token ids.*dvae"):
        teachers.load_tokenizer("synthetic")
    with pytest.raises(UsageError, match="none has a tag"):
        teachers.load_tokenizer("dvae", "openai")


def test_a_smaller_one_is_told_by_options(tmp_path: Path, encoder: dvae.Dvae) -> None:
    """8 wide, 24 words, 64 pixels: a grid of 8 x 8, ids by the description in float64."""
    spec = f"dvae,img_size=64,width={WIDTH},vocabulary={WORDS}"
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    small = teachers.load_tokenizer(spec, str(tmp_path / "w.safetensors"))
    assert (small.name, small.input_px, small.patches, small.vocabulary) == (spec, 64, 64, WORDS)
    images = teacher_reference.photographs(64)
    expected = described(published(encoder), 0.8 * (images.double() / 255) + 0.1).argmax(1)
    assert torch.equal(small(images), expected.reshape(3, 64))
    drawn = teachers.load_tokenizer("dvae,width=8,vocabulary=24", "random:0")
    assert (drawn.input_px, drawn.patches, drawn(teacher_reference.photographs(112)).shape) == (
        112,
        196,
        (3, 196),
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("widht=8", r"unknown option 'widht'; did you mean width\b"),
        ("img_size=60", "img_size=60; a multiple of 8 is needed, as 112"),
        ("width=6", "width=6; a multiple of 4 is needed, as 256"),
        ("vocabulary=0", "vocabulary=0; a multiple of 2 is needed, as 8192"),
        ("width=wide", "width=wide; a multiple of 4 is needed"),
    ],
)
def test_sizes_that_cannot_be_built(options: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        teachers.load_tokenizer(f"dvae,{options}", "random:0")


def test_weights_of_other_sizes_are_one_line(tmp_path: Path, encoder: dvae.Dvae) -> None:
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"do not fit dvae: blocks\.\S+ is .* is needed"):
        teachers.load_tokenizer("dvae,width=16,vocabulary=24", str(tmp_path / "w.safetensors"))


@pytest.mark.slow
def test_the_whole_tokenizer_runs() -> None:
    """54 million parameters: contract of `Tokenizer`, a seed's weights, ids that fit uint16."""
    tokenizer = teachers.load_tokenizer("dvae", "random:0")
    assert (tokenizer.name, tokenizer.weights, tokenizer.input_px, tokenizer.patches) == (
        "dvae",
        "random:0",
        112,
        196,
    )
    assert (tokenizer.vocabulary, tokenizer.pixel_filter) == (8192, "lanczos")
    ids = tokenizer(teacher_reference.photographs(112))
    assert ids.shape == (3, 196)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 8192
    assert not any(value.requires_grad for value in tokenizer.state_dict().values())
    same = teachers.load_tokenizer("dvae", "random:0")
    assert weight_hash(same) == weight_hash(tokenizer)
