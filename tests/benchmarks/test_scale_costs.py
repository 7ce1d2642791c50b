"""The table of what many pictures cost: the arithmetic by hand, the page by the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scale_costs
from benchmarks.scale_costs import ShardCosts, costs
from tests.conftest import run_module

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guides/scale.md"
SHARD = ShardCosts("x", 100_000, 40.0, 50_000.0, 49.0, 14.0, 4000)


def test_costs_by_hand() -> None:
    """10^6 pictures: 1,024 a shard, 977 shards; 15,625 blocks; 1,000 views a second."""
    assert costs(SHARD, 1_000_000, 1000.0) == {
        "rows_per_shard": 1024,
        "shards": 977,
        "files": 977 * 40,
        "bytes": 100_000_000_000 + 977 * 50_000,
        "write_requests": 977 * 49,
        "lease_touches": pytest.approx(1000 / 15),
        "list_requests": 40,  # 39,080 names, a thousand an answer
        "epoch_requests": 15_625 * 14,
        "hours": pytest.approx(1000 / 3600),
    }


def test_a_large_view_makes_shards_of_a_gibibyte() -> None:
    found = costs(ShardCosts("x", 2 << 20, 1.0, 0.0, 1.0, 1.0, 1), 10**6, 1.0)
    assert (found["rows_per_shard"], found["shards"]) == (512, 1954)


def test_the_page_has_the_programs_table() -> None:
    """Of the figures that stand above it."""
    text = PAGE.read_text()
    rows = [
        [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(("| bytes a view", "| files, or objects, of", "| requests "))
    ]
    sizes, files, writes, reads = ([float(cell) for cell in row[1:]] for row in rows[:4])
    other = [44_038.0, 123_060.0]  # bytes of a shard beside its rows
    found = [
        ShardCosts(name, int(sizes[i]), files[i], other[i], writes[i], reads[i], 0)
        for i, name in enumerate(scale_costs.LAYOUTS)
    ]
    assert scale_costs.table(found, scale_costs.CLIP_ON_TWO_CORES) in text


@pytest.mark.slow
def test_scale_costs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run_module("benchmarks.scale_costs", "--help", cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    monkeypatch.setattr(scale_costs, "ROWS", 4)
    monkeypatch.setattr(scale_costs, "BLOCK", 4)
    monkeypatch.setattr(scale_costs, "LAYOUTS", {"fp16, all tokens": ()})
    with scale_costs.serve(tmp_path / "s3") as server:
        scale_costs.open_bucket(server)
        for name, value in server.variables(XDG_CACHE_HOME=str(tmp_path / "own")).items():
            monkeypatch.setenv(name, value)
        found = scale_costs.count("fp16, all tokens", tmp_path)
    assert found.view_bytes > 5 * 197 * 768 * 2
    # a record is among the files; each file is uploaded by one request at least
    assert found.files > 10
    assert found.writes >= found.files
    assert found.reads > 0
