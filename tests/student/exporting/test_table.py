"""docs/exporting.md says of every encoder which formats it has; the code decides the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UserError
from student import exporting
from student.features import export_folder
from tests.student.exporting.test_networks import TEACHERS, network

PAGE = (Path(__file__).parents[3] / "docs/exporting.md").read_text()
SMALL = "tiny,depth=1,embed_dim=24,num_heads=3"
CONV = "tiny,stage1=8,stage2=12,embed_dim=24,depth=1,num_heads=3"
PLAIN = "vit_tiny_patch16_224,depth=1,embed_dim=24"
HEAD: dict[str, Any] = {"classes": 4, "pool": "cls", "rel_pos": False, "drop_path": 0.1}
MEAN = {**HEAD, "pool": "mean"}
# beginning of a row -> the encoders that it is of
ROWS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "family `mae`": [(SMALL, "mae", {})],
    "family `cae`": [(SMALL, "cae", {})],
    "family `beit`": [(SMALL, "beit", {})],
    "family `conv_vit`": [(CONV, "conv_vit", {}), (CONV, "conv_vit", MEAN)],
    "a teacher that was fine-tuned, a plain ViT": [(PLAIN, "timm", HEAD)],
    "a teacher that was fine-tuned, any other": [
        (TEACHERS[name], "timm", HEAD) for name in ("clip", "registers", "relative", "pooled")
    ],
    "fine-tuned, a head on [CLS]": [(SMALL, "mae", HEAD), (SMALL, "cae", HEAD)],
    "fine-tuned, a head on the mean": [(SMALL, "mae", MEAN), (SMALL, "cae", MEAN)],
    "fine-tuned with `rel_pos=true`": [
        (SMALL, family, {**HEAD, "rel_pos": True}) for family in ("cae", "beit")
    ],
}


def _table() -> tuple[list[str], list[list[str]]]:
    lines = PAGE.split("\n| encoder |")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return re.findall(r"`(\w+)`", lines[0]), rows


def test_the_table_has_every_format() -> None:
    formats, rows = _table()
    assert sorted(formats) == exporting.names()
    assert len(rows) == len(ROWS)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("begin", ROWS)
def test_the_table_says_what_the_code_allows(begin: str) -> None:
    formats, rows = _table()
    (row,) = (row for row in rows if row[0].startswith(begin))
    for encoder, family, head in ROWS[begin]:
        given = network(encoder, family, 64, **head)
        for form, cell in zip(formats, row[1:], strict=True):
            assert cell.partition(",")[0] == _says(given, form), (encoder, form)


def _says(given: Any, form: str) -> str:
    module = exporting.load(form)
    try:
        export_folder.check_family(given, module)
        module.check(given)
    except UserError:
        return "no"
    return "yes"
