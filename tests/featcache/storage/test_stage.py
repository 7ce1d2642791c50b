"""A stage gives back what it was given, or nothing, and never holds more than its limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from featcache.errors import UserError
from featcache.storage.stage import Piece, Stage, groups, joined_gap


def content(piece: Piece) -> bytes:
    """Bytes that are those of no other piece."""
    text = f"{piece.file} {piece.offset} {piece.bytes};".encode()
    return (text * (piece.bytes // len(text) + 1))[: piece.bytes]


def keep(stage: Stage, *pieces: Piece) -> bool:
    return stage.keep(pieces, [content(piece) for piece in pieces])


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


PIECES = st.builds(
    Piece, st.sampled_from(["a", "b/ü"]), st.integers(0, 9).map(lambda i: 100 * i),
    st.integers(1, 100),
)  # fmt: skip
DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.lists(PIECES, min_size=1, max_size=4, unique=True)),
        st.tuples(st.just("read"), PIECES),
    ),
    max_size=40,
)


@given(deeds=DEEDS, limit=st.integers(0, 900))
def test_any_order_of_deeds(
    deeds: list[tuple[str, object]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    stage = Stage(folder, limit)
    kept: set[Piece] = set()
    for what, about in deeds:
        if what == "keep":
            pieces = [each for each in about if not stage.holds(each)]  # type: ignore[attr-defined]
            if keep(stage, *pieces):
                kept.update(pieces)
        else:
            piece: Piece = about  # type: ignore[assignment]
            held = stage.holds(piece)
            assert stage.read(piece) == (content(piece) if held else None)
            assert not held or piece in kept
        assert stage.bytes == on_disk(folder) <= limit


def test_what_was_not_read_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 250)  # an index has some 40 bytes
    one, two, three = (Piece("f", 50 * i, 50) for i in range(3))
    assert keep(stage, one)
    assert keep(stage, two)
    assert not keep(stage, three)
    assert stage.read(two) == content(two)
    assert keep(stage, three)
    assert [stage.holds(each) for each in (one, two, three)] == [True, False, True]


def test_while_there_is_room_what_was_read_stays_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 2000)
    pieces = [Piece("f", 50 * i, 50) for i in range(20)]
    for each in pieces:
        assert keep(stage, each)
        stage.read(each)
    assert all(map(stage.holds, pieces))


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=30),
    st.integers(0, 4),
)
def test_one_request_reads_little_for_nothing(found: list[tuple[int, int]], space: int) -> None:
    """Pieces that lie apart by random gaps, many of them tiny, given in any order."""
    starts, at = [], 0
    for gap, length in found:
        at += gap % (space + 1) if gap < 4000 else gap
        starts.append(at)
        at += length
    pieces = [Piece("f", each, length) for each, (_, length) in zip(starts, found, strict=True)]
    apart = [Piece("g", each.offset, each.bytes) for each in pieces]
    gap = joined_gap([*pieces[::-1], *apart])
    ends = [piece.offset + piece.bytes for piece in pieces]
    gaps = 2 * [low - high for low, high in zip(starts[1:], ends[:-1], strict=True)]
    allowed = 0.03 * 2 * sum(piece.bytes for piece in pieces)
    assert sum(each for each in gaps if each <= gap) <= allowed
    larger = [each for each in gaps if each > gap]
    if larger:  # the next larger one would be too much
        assert sum(each for each in gaps if each <= min(larger)) > allowed


def test_groups_hold_all_pieces_in_their_order() -> None:
    pieces = [Piece("f", i, size) for i, size in enumerate([60 << 20, 4 << 20, 1, 70 << 20, 5])]
    assert [[each.offset for each in group] for group in groups(pieces)] == [[0, 1], [2], [3], [4]]


LEAVE = """
import sys
from pathlib import Path
from tests.featcache.storage.test_stage import keep
from featcache.storage.stage import Piece, Stage
stage = Stage(Path(sys.argv[1]), 1000)
keep(stage, Piece("f", 0, 50), Piece("g", 50, 60))
keep(stage, Piece("f", 100, 70))
"""


INDEXES = (
    '{"files": ["f", "g"], "pieces": [[0, 0, 50], [1, 50, 60]]}',
    '{"files": ["f"], "pieces": [[0, 100, 70]]}',
)


def left(folder: Path) -> None:
    """What a process leaves that has ended."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", LEAVE, str(folder)], env=env, check=True)


def test_the_next_process_takes_over(tmp_path: Path) -> None:
    left(tmp_path)
    (data, *_) = sorted(tmp_path.glob("*.data"))
    (tmp_path / "mine.data").write_bytes(b"other")
    stage = Stage(tmp_path, 1000)
    for piece in (Piece("f", 0, 50), Piece("g", 50, 60), Piece("f", 100, 70)):
        assert stage.read(piece) == content(piece)
    assert not data.exists()
    assert (tmp_path / "mine.data").read_bytes() == b"other"
    assert stage.bytes == 180 + len(INDEXES[0]) + len(INDEXES[1])


def test_what_is_beyond_the_limit_is_removed(tmp_path: Path) -> None:
    left(tmp_path)
    stage = Stage(tmp_path, 200)
    assert on_disk(tmp_path) == stage.bytes <= 200
    assert stage.bytes in (110 + len(INDEXES[0]), 70 + len(INDEXES[1]))


@pytest.mark.parametrize("text", ["", "[]", '{"files": ["f"], "pieces": [[0, 0, 999]]}', "{"])
def test_an_index_that_is_not_ours_is_no_index(tmp_path: Path, text: str) -> None:
    left(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(text)
    stage = Stage(tmp_path, 1000)
    assert stage.bytes == on_disk(tmp_path) == 0


def test_a_cut_segment_is_dropped(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 1000)
    piece = Piece("f", 0, 50)
    keep(stage, piece)
    (data,) = tmp_path.glob("*.data")
    os.truncate(data, 10)
    assert stage.read(piece) is None
    assert not stage.holds(piece)
    assert on_disk(tmp_path) == 0


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"--stage .*: No space left on device; give another folder"
    ):
        keep(stage, Piece("f", 0, 50))
    assert list(tmp_path.iterdir()) == []
    assert stage.bytes == 0
