"""Classes are described by texts: their names in the sentences of templates.

C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.errors import UserError, near
from featcache.pictures.source import Source
from featcache.runtime import strict_json

TEMPLATES = ("openai", "simple")
IMAGENET = "imagenet"
_SYNSET = re.compile(r"n\d{8}")
_MOST_BYTES = 1 << 24


def class_texts(source: Source, names: Sequence[str], given: str) -> list[list[str]]:
    """Return the names (C) of every class as a person says them: those of its folder, `_` read as
    a space, or what `given` says, a JSON file of class -> name or list of names."""
    if given == IMAGENET:
        return _imagenet(names)
    if given:
        return _from_file(Path(given), names)
    if source.classes is None:
        raise UserError(
            f"the classes of {source.spec} are numbers without names; give them with --names FILE, "
            "a JSON object from number to name"
        )
    if all(_SYNSET.fullmatch(name) for name in names):
        raise UserError(
            f"the classes of {source.spec} are WordNet's numbers, such as {names[0]}, which say "
            f"nothing to a text tower; give --names {IMAGENET} for the 1,000 of ImageNet-1k, or "
            "--names FILE, a JSON object from class to name"
        )
    return [[name.replace("_", " ")] for name in names]


def _imagenet(names: Sequence[str]) -> list[list[str]]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    ends = (names[0], names[-1])
    synsets = all(_SYNSET.fullmatch(name) for name in names) and list(names) == sorted(names)
    if not synsets or len(names) != 1000 or ends != ("n01440764", "n15075141"):
        raise UserError(
            f"--names {IMAGENET} names the 1,000 classes of ImageNet-1k, n01440764 to n15075141; "
            f"there are {len(names)}, {names[0]!r:.80} to {names[-1]!r:.80}; give --names FILE"
        )
    return [[name] for name in IMAGENET_CLASSNAMES]


def _from_file(path: Path, names: Sequence[str]) -> list[list[str]]:
    try:
        given = strict_json.as_object(strict_json.read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--names {path}: {error}; a JSON object from class to name, or to a list of names, is "
            "needed"
        ) from error
    known = set(names)
    for name in given:
        if name not in known:
            raise UserError(f"--names {path}: {name!r:.80} is no class ({near(name, names)[:300]})")
    return [_names(path, name, given) for name in names]


def _names(path: Path, name: str, given: dict[str, Any]) -> list[str]:
    if name not in given:
        raise UserError(f"--names {path}: class {name!r:.80} is missing; add it")
    value = given[name]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"--names {path}: class {name!r:.80} is {value!r:.80}; a name, or a list of names, is "
            "needed"
        )
    return texts


def templates(given: str) -> list[str]:
    """Return templates with {} in the place of a name: open_clip's 80 or 7, or the lines of a
    file."""
    if given in TEMPLATES:
        from open_clip import zero_shot_metadata as metadata

        chosen: Any = {
            "openai": metadata.OPENAI_IMAGENET_TEMPLATES,
            "simple": metadata.SIMPLE_IMAGENET_TEMPLATES,
        }[given]
        return [template("{}") for template in chosen]
    try:
        text = strict_json.read_bytes(Path(given), _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--templates {given}: it is neither {' nor '.join(TEMPLATES)}, nor a text file "
            f"({error})"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if line.count("{}") != 1]
    if not lines or wrong:
        shown = f"{wrong[0]!r:.80} has not" if wrong else "it has none"
        raise UserError(
            f"--templates {given}: a sentence a line with one {{}} in the place of the name is "
            f"needed, {shown}; such as: a photo of a {{}}."
        )
    return lines


def sentences(names: Sequence[str], of: Sequence[str]) -> list[str]:
    """Put every name of a class into every template.

    >>> sentences(["cat", "tabby"], ["a {}.", "the {}."])
    ['a cat.', 'the cat.', 'a tabby.', 'the tabby.']
    """
    return [template.replace("{}", name) for name in names for template in of]
