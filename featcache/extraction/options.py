"""Options of an extraction are parsed, for each of several teachers, and teachers are loaded.

    --teacher clip-b16 --teacher dino-b16 --levels last:5 --levels dino-b16=-1
    --weights dino-b16=dino.safetensors

A value that begins with a teacher's name and `=` is for it alone; another is for all that have none
of their own, and as with every option the last one counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from featcache import teachers
from featcache.errors import UsageError
from featcache.models import precision as running
from featcache.models import tokenizer
from featcache.models.contract import Teacher, has_attention
from featcache.models.weights import is_random
from featcache.runtime.compiler import check_compiler
from featcache.runtime.local_path import local_path
from featcache.runtime.numbers import is_whole

DEFAULT_LEVELS = "last:5"
_LONGEST = 30  # of a number in text


def per_teacher(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """Return each teacher's value of an option, None where nothing was given for it.

    >>> per_teacher("--levels", ["last:5", "dino-b16=-1"], ["clip-b16", "dino-b16"])
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


def weights_per_teacher(values: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """Do the same for `--weights`: a file or a tag is one teacher's, only random:SEED can be meant
    for several."""
    found = per_teacher("--weights", values, names)
    found = {name: local_path(w, "--weights") if w else w for name, w in found.items()}
    for value in values if len(names) > 1 else ():
        if not is_random(value) and not any(value.startswith(f"{name}=") for name in names):
            raise UsageError(
                f"--weights {value!r}: {len(names)} teachers are given; name one, as in --weights "
                f"{names[0]}={value}"
            )
    return found


def levels_of_teacher(text: str | None, teacher: Teacher) -> tuple[int, ...]:
    """Return block numbers of a teacher, `last:5` where nothing was said; a tokenizer has one
    level."""
    if isinstance(teacher, tokenizer.TokenizerTeacher):
        return tokenizer.LEVELS
    return parse_levels(text or DEFAULT_LEVELS, teacher.depth)


def default_order(teacher: Teacher) -> str:
    """Return the mask order where none is asked for: by attention, where the teacher gives one."""
    return "attentive" if has_attention(teacher) else "uniform"


def check_order(order: str, teacher: Teacher) -> None:
    """Raise UsageError for an order by attention, of a teacher that gives none."""
    if order != "uniform" and not has_attention(teacher):
        raise UsageError(
            f"--order {order}: teacher {teacher.name!r} has no [CLS] token and no attention pool, "
            "so no attention to order patches by; give --order uniform, or another teacher, such "
            "as clip-b16"
        )


def load_teacher(
    name: str, weights: str | None, device: str, precision: str, compiled: bool
) -> Teacher:
    if compiled:
        check_compiler(device)
    return running.configure(teachers.load_any(name, weights, device), precision, compiled)


def parse_levels(text: str, depth: int) -> tuple[int, ...]:
    """Parse 'last:5', '8,10,12', '-1,-3' (counted from the end) or 'all' -> 1-based block numbers,
    ascending.

    >>> parse_levels("last:3", 12), parse_levels("8,12,10", 12), parse_levels("-1,-3", 12)
    ((10, 11, 12), (8, 10, 12), (10, 12))
    """
    head, _, count = text.partition(":")
    if text == "all":
        return tuple(range(1, depth + 1))
    if head == "last" and is_whole(count) and 1 <= int(count) <= depth:
        return tuple(range(depth - int(count) + 1, depth + 1))
    parts = text.split(",")
    if all(is_whole(part.removeprefix("-")) and 1 <= abs(int(part)) <= depth for part in parts):
        blocks = {int(part) % (depth + 1) for part in parts}  # -1 is the last
        if len(blocks) == len(parts):
            return tuple(sorted(blocks))
    raise UsageError(
        f"--levels {text!r}: last:N, a list such as 1,{depth} or -1,-3 that names no block twice, "
        f"or all; blocks are 1 to {depth}, or -1 to -{depth} from the end"
    )


def parse_share(text: str | None) -> tuple[int, int]:
    """Parse '2/8' -> (2, 8), a share of the shards.

    >>> parse_share("2/8"), parse_share(None)
    ((2, 8), (0, 1))
    """
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (is_whole(index) and is_whole(count) and int(index) < int(count)):
        raise UsageError(
            f"--shard {text!r}: I/N with I from 0 to N - 1 is needed, such as "
            "$SLURM_ARRAY_TASK_ID/8"
        )
    return int(index), int(count)


def file_name(text: str) -> str:
    """Return a teacher's name as a file name: letters, digits, dot and dash."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)[:80]


def parse_keep(text: str | None, patches: int) -> int | None:
    """Parse '58' patches, or '0.3' of them, rounded up; None keeps all.

    >>> parse_keep("58", 196), parse_keep("0.3", 196), parse_keep(None, 196)
    (58, 59, None)
    """
    if text is None:
        return None
    allowed = f"a number of patches from 1 to {patches}, or a share of them such as 0.3, is needed"
    try:
        power = text.lower().partition("e")[2].lstrip("+-")
        if len(text) > _LONGEST or len(power) > 3:  # Fraction would write out every digit
            raise ValueError(f"{text[:_LONGEST]} is no number, or a very large one")
        value = int(text) if is_whole(text) else Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"--keep {text!r}: {allowed}") from error
    if isinstance(value, Fraction):
        value = math.ceil(value * patches) if 0 < value <= 1 else 0
    if not 1 <= value <= patches:
        raise UsageError(f"--keep {text}: {allowed}")
    return value
