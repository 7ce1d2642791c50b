"""Write pictures of the Open Clip Art Library as labelled shards, and train a small ViT on them.

    apt-get install openclipart-png
    python -m pipelines.clipart OUT [--clipart FOLDER]

    OUT/pictures/{train,test}/CLASS/NAME.png   on white, 64 x 64
    OUT/data/{train,test}-000000.tar ...       the same, packed as `featcache pack` does,
                                               with labels
    OUT/teacher.safetensors, teacher.json      a timm ViT trained on the training part
                                               (pipelines.small_teacher); its accuracy

Debian's package holds some 6,900 drawings in the public domain, in folders by subject; nine of
these folders are the classes, and each has as many pictures as any other. Drawings come in variants
(apple_01, apple_bw, apple_ganson), which begin with one word. Such a word is of the training or of
the test part, in all classes alike; it gives a class CAP pictures at most, so that playing cards
fill none. Links stand for a drawing that lies in another folder, and are passed over; so are
pictures that nearly are one of the other part, or of another class.

C classes, S pixels a side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from featcache import rng
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.errors import UserError, counted
from featcache.pictures.decode import opened
from featcache.pictures.regular_file import read_file
from featcache.pictures.source import PictureError
from pipelines import small_teacher
from pipelines.small_teacher import SmallTeacher

ROOT = Path("/usr/share/openclipart/png")
# Subject of a class: its folder. Not `shapes`, where 1,377 of 1,582 are stars of one program.
CLASSES = {
    "animals": "animals",
    "computer": "computer",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "office": "office",
    "people": "people",
    "recreation": "recreation",
    "tools": "tools",
    "transportation": "transportation",
}
TRAIN, TEST = 66, 22  # pictures of a class
CAP = 6  # pictures of a class that begin with one word
PX = 64
SHARD_SIZE = 512
# Correlation of 16 x 16 grey thumbnails above which two pictures are the same drawing, whatever its
# colours and the width of its lines.
ALIKE = 0.95
LARGEST_PX = 4_000_000  # of a drawing; a few maps have forty times as many
BLANK = 2.0  # standard deviation of a thumbnail's levels, below which it shows nothing
# Drawings are recognised from half their area, and mirrored ones are the same; flags are the
# exception that costs little.
CROPS: dict[str, Any] = {"size": PX, "scale": (0.5, 1.0), "flip": 0.5}
OPTIONS: dict[str, Any] = {
    "img_size": PX,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
TEACHER = SmallTeacher("vit_small_patch16_224", OPTIONS, len(CLASSES), CROPS)
SPEC = TEACHER.spec
Found = Mapping[str, Mapping[str, Sequence[Path]]]  # class -> word -> files


def first_word(name: str) -> str:
    """Return what variants of a drawing begin with.

    >>> [first_word(name) for name in ("apple_bw", "bus2_jarno_01", "2_dead_frogs", "3")]
    ['apple', 'bus', 'dead', '3']
    """
    words = re.findall(r"[^\W\d_]+", name.lower())
    return words[0] if words else name


def find(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of each class by their first word, in order. Raises UserError where a folder
    is missing."""
    found: dict[str, dict[str, list[Path]]] = {}
    for name, folder in CLASSES.items():
        if not (root / folder).is_dir():
            raise UserError(
                f"no clip art at {str(root)!r}: it has no folder {folder}; `apt-get install "
                "openclipart-png` puts it at "
                + f"{str(ROOT)!r}, --clipart FOLDER takes another place"
            )
        files = sorted((root / folder).rglob("*.png"))
        words: dict[str, list[Path]] = {}
        for path in (path for path in files if path.is_file() and not path.is_symlink()):
            words.setdefault(first_word(path.stem), []).append(path)
        found[name] = words
    return found


def choose_test_words(found: Found, seed: int) -> set[str]:
    """Draw the words of the test part: the same in all classes, and a fourth more pictures of each
    class than are needed, since some will be passed over."""
    test: set[str] = set()
    train: set[str] = set()
    for name, words in found.items():
        have = sum(min(CAP, len(words[word])) for word in words if word in test)
        for word in _shuffled(sorted(set(words) - test - train), f"words of {name}", seed):
            if have < 1.25 * TEST:
                test.add(word)
                have += min(CAP, len(words[word]))
            else:
                train.add(word)
    return test


def _shuffled(items: Sequence[Any], what: str, seed: int) -> list[Any]:
    """In an order drawn by what they are and the seed."""
    salt = int(rng.stream(what, seed)) % 2**62
    return [items[row] for row in rng.permutation(len(items), salt, 0)]


