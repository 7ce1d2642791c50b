"""The teacher of a run is loaded once more: the one that its config.json records, with the weights
that it had.

A file chooses no code, file or address: a teacher that is none of a library's own is loaded only
where the command line names it (`featcache.teachers.recorded_spec`), and weights come from the
command line or are those that the teacher's name stands for. Whichever they are, their hash must be
the one that the run recorded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache import teachers
from featcache.errors import IdentityError, UsageError, UserError
from featcache.models import weights as weight_files
from featcache.models.contract import REGISTERED, Teacher
from student import checkpoint

NAME, WEIGHTS = "--teacher-name", "--teacher-weights"
OPTIONS: dict[str, tuple[Any, str]] = {
    "teacher_name": ("", "the run's teacher, where it is a file of your own or not recorded"),
    "teacher_weights": ("", "its weights: FILE, tag or random:SEED. [default: registered]"),
}


@dataclass(frozen=True)
class RunTeacher:
    """Names the teacher of a run, and the hash of the weights that it had; empty where the run
    records none."""

    run: Path
    spec: str
    weight_hash: str = ""

    def check(self, teacher: Teacher, weights: str) -> None:
        """Raise IdentityError unless a loaded teacher has the weights of the run."""
        found = weight_files.weight_hash(teacher)
        if self.weight_hash not in ("", found):
            raise IdentityError(
                f"weights {weights or REGISTERED!r} of teacher {self.spec!r} have hash {found}, "
                f"run {str(self.run)!r} learned from {self.weight_hash}; give those with {WEIGHTS}"
            )


def find(run: Path, named: str = "") -> RunTeacher:
    """Return the teacher that a run records, or the one that is named on the command line where it
    records none."""
    spec, weight_hash = _recorded(run)
    if not spec and not named:
        raise UserError(
            f"run {str(run)!r} records no teacher: it learned from none; name one with {NAME} SPEC"
        )
    if not spec:
        return RunTeacher(run, named)
    where = str(run / checkpoint.CONFIG)
    chosen = teachers.recorded_spec(spec, [named] if named else [], repr(where), NAME)
    if named and chosen != named:
        raise UsageError(
            f"{NAME} {named}: {where!r} records the teacher {spec!r}; leave {NAME} out"
        )
    return RunTeacher(run, chosen, weight_hash)


def _recorded(run: Path) -> tuple[str, str]:
    """Return spec and hash of weights from config.json; empty where a run has no teacher."""
    targets = checkpoint.read_config(run).get("targets")
    about = targets if isinstance(targets, dict) else {}
    if about.get("kind") == "cached":
        identity = about.get("identity")
        teacher = identity.get("teacher") if isinstance(identity, dict) else None
        found = teacher if isinstance(teacher, dict) else {}
        pair = found.get("name"), found.get("weight_hash")
    else:
        pair = about.get("teacher"), about.get("weight_hash")
    spec, weight_hash = (each if isinstance(each, str) else "" for each in pair)
    if spec and not weight_hash:
        raise UserError(
            f"{str(run / checkpoint.CONFIG)!r} names the teacher {spec[:80]!r} without the hash of "
            "its weights; restore the file"
        )
    return spec, weight_hash


def load(teacher: RunTeacher, weights: str = "") -> Teacher:
    """Load the teacher on the CPU. Raises IdentityError for other weights than the run's."""
    with own_options():
        loaded = teachers.load(teacher.spec, weights or None)
    teacher.check(loaded, weights)
    return loaded


@contextlib.contextmanager
def own_options() -> Iterator[None]:
    """Let errors of loading name the option that weights have here."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(r"(?<!\S)--weights\b", WEIGHTS, str(error))) from error
