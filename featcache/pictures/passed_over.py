"""What a source passes over is counted by reason, with the first name, so that nothing is left out
in silence."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LOG = logging.getLogger(__name__)

# Reasons are plural phrases.
OTHER_SUFFIX = "files with other suffixes"
HIDDEN = "hidden pictures"
HIDDEN_TAR = "hidden tars in a tar"
NO_FILE = "named pipes, sockets or devices"
NOWHERE = "links that lead nowhere"
EMPTY = "empty folders"
UPWARD = "links to a folder they lie in"
UNLISTED = "hidden folders that cannot be listed"
TARS = "tars beside or below a folder's pictures or tars"
NO_MEMBER = "links to what is no file of their tar"
ODD_MEMBER = "members that are pipes, devices or of an unknown kind"
BESIDE_PLAIN = "pictures beside the plain one of their sample"
SEVERAL = "pictures of samples that have several and no plain one (KEY.jpg) or #image-member="
NOT_CHOSEN = "samples without the member that #image-member= names"
ROWS_ALONE = "rows of labels without a picture"
LONE_ZEROS = "blocks of zeros between members, where a header may be lost"
AFTER_END = "tars with other data after their end mark"

# Not worth a word: they lie beside the pictures of published sets.
_COMPANIONS = ("readme", "license", "licence", "classes.json", "thumbs.db", "desktop.ini")
# Folders of operating systems and storage boxes; their names begin with no dot.
_HIDDEN_FOLDERS = frozenset(
    ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
)


@dataclass(frozen=True)
class PassedOver:
    """What a source left out for one reason."""

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.count}, the first is {self.first[:200]!r})"


class Tally:
    """Counts what is passed over, by reason."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._first[reason] = min(name, self._first.get(reason, name))

    def add_others(self, names: Sequence[str], used: Sequence[str]) -> None:
        """Count files with other suffixes, but for companions of a set and those of a file that is
        used (a.jpg: a.txt, a.jpg.txt)."""
        if not names:
            return
        known = {*used, *(posixpath.splitext(name)[0] for name in used)}
        for name in names:
            if not (is_companion(name) or posixpath.splitext(name)[0] in known):
                self.add(OTHER_SUFFIX, name)

    def add_rows(self, rows: Sequence[PassedOver]) -> None:
        """Add what another counted."""
        for row in rows:
            self.add(row.reason, row.first)
            self._counts[row.reason] += row.count - 1

    @property
    def rows(self) -> tuple[PassedOver, ...]:
        return tuple(
            PassedOver(reason, count, _text(self._first[reason]))
            for reason, count in sorted(self._counts.items())
        )


def _text(name: str) -> str:
    """A name as text: bytes that are no UTF-8 are written out, as other programs' JSON wants."""
    return name.encode(errors="backslashreplace").decode()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden: its name begins with a dot, or is one that systems
    give to their own."""
    return (name.startswith(".") and name not in (".", "..")) or name in _HIDDEN_FOLDERS


def is_companion(name: str) -> bool:
    """Return whether a file lies beside pictures in many published sets, and holds none."""
    return posixpath.basename(name).lower().startswith(_COMPANIONS)


def passed_over(source: Any) -> tuple[PassedOver, ...]:
    """Return what a source passed over; nothing where it doesn't say (a user's own)."""
    return tuple(getattr(source, "passed_over", ()))


def listed(rows: Sequence[PassedOver]) -> str:
    return ", ".join(map(str, rows))


def log(source: Any) -> None:
    """Note in one line what was passed over as a source was opened."""
    if rows := passed_over(source):
        _LOG.warning("pictures %r: passed over %s", source.spec, listed(rows))


def as_json(source: Any) -> list[dict[str, Any]]:
    """Return what was passed over, for commands that print facts."""
    return [asdict(row) for row in passed_over(source)]
