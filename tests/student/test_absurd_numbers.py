"""Numbers that no run can mean are one line at the start, whether they come by --set, by a file or
by an option."""

from __future__ import annotations

from pathlib import Path

import pytest

from student.training import metrics
from tests import student_fixtures as fx

FIELDS = {
    "lr": ("nan", "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "true", "[1]", '"0.1"', ""),
    "weight_decay": ("NaN", "1e999", "-1", "false"),
    "drop_path": ("NaN", "1.0", "2", "-0.1", "0.99999999999999999999"),
    "betas": ("[1, 1]", "[0.9]", "[0.9, NaN]", "[-1, 0.9]", "0.9", "[true, 0.9]"),
    "warmup_epochs": ("NaN", "1e999", "-1"),
    "mask_ratio": ("NaN", "1", "-1", "0.99"),
    "clip_grad": ("NaN", "1e999", "-1", "0"),
    "min_lr": ("NaN", "-1"),
    "epochs": ("0", "-3", "1.5", "true", "9" * 23, "9" * 5000),
    "img_size": ("0", "-16", "9" * 11),
    "patch_size": ("0", "7"),
}
SETTINGS = [(key, value) for key, values in FIELDS.items() for value in values]


def names(value: object) -> str:
    return str(value)[:12]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=names)
def test_a_setting_is_refused_by_its_name(key: str, value: str, tmp_path: Path) -> None:
    given = ("--cache", fx.cache_path(), "--steps", 1)
    ran = fx.train("maskalign", tmp_path / "run", *given, sets=(f"{key}={value}",))
    assert ran.status == 2
    assert key in ran.line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["NaN", "-1", "1e999", "true", '"0.1"', "[[0.1]]", "9" * 5000])
def test_a_file_of_settings_is_no_other_way_in(value: str, tmp_path: Path) -> None:
    for text in (f'{{"weight_decay": {value}}}', f'{{"config": {{"weight_decay": {value}}}}}'):
        (tmp_path / "settings.json").write_text(text)
        given = ("--cache", fx.cache_path(), "--config", tmp_path / "settings.json")
        ran = fx.train("maskalign", tmp_path / "run", *given, "--steps", 1)
        assert ran.status in (1, 2)
        assert "weight_decay" in ran.line or "settings.json" in ran.line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--check-pixels", "nan"),
        ("--verify-rows", "nan"),
        ("--pixel-tolerance", "inf"),
        ("--without-view", "nan"),
        ("--ema", "nan"),
        ("--fallback-limit", "nan"),
        ("--scale", "nan,1"),
        ("--scale", "1,0.5"),
        ("--seed", "9" * 30),
        ("--seed", "-1"),
    ],
    ids=" ".join,
)
def test_an_option_is_refused_by_its_name(option: tuple[str, str], tmp_path: Path) -> None:
    given = ("--cache", fx.cache_path(), "--steps", 1, *option)
    ran = fx.train("maskalign", tmp_path / "run", *given)
    assert ran.status == 2
    assert option[0] in ran.line
    assert not (tmp_path / "run").exists()


def test_a_minimum_above_the_peak_is_said(tmp_path: Path) -> None:
    """It is not refused: a peak in proportion to a small batch may well lie below."""
    given = ("--cache", fx.cache_path(), "--steps", 2, "--batch-size", 8)
    ran = fx.good(fx.train("mralign", tmp_path / "run", *given, sets=("min_lr=0.5",)))
    assert "note: min_lr=0.5 is above the peak of 0.003 at this global batch" in ran.err
    assert [row["lr"] for row in metrics.read(tmp_path / "run")] == pytest.approx([0.003, 0.2515])
