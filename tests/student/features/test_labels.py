"""Labels of two sets are matched by the names of classes, and refused where a number may mean two
things."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from featcache.errors import UserError
from student.features.labels import (
    class_count,
    labels_as,
    labels_of,
    match_notes,
    split_holdout,
)


@dataclass
class Labelled:
    """A source of which only keys and labels are looked at."""

    given: list[int]
    classes: list[str] | None = None
    spec: str = "set"

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.array(self.given, np.int64)

    @property
    def keys(self) -> list[str]:
        return [f"k{i}" for i in range(len(self.given))]

    def __len__(self) -> int:
        return len(self.given)

    def read(self, index: int) -> bytes:
        raise AssertionError(index)


def test_named_classes_are_matched_whatever_their_order() -> None:
    train = Labelled([0, 1, 2], ["ant", "bee", "猫"])
    assert labels_as(Labelled([0, 1, 1], ["猫", "ant"]), train).tolist() == [2, 0, 0]
    assert match_notes(Labelled([0, 1, 1], ["猫", "ant"]), train) == []


def test_a_named_class_without_pictures_needs_no_match() -> None:
    test = Labelled([1, 1], ["wasp", "bee"])
    assert labels_as(test, Labelled([0, 1], ["ant", "bee"])).tolist() == [1, 1]


def test_numbers_without_names_match_the_same_numbers() -> None:
    """Gaps and large numbers are no classes and cost no memory."""
    train, test = Labelled([3, 10**17, 3, 40]), Labelled([40, 3, 10**17, 40])
    assert class_count(train) == 3
    assert labels_of(train).tolist() == [0, 2, 0, 1]
    assert labels_as(test, train).tolist() == [1, 0, 2, 1]
    assert match_notes(test, train) == [
        "classes are matched by number: one of the sets has no names for them"
    ]


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (Labelled([0, 1]), Labelled([0, 1, 2])),  # fewer classes: their numbers may have shifted
        (Labelled([0, 1, 2]), Labelled([0, 1])),
        (Labelled([0, 1, 3]), Labelled([0, 1, 2])),
        (Labelled([0, 1]), Labelled([0, 1, 2], ["ant", "bee", "cat"])),
        (Labelled([0, 1], ["bee", "cat"]), Labelled([0, 1, 2])),
    ],
)
def test_other_numbers_without_names_are_refused(test: Labelled, train: Labelled) -> None:
    test.spec, train.spec = "TEST", "TRAIN"
    with pytest.raises(UserError, match=r"cannot score TEST: .* a number may mean two things"):
        labels_as(test, train)


def test_one_set_without_names_is_matched_by_number_where_all_numbers_are_used() -> None:
    train = Labelled([0, 1, 2], ["ant", "bee", "cat"])
    assert labels_as(Labelled([2, 1, 0]), train).tolist() == [2, 1, 0]
    assert len(match_notes(Labelled([2, 1, 0]), train)) == 1


def test_test_pictures_of_a_class_without_training_pictures_are_counted() -> None:
    train = Labelled([0, 1, 0], ["ant", "bee", "cat", "dog"])
    test = Labelled([2, 1, 0, 2, 3], ["ant", "bee", "cat", "dog"])
    assert match_notes(test, train) == [
        "3 of 5 test pictures count as wrong, since no training picture is of their class (2 "
        "classes, the first is 'cat')"
    ]


def test_unknown_classes_of_test_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="the first is 'yak'"):
        labels_as(Labelled([0], ["yak"]), Labelled([0, 1], ["ant", "bee"]))


def test_more_classes_than_scores_have_room_for_are_refused() -> None:
    """A label of its own for every picture is none."""
    with pytest.raises(UserError, match="its labels are of 131073 classes, 131072 at most"):
        class_count(Labelled(list(range((1 << 17) + 1))))


def test_both_parts_of_a_split_keep_the_numbers_of_the_whole() -> None:
    """A rare class may lie in one part alone, and its number still means the same."""
    source = Labelled([i % 3 * 5 for i in range(39)] + [99])
    for seed in range(4):
        train, test = split_holdout(source, seed=seed)
        assert class_count(train) == class_count(test) == 4
        assert labels_as(test, train).tolist() == [
            [0, 5, 10, 99].index(source.given[row]) for row in test.rows
        ]
        rare = "k39" in test.keys
        assert match_notes(test, train) == (
            [
                f"1 of {len(test)} test pictures count as wrong, since no training picture is of "
                "their class (1 class, the first is 99)"
            ]
            if rare
            else []
        )
