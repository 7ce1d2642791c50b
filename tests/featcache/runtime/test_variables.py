"""Variables that reach the arithmetic are recorded, and no others."""

from __future__ import annotations

import pytest

from featcache.runtime import variables


def test_those_that_change_numbers_are_recorded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    before = variables.recorded()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("TIMM_FUSED_ATTN", "0")
    monkeypatch.setenv("ACCELERATE_FUTURE", "x")
    for name in ("WANDB_API_KEY", "HOME_TORCH", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    found = variables.recorded()
    assert list(found) == sorted(found)
    assert found == {
        **before,
        "NVIDIA_TF32_OVERRIDE": "1",
        "TIMM_FUSED_ATTN": "0",
        "ACCELERATE_FUTURE": "x",
    }


def test_variables_that_only_look_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    before = variables.unknown()
    for name in ("FEATCACHE_HOMES", "FEATCACHE_HOME", "FEATCACHE_IMAGES", "MY_FEATCACHE_X"):
        monkeypatch.setenv(name, "x")
    assert variables.unknown() == sorted([*before, "FEATCACHE_HOMES"])