@dataclass
class Chosen:
    """Collect pictures that differ from all that were chosen for the other part or another
    class."""

    thumbnails: list[npt.NDArray[np.float32]] = field(default_factory=list)  # mean 0, length 1
    groups: list[tuple[str, str]] = field(default_factory=list)  # part, class

    def accepts(self, picture: Image.Image, part: str, name: str) -> bool:
        """Keep a picture's thumbnail unless it is blank, or nearly one of another group."""
        small = picture.convert("L").resize((16, 16), Image.Resampling.BOX)
        levels = np.asarray(small, np.float32).ravel()
        others = [i for i, group in enumerate(self.groups) if group != (part, name)]
        if levels.std() < BLANK:
            return False
        unit = (levels - levels.mean()) / np.float32(levels.std() * len(levels) ** 0.5)
        if others and (np.stack([self.thumbnails[i] for i in others]) @ unit).max() > ALIKE:
            return False
        self.thumbnails.append(unit)
        self.groups.append((part, name))
        return True


def write_pictures(root: Path, out: Path, seed: int) -> None:
    """Write OUT/train and OUT/test as class folders of PNGs. Raises UserError where a class has
    too few pictures."""
    found = find(root)
    test_words, chosen = choose_test_words(found, seed), Chosen()
    for part, wanted in (("test", TEST), ("train", TRAIN)):
        for name, words in found.items():
            own = {w: files for w, files in words.items() if (w in test_words) == (part == "test")}
            count = 0
            for path in _files(own, f"files of {name}", seed):
                picture = on_white(path)
                if picture and chosen.accepts(picture, part, name):
                    (out / part / name).mkdir(parents=True, exist_ok=True)
                    picture.save(out / part / name / f"{count:03d}-{path.stem}.png")
                    count += 1
                if count == wanted:
                    break
            if count < wanted:
                raise UserError(
                    f"too little clip art in {str(root / CLASSES[name])!r}: "
                    f"{counted(count, 'picture')} for "
                    f"the {part} part, {wanted} are needed; give the whole library with --clipart"
                )


def _files(words: Mapping[str, Sequence[Path]], what: str, seed: int) -> Iterator[Path]:
    """One file of each word, then a second of each, and so on, up to CAP."""
    order = _shuffled(sorted(words), what, seed)
    drawn = {word: _shuffled(words[word], f"{what}, {word}", seed)[:CAP] for word in order}
    for turn in range(CAP):
        yield from (drawn[word][turn] for word in order if turn < len(drawn[word]))


def on_white(path: Path) -> Image.Image | None:
    """Read a drawing, whatever its mode, as (S, S) RGB: on white, cut to what is drawn, in the
    middle. None where nothing is, or where it has more than LARGEST_PX. Raises UserError for a file
    that cannot be read."""
    try:
        with opened(read_file(path)) as found:
            if found.width * found.height > LARGEST_PX:
                return None
            drawing = found.convert("RGBA")
    except PictureError as error:
        raise UserError(f"clip art {str(path)!r}: {error}; take the file away") from error
    sheet = Image.new("RGBA", drawing.size, "white")
    sheet.alpha_composite(drawing)
    whole = sheet.convert("RGB")
    box = ImageChops.difference(whole, Image.new("RGB", whole.size, "white")).getbbox()
    if box is None:
        return None
    drawn = whole.crop(box)
    width, height = (max(1, round(side * PX / max(drawn.size))) for side in drawn.size)
    picture = Image.new("RGB", (PX, PX), "white")
    small = drawn.resize((width, height), Image.Resampling.LANCZOS)
    picture.paste(small, ((PX - width) // 2, (PX - height) // 2))
    return picture


@click.command(
    cls=Command,
    epilog="Examples:\n"
    "  python -m pipelines.clipart clipart\n"
    "  python -m pipelines.clipart clipart-1 --seed 1 --clipart tree/usr/share/openclipart/png",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("out", type=LocalPath())
@option(
    "--seed",
    group=HelpGroup.TRAINING,
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the choice, the split and the teacher.",
)
@option(
    "--epochs",
    group=HelpGroup.TRAINING,
    type=click.IntRange(2),
    default=60,
    show_default=True,
    help="Of the teacher's training.",
)
@option(
    "--clipart",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    default=ROOT,
    show_default=True,
    help="Where the package openclipart-png lies.",
)
def cli(out: Path, seed: int, epochs: int, clipart: Path) -> None:
    """Write clip art to OUT/data as labelled shards and train OUT/teacher.safetensors on the
    training part.
    """
    small_teacher.use_threads()
    write_pictures(clipart, out / "pictures", seed)
    small_teacher.pack_parts(out, SHARD_SIZE, seed)
    small_teacher.train_from_shards(TEACHER, out, what="drawings", seed=seed, epochs=epochs)


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
