"""`featcache teachers`: every fact of the table counted again on networks that take no memory; told
without network."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featcache import teachers
from featcache.models.contract import ModelCard
from featcache.teachers import dvae
from tests.conftest import Ran

ROWS = teachers.model_cards()
TIMM = [name for name, row in ROWS.items() if row.source.startswith("timm ")]
CLIP = {"clip-b16": ("ViT-B-16", 224), "clip-b32": ("ViT-B-32", 224), "clip-l14": ("ViT-L-14", 196)}


def counted(network: Any, forward: Callable[[torch.Tensor], object], px: int) -> tuple[int, float]:
    """Parameters, and multiply-accumulates of one picture in 10^9."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(torch.empty(1, 3, px, px, device="meta"))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2e9


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", TIMM)
def test_facts_of_timms_networks(name: str) -> None:
    row = ROWS[name]
    arch = row.source.removeprefix("timm ")
    with torch.device("meta"):
        network: Any = timm.create_model(arch, num_classes=0, img_size=row.input_px).eval()
    params, gmac = counted(network, network.forward_features, row.input_px)
    assert (row.params, row.gmac) == (params, pytest.approx(gmac, abs=0.006))
    assert (row.patches, row.width, row.depth) == (
        network.patch_embed.num_patches,
        network.embed_dim,
        len(network.blocks),
    )
    about = timm.get_pretrained_cfg(arch)
    # Apple's own repositories of AIMv2 have a later licence than timm's copies
    licence = {"apple-ascl": "apple-amlr"}.get(about.license, about.license)
    assert (row.hub, row.licence) == (about.hf_hub_id, licence)
    assert row.patches == 196  # a /16 student's grid


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIP)
def test_facts_of_open_clips_networks(name: str) -> None:
    row, (arch, px) = ROWS[name], CLIP[name]
    tower: Any = open_clip.create_model(
        arch, load_weights=False, force_image_size=px, device="meta"
    ).visual.eval()
    params, gmac = counted(tower, tower, px)
    assert (row.params, row.gmac) == (params, pytest.approx(gmac, abs=0.006))
    assert (row.input_px, row.patches) == (px, tower.grid_size[0] ** 2)
    assert (row.width, row.depth) == (tower.transformer.width, tower.transformer.layers)
    assert row.hub == open_clip.get_pretrained_cfg(arch, "openai")["hf_hub"].rstrip("/")


@pytest.mark.slow
def test_facts_of_the_tokenizer() -> None:
    """METHODS 4.2: about 26.1 GMAC; 392 bytes of ids."""
    with torch.device("meta"):
        network = dvae.Dvae("x")
    blocks: nn.Module = network.blocks
    params, gmac = counted(network, blocks, 112)
    row = ROWS["dvae"]
    assert (row.params, row.gmac) == (params, pytest.approx(gmac, abs=0.05))
    assert (row.patches, row.width) == (network.patches, network.vocabulary)
    assert row.view_bytes == 392


def test_bytes_of_a_view() -> None:
    """METHODS 10.1: the last five levels of B/16 and of L/14 at 196 pixels in fp16."""
    assert ROWS["clip-b16"].view_bytes == 1_512_960
    assert ROWS["clip-l14"].view_bytes == 2_017_280
    assert ModelCard("", 32, 4, 8, 3).view_bytes == 3 * 5 * 8 * 2  # fewer than five levels


def test_the_table_asks_no_network(
    featcache_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from huggingface_hub import constants

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    folder = tmp_path / "models--timm--vit_base_patch16_clip_224.openai"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/open_clip_model.safetensors").write_bytes(b"x")
    ran = featcache_command("teachers", "--json")
    assert ran.status == 0, ran.err
    table = {fact["name"]: fact for fact in json.loads(ran.out)}
    assert table.keys() == ROWS.keys()
    assert {name for name, fact in table.items() if fact["on_this_machine"]} == {
        "clip-b16",
        "synthetic",
    }
    assert table["clip-b16"]["file"].endswith("open_clip_model.safetensors")
    assert table["dvae"]["kind"] == "token ids"
    assert table["mae-b16"]["licence"] == "cc-by-nc-4.0"
    lines = featcache_command("teachers").out.splitlines()
    (line,) = [line for line in lines if line.startswith("clip-l14")]
    assert line.split()[:9] == [
        "clip-l14",
        "196",
        "196",
        "1024",
        "24",
        "303.9M",
        "61.5",
        "2,017,280",
        "no",
    ]
    assert all(len(line) <= 141 for line in lines)
