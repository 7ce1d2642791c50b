"""The pictures and labels among a tar's members are chosen, by webdataset's rule of samples.

    n01/a.jpg  n01/a.cls          one sample, whose key n01/a ends at the first dot of the file name
    a.image.jpg  a.cls            no plain picture, and one whose suffix has a dot: key a.image
    photo 2.0.png                 the same: key photo 2.0

Beside a plain picture, others of its sample are counted and passed over; so are several without a
plain one. `#image-member=seg.png` after the tars' path chooses the member KEY.seg.png instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from featcache.pictures.passed_over import (
    BESIDE_PLAIN,
    HIDDEN,
    NOT_CHOSEN,
    OTHER_SUFFIX,
    SEVERAL,
    Tally,
    is_companion,
    is_hidden,
)
from featcache.pictures.source import SUFFIXES
from featcache.pictures.tar_index import Member


class Chosen(NamedTuple):
    """The pictures of a tar, by key and in its order, and the labels of keys."""

    pictures: list[tuple[str, Member]]
    labels: dict[str, Member]


@dataclass
class _Sample:
    """The members under one key of webdataset's."""

    plain: bool = False
    dotted: list[int] = field(default_factory=list)  # indices of members


def choose_member(members: list[Member], suffix: str, tally: Tally) -> Chosen:
    """Choose the member KEY.SUFFIX of each sample as its picture; samples without one go to
    `tally`."""
    wanted = suffix.removeprefix(".").lower()
    pictures: list[tuple[str, Member]] = []
    labels: dict[str, Member] = {}
    others: dict[str, str] = {}
    for member in members:
        key, own = split_name(member.name)
        if own.lower() == wanted and not _is_hidden(member.name):
            pictures.append((key, member))
        elif own == "cls":
            labels[key] = member
        elif f".{own.rpartition('.')[2].lower()}" in SUFFIXES:
            others.setdefault(key, member.name)
    for key in others.keys() - {key for key, _ in pictures}:
        tally.add(NOT_CHOSEN, others[key])
    return Chosen(pictures, labels)


def choose_pictures(members: list[Member], tally: Tally) -> Chosen:
    """Choose at most one picture a sample; what is passed over goes to `tally`."""
    samples: dict[str, _Sample] = {}
    found: list[tuple[int, str, Member]] = []  # index, key, picture
    labels: dict[str, Member] = {}
    others: list[tuple[str, str]] = []
    for index, member in enumerate(members):
        key, suffix = split_name(member.name)
        last = suffix.rpartition(".")[2]
        if f".{last.lower()}" in SUFFIXES:
            if _is_hidden(member.name):
                tally.add(HIDDEN, member.name)
            elif suffix == last:
                samples.setdefault(key, _Sample()).plain = True
                found.append((index, key, member))
            else:
                samples.setdefault(key, _Sample()).dotted.append(index)
        elif last == "cls":
            labels[key if suffix == last else whole_key(member.name)] = member
        else:
            others.append((key, member.name))
    for key, sample in samples.items():
        if sample.dotted:
            found += _choose_dotted(key, sample, members, labels, tally)
    _count_others(others, samples, tally)
    return Chosen([(key, member) for _, key, member in sorted(found)], labels)


def _choose_dotted(
    key: str, sample: _Sample, members: list[Member], labels: dict[str, Member], tally: Tally
) -> Iterable[tuple[int, str, Member]]:
    """Yield the one picture of a sample that has no plain one, under its own key and with the
    sample's label."""
    if sample.plain or len(sample.dotted) > 1:
        for index in sample.dotted:
            tally.add(BESIDE_PLAIN if sample.plain else SEVERAL, members[index].name)
        return
    (index,) = sample.dotted
    own = whole_key(members[index].name)
    if own not in labels and key in labels:
        labels[own] = labels[key]
    yield index, own, members[index]


def _count_others(others: list[tuple[str, str]], samples: dict[str, _Sample], tally: Tally) -> None:
    """Count members with other suffixes, where their sample holds no picture."""
    for key, name in others:
        if key not in samples and not is_companion(name) and not _is_hidden(name):
            tally.add(OTHER_SUFFIX, name)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and the suffix, which may have dots.

    >>> split_name("./n01/a.image.jpg"), split_name("v1.0/b")
    (('n01/a', 'image.jpg'), ('v1.0/b', ''))
    """
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return unescape(f"{folder}/{stem}" if folder else stem), suffix


def whole_key(name: str) -> str:
    """Return a member's name less its last suffix.

    >>> whole_key("./n01/photo 2.0.png")
    'n01/photo 2.0'
    """
    return unescape(name.removeprefix("./").rpartition(".")[0])


def _is_hidden(name: str) -> bool:
    return any(map(is_hidden, name.split("/")))


def escape(key: str) -> str:
    """Return a key as a tar member's stem: dots of the file name would end the key for webdataset,
    so they are %2E there."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def unescape(stem: str) -> str:
    """Return the key of a tar member's stem.

    >>> unescape(escape("n01/a.b")), escape("n01/a.b")
    ('n01/a.b', 'n01/a%2Eb')
    """
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.replace("%2E", ".").replace("%25", "%")
