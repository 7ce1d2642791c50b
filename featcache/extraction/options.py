"""Several teachers in one command: an option given for each, and the teachers themselves.

    --teacher clip-b16 --teacher dino-b16 --levels last:5 --levels dino-b16=-1 --weights dino-b16=dino.safetensors

A value that begins with a teacher's name and `=` is for it alone; another is for all that have none of their own, and
as with every option the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from featcache import teachers
from featcache.errors import UsageError
from featcache.extraction import plan
from featcache.models import precision as running
from featcache.models import tokenizer

DEFAULT_LEVELS = "last:5"


def assign(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """Each teacher's value of an option, None where nothing was given for it.

    >>> assign("--levels", ["last:5", "dino-b16=-1"], ["clip-b16", "dino-b16"])
    {'clip-b16': 'last:5', 'dino-b16': '-1'}
    """
    if double := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UsageError(f"--teacher {double[0]!r} is given twice; give each teacher once")
    own: dict[str, str] = {}
    shared: str | None = None
    for value in values:
        # the longest: one name may begin another
        name = max((name for name in names if value.startswith(f"{name}=")), key=len, default=None)
        if name is None:
            shared = value
        else:
            own[name] = value[len(name) + 1 :]
    return {name: own.get(name, shared) for name in names}


def weights(values: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """The same of `--weights`: a file or a tag is one teacher's, only random:SEED can be meant for several."""
    found = assign("--weights", values, names)
    for value in values if len(names) > 1 else ():
        if not teachers.is_random(value) and not any(value.startswith(f"{name}=") for name in names):
            raise UsageError(
                f"--weights {value!r}: {len(names)} teachers are given; name one, as in --weights {names[0]}={value}"
            )
    return found


def levels(text: str | None, teacher: teachers.Teacher) -> tuple[int, ...]:
    """Block numbers of a teacher, `last:5` where nothing was said; a tokenizer has one level."""
    if isinstance(teacher, tokenizer.Tokenizer):
        return tokenizer.LEVELS
    return plan.parse_levels(text or DEFAULT_LEVELS, teacher.depth)


def load(name: str, weights: str | None, device: str, precision: str, compiled: bool) -> teachers.Teacher:
    return running.configure(running.load(name, weights, device), precision, compiled)
