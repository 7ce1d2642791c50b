"""Sets of labelled pictures: several to test on, subsets and maps of classes, few pictures a
class."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from student.features.labelled import SetOptions, Sets, open_sets
from student.features.labels import low_shot


def pictures(folder: Path, classes: dict[str, int]) -> Path:
    """`classes` names how many pictures of each there are."""
    out = io.BytesIO()
    Image.new("RGB", (6, 6)).save(out, "png")
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(out.getvalue())
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return pictures(tmp_path / "train", {"cat": 6, "dog": 4, "owl": 5, "pug": 3})


def opened(train: Path, *tests: str, **options: Any) -> Sets:
    return open_sets(SetOptions(str(train), tests, **options))


# --- few pictures a class -------------------------------------------------------------------------


def test_low_shot_by_literal_lists(train: Path) -> None:
    """The smallest words of (key, seed), by hashlib's BLAKE2b and numpy's Philox, are these."""
    source = open_source(train)

    def keys(**options: Any) -> list[str]:
        return list(low_shot(source, **options).keys)

    one = keys(shots=1, seed=0)
    two = keys(shots=2, seed=0)
    assert one == LOW_SHOT[1]
    assert two == LOW_SHOT[2]
    assert set(one) < set(two)
    assert keys(shots=1, seed=1) != one
    # a third of 6, 4, 5 and 3, rounded
    assert [key.split("/")[0] for key in keys(fraction=1 / 3)] == [
        "cat", "cat", "dog", "owl", "owl", "pug",
    ]  # fmt: skip
    assert len(keys(fraction=0.01)) == 4  # one at least
    assert set(keys(fraction=1.0)) == set(source.keys)


LOW_SHOT = {
    1: ["cat/1", "dog/0", "owl/1", "pug/1"],
    2: ["cat/1", "cat/3", "dog/0", "dog/2", "owl/1", "owl/4", "pug/1", "pug/2"],
}


def test_other_pictures_change_no_shot(train: Path, tmp_path: Path) -> None:
    more = pictures(tmp_path / "more", {"ant": 9, "cat": 6, "dog": 4, "owl": 5, "pug": 3})
    few = [
        key
        for key in low_shot(open_source(more), shots=2, seed=0).keys
        if not key.startswith("ant")
    ]
    assert few == list(low_shot(open_source(train), shots=2, seed=0).keys)


def test_too_many_shots_are_refused(train: Path) -> None:
    with pytest.raises(UserError, match=r"cannot take 4 pictures of each class .* 3 of 'pug'"):
        low_shot(open_source(train), shots=4)
    with pytest.raises(UsageError, match="--shots and --fraction: one of them"):
        opened(train, shots=1, fraction=0.5)


def test_few_pictures_are_taken_of_those_not_held_out(train: Path) -> None:
    sets = opened(train, shots=1)
    assert len(sets.train) == 4
    assert not set(sets.train.source.keys) & set(sets.tests[0].source.keys)
    assert "held out" in sets.notes[0]


# --- several test sets ----------------------------------------------------------------------------


def test_sets_have_the_names_that_were_given(train: Path, tmp_path: Path) -> None:
    a, b = (pictures(tmp_path / name, {"cat": 1, "owl": 2}) for name in ("a", "b=c"))
    assert [test.name for test in opened(train, str(a)).tests] == ["test"]
    assert [test.name for test in opened(train, str(a), str(b)).tests] == ["a", "b=c"]
    sets = opened(train, f"val={a}", f"ood={b}")
    assert [test.name for test in sets.tests] == ["val", "ood"]
    assert sets.names == ["cat", "dog", "owl", "pug"]
    assert [test.labels.tolist() for test in sets.tests] == [[0, 2, 2]] * 2
    with pytest.raises(UsageError, match="two test sets are called val; give each a name"):
        opened(train, f"val={a}", f"val={b}")


def test_a_subset_is_what_the_set_has_or_a_file_says(train: Path, tmp_path: Path) -> None:
    a = pictures(tmp_path / "a", {"cat": 1, "owl": 2})
    listed = tmp_path / "classes.txt"
    listed.write_text("owl\n\npug\ncat\n")

    def chosen(text: str) -> list[int]:
        classes = opened(train, f"a={a}", subsets=[text]).tests[0].classes
        assert classes is not None
        return classes.tolist()

    assert chosen("a") == [0, 2]
    assert chosen(f"a={listed}") == [0, 2, 3]
    assert opened(train, f"a={a}").tests[0].classes is None
    listed.write_text("owl\n")
    with pytest.raises(UserError, match="test pictures are of 'cat', which is not in the file"):
        chosen(f"a={listed}")
    listed.write_text("owll\n")
    with pytest.raises(UserError, match=r"'owll' is no training class \(did you mean owl"):
        chosen(f"a={listed}")
    with pytest.raises(UsageError, match=r"--subset b: 'b' is no test set"):
        chosen("b")
    with pytest.raises(UserError, match="cannot be read as text"):
        chosen(f"a={tmp_path}")


def test_classes_are_mapped_by_a_json_object(train: Path, tmp_path: Path) -> None:
    kinds = pictures(tmp_path / "kinds", {"bird": 2, "mammal": 1})
    path = tmp_path / "map.json"

    def mapped(value: object) -> Any:
        path.write_text(json.dumps(value))
        return opened(train, f"k={kinds}", maps=[f"k={path}"]).tests[0]

    test = mapped({"cat": "mammal", "dog": "mammal", "owl": "bird", "pug": None})
    assert test.mapping.tolist() == [1, 1, 0, -1]
    assert test.labels.tolist() == [0, 0, 1]
    assert list(test.names) == ["bird", "mammal"]
    for value, message in (
        ({"cow": "mammal"}, "'cow' is no training class"),
        ({"cat": "fish"}, "'fish' is no class of"),
        ({"cat": 3}, "3 is no class of"),
        ({"cat": ["mammal"]}, "is no class of"),
        ({"cat": None}, "it maps no class"),
        ([], "it holds a list, no object"),
    ):
        with pytest.raises(UserError, match=message):
            mapped(value)
    with pytest.raises(UsageError, match="a file is needed"):
        opened(train, f"k={kinds}", maps=["k"])
    with pytest.raises(UsageError, match=r"both given for the test set k: .*leave --subset out"):
        opened(train, f"k={kinds}", maps=[f"k={path}"], subsets=["k"])


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    only = pictures(tmp_path / "only", {"cat": 3})
    with pytest.raises(UserError, match="its 3 pictures are of one class, two at least"):
        opened(only)


def test_a_test_class_that_is_not_in_train_is_refused(train: Path, tmp_path: Path) -> None:
    test = pictures(tmp_path / "t", {"cow": 1, "cat": 1})
    with pytest.raises(UserError, match="1 of its classes have no training pictures"):
        opened(train, str(test))


def test_unlabelled_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat/a.png")
    with pytest.raises(UserError, match="no labels; labels are class folders"):
        opened(tmp_path / "flat")


def test_labels_of_a_subset_are_numbers_of_the_whole(train: Path, tmp_path: Path) -> None:
    test = pictures(tmp_path / "t", {"owl": 1, "pug": 1})
    sets = opened(train, str(test), shots=1)
    assert sets.train.labels.tolist() == [0, 1, 2, 3]
    assert sets.tests[0].labels.tolist() == [2, 3]
    assert isinstance(sets.train.labels, np.ndarray)
