"""This program made rows.json: the first three losses of rows of the papers' tables that are no
recipe's defaults, in float64.

    python -m tests.golden.make_rows > tests/golden/rows.json

Losses are those of the second implementations beside the tests, which share no code with the
recipes; AdamW is written out (`reference_losses`); weights and pictures are sines of their index.
A model of ours gives the names and shapes of its weights, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import Tensor

from tests.student.recipes import test_cae_targets, test_maskalign, test_mrmae
from tests.student.recipes.test_recipes import reference_losses, tiny_batch, tiny_model

Loss = Callable[[dict[str, Tensor]], Tensor]


def cae_loss(target: str) -> Loss:
    """Build CAE's loss with another target and twice the alignment, whose target moves with the
    weights."""

    def loss(w: dict[str, Tensor]) -> Tensor:
        constants = {name: x.detach() for name, x in w.items()}
        error, align = test_cae_targets.reference_target(w, tiny_batch(), constants, target)
        return error + 2 * align

    return loss


NARROW = tiny_model("mrmae", *test_mrmae.NARROW_HUGE)[1]
ROWS: dict[str, tuple[str, tuple[str, ...], Loss]] = {
    f"cae target={target}": ("cae", (f"target={target}", "teacher_out=10"), cae_loss(target))
    for target in ("z", "pixels")
}
ROWS["maskalign mid1"] = (
    "maskalign",
    test_maskalign.MID1,
    lambda w: test_maskalign.middle_loss(w, tiny_batch(1)),
)
ROWS["mrmae narrow huge"] = (
    "mrmae",
    tuple(test_mrmae.NARROW_HUGE),
    lambda w: test_mrmae.reference_loss(w, tiny_batch(), NARROW, (3,)),
)


if __name__ == "__main__":
    made = {
        row: reference_losses(name, loss, more=more) for row, (name, more, loss) in ROWS.items()
    }
    print(json.dumps(made, indent=1))
