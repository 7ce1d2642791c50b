"""Every recipe is one graph: `student train --compile` breaks it nowhere and compiles it once.

There is no exception, so none is listed: each model is compiled with `fullgraph=True`, where a
break is an error that names the line, and a second compilation is an error too. FSDP alone breaks
graphs, at the hooks of each block it shards, which PyTorch keeps out of them.

The backend is `aot_eager`: it traces forward and backward as the real one does, and runs PyTorch's
own kernels, so that nothing is compiled by C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._dynamo.utils import counters

from student import recipes
from student.models import drop_path
from student.training.train_state import RunOptions, TrainState, build_train_state
from tests import processes
from tests import student_fixtures as fx
from tests.student.recipes.test_recipes import tiny_batch, tiny_model, wave

CONV = ("family=conv_vit", "encoder=tiny,stage1=8,stage2=12,embed_dim=16,depth=2,num_heads=2")
# Of each recipe its defaults, and whatever takes another way through forward.
FIRST: list[tuple[str, ...]] = [
    *((name,) for name in recipes.names()),
    ("maskalign", "alignment=adapt_then_mix", "target_norm=bn", "cls_loss=false"),
    ("mrmae", *CONV, "conv_cls=true"),
    ("milan", "decoder=mae"),
]
OTHERS: list[tuple[str, ...]] = [
    ("maskalign", "alignment=layer_wise"),
    ("maskalign", "alignment=layer_wise", "level_weights=last", "align_levels=2"),
    ("maskalign", "mix_start=even"),
    *(("maskalign", f"adaptor={kind}") for kind in ("norm_linear", "mlp", "mlp2")),
    *(("maskalign", f"target_norm={kind}") for kind in ("l2", "bn", "none")),
    *(("maskalign", f"loss={kind}") for kind in ("l2", "l1")),
    ("mae", "norm_pix=false"),
    ("milan", "prompts=raw"),
    ("milan", "cls_loss=false"),
    *(("milan", "target=pixels", f"decoder={kind}") for kind in ("prompting", "mae")),
    ("kd", "target=f", "teacher_width=10"),
    ("caev2", "align=masked"),
    ("caev2", "align=visible", "regressor_depth=0"),
    *(("caev2", f"loss={kind}") for kind in ("smooth_l1", "mse")),
    ("caev2", "reduction=paper"),
    ("caev2", "head=linear_norm", "regressor_width=24"),
    ("cae", "align_weight=0"),
    ("cae", "target=z", "teacher_out=10"),
    ("cae", "target=pixels"),
    ("cae", "align_drop_path=false"),
    ("cae", "decoder_depth=0", "regressor_width=24"),
    ("mrmae", "mimic_weight=0"),
    ("mrmae", "pixel_weight=0"),
    ("mrmae", "mimic_at=decoder"),
    ("mrmae", "fuse=last"),
    ("mrmae", "joint=dino-b16", "joint_width=6"),
    ("mrmae", "reduction=sum"),
    ("mrmae", "target=h", "teacher_width=12"),
    ("mrmae", *CONV),
    ("mrmae", *CONV, "fuse=last"),
]
each = pytest.mark.parametrize("case", FIRST, ids=" ".join)
each_other = pytest.mark.parametrize("case", OTHERS, ids=" ".join)
BACKEND = "aot_eager"
# One block less than the tiny models have, which saves a third of the time.
SMALLER = {
    name: (f"encoder={encoder},embed_dim=16,depth=2,num_heads=2",)
    for encoder, names in (
        ("tiny", ("cae", "caev2", "fd", "mvp")),
        ("vit_tiny_patch16_224", ("kd", "mae", "maskalign", "milan", "mralign", "mrmae")),
    )
    for name in names
}


@pytest.fixture(autouse=True)
def _compiled_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    whole = partialmethod(nn.Module.compile, backend=BACKEND, fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", whole)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def batch_of(name: str, settings: Any, step: int, rates: tuple[float, ...]) -> dict[str, Tensor]:
    """Make the batch of a step: its own pictures, masks and draws, in the trainer's types."""
    spec, draw = recipes.load(name).needs(settings), np.random.default_rng(step)
    levels = max(1, len(spec.levels))
    batch = tiny_batch(levels)
    order = np.stack([draw.permutation(16) for _ in range(2)])
    ids = {"ids_keep": np.sort(order[:, :4]), "ids_masked": np.sort(order[:, 4:])}
    batch |= {key: torch.from_numpy(value) for key, value in ids.items()}
    batch["images"] = torch.from_numpy(draw.standard_normal((2, 3, 16, 16)))
    if "feature_stats" in spec.fields:
        batch["feature_stats"] = wave(2, levels, 17, 2, phase=0.2) + 2
    if spec.moments:
        batch["moments"] = wave(levels, 2, phase=0.4) + 2
    if not spec.derive:
        del batch["targets"]
    batch[drop_path.ENTRY] = torch.from_numpy(drop_path.draw(rates, 0, step, np.arange(2)))
    return {key: x.float() if x.is_floating_point() else x for key, x in batch.items()}


def state_of(case: tuple[str, ...], precision: str, **options: bool) -> tuple[TrainState, Any]:
    """Build a recipe's model as the trainer does, with drop path, and its settings."""
    fx.fresh_state()
    name, *sets = case
    whole = "alignment=layer_wise" in sets  # which pairs all blocks with the teacher's
    model, settings = tiny_model(name, "drop_path=0.5", *() if whole else SMALLER[name], *sets)
    optimizer = torch.optim.SGD(model.float().parameters(), lr=0.1)
    acc = Accelerator(cpu=True, mixed_precision=precision)
    state = build_train_state(acc, model, optimizer, RunOptions(**options), Path("none"), None)
    return state, settings


def three_steps(
    case: tuple[str, ...], precision: str = "no", **options: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the losses of three steps, each at another learning rate, and the gradients of all,
    one behind the other."""
    state, settings = state_of(case, precision, **options)
    losses, gradients = [], []
    for step in range(3):
        batch = batch_of(case[0], settings, step, state.drop_rates)
        state.optimizer.param_groups[0]["lr"] = 0.01 * (1 + step)
        with state.acc.autocast():
            loss = state.model(batch)["loss"]
        state.acc.backward(loss)
        losses.append(loss.detach())
        gradients += [p.grad.flatten() for p in state.module.parameters() if p.grad is not None]
        assert state.update(loss, step)
    return losses, torch.cat(gradients)


def check_case(case: tuple[str, ...]) -> None:
    losses, gradients = three_steps(case)
    assert not counters["stats"]
    compiled_losses, compiled_gradients = three_steps(case, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled_losses, losses, rtol=4e-6, atol=0)
    difference = (compiled_gradients - gradients).norm() / gradients.norm()
    assert difference < 4e-6


def check_case_in_bf16(case: tuple[str, ...]) -> None:
    losses, _ = three_steps(case, "bf16", checkpoint_activations=True)
    compiled, _ = three_steps(case, "bf16", checkpoint_activations=True, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled, losses, rtol=1e-2, atol=0)


@pytest.mark.slow
@each
def test_one_graph_that_equals_the_plain_model(case: tuple[str, ...]) -> None:
    check_case(case)


@pytest.mark.slow
@each
def test_one_graph_of_checkpointed_blocks_in_bf16(case: tuple[str, ...]) -> None:
    check_case_in_bf16(case)


@pytest.mark.slow
@each_other
def test_one_graph_whatever_the_settings(
    case: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward alone is traced, where graphs break: backward is that of the cases above."""
    whole = partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", whole)
    check_case(case)
    torch._dynamo.reset()
    counters.clear()
    check_case_in_bf16(case)


@pytest.mark.slow
def test_a_break_and_a_second_compilation_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would see them."""
    from student.recipes import mae

    plain = mae.Model.forward

    def breaks(self: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        torch._dynamo.graph_break()
        return plain(self, batch)

    def counts(self: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        return plain(self, batch)

    monkeypatch.setattr(mae.Model, "forward", breaks)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        three_steps(("mae",), compiled=True)
    monkeypatch.setattr(mae.Model, "forward", counts)
    with pytest.raises(torch._dynamo.exc.RecompileError, match="calls"):
        three_steps(("mae",), compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.names())
def test_a_whole_run_compiles_once(recipe: str, tmp_path: Path) -> None:
    """Three epochs of the command's own batches, each step of two micro-batches."""
    options = ("--cache", fx.cache_of(recipe), "--images", fx.pictures(), "--steps", "8")
    options += ("--batch-size", "4", "--accumulate", "2", "--ema", "0.9", "--precision", "bf16")
    sets = ("drop_path=0.3", "clip_grad=1")
    fx.good(fx.train(recipe, tmp_path / "plain", *options, sets=sets))
    fx.good(fx.train(recipe, tmp_path / "compiled", *options, "--compile", sets=sets))
    assert counters["stats"]["unique_graphs"] == 1
    one, two = (fx.losses(tmp_path / name) for name in ("plain", "compiled"))
    assert two == pytest.approx(one, rel=2e-2)


@pytest.mark.slow
def test_inductor_equals_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of `--compile`, with kernels of its own, here of convolutions; a whole run of a
    plain ViT is compiled by it in test_train_state.py. Needs a C++ compiler."""
    case = ("mrmae", *CONV, CONV[1].replace("depth=2", "depth=1"), "decoder_depth=1")
    losses, gradients = three_steps(case)
    whole = partialmethod(nn.Module.compile, backend="inductor")
    monkeypatch.setattr(nn.Module, "compile", whole)
    compiled_losses, compiled_gradients = three_steps(case, compiled=True)
    torch.testing.assert_close(compiled_losses, losses, rtol=4e-6, atol=0)
    assert 0 < (compiled_gradients - gradients).norm() / gradients.norm() < 1e-5


# --- several processes ----------------------------------------------------------------------------

# DDP's buckets made small enough that the graph is cut at several of them, as PyTorch does for
# their sake.
CUT = """
import torch
from torch import nn
from torch._dynamo.backends import distributed
from torch.nn.parallel import DistributedDataParallel

plain_compile, plain_init = nn.Module.compile, DistributedDataParallel.__init__
nn.Module.compile = lambda self: plain_compile(self, backend="aot_eager", fullgraph=True)
torch._dynamo.config.error_on_recompile = True
torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 20_000
def small_buckets(self, *args, **given):
    plain_init(self, *args, **{**given, "bucket_cap_mb": 0.05})
DistributedDataParallel.__init__ = small_buckets
distributed.pretty_print_buckets = lambda buckets, cap: print("buckets:", len(buckets))
"""


@pytest.mark.slow
def test_two_processes_compile_the_pieces_between_buckets(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", 6, "--batch-size", 4)
    options += ("--checkpoint-activations",)
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        out = ("--out", tmp_path / name)
        ran = processes.train(2, *options, *out, *more, recipe="mralign", before=CUT)
        processes.good(ran)
    assert int(ran.said[0].partition("buckets: ")[2].split()[0]) > 3
    one, two = (fx.losses(tmp_path / name) for name in ("plain", "compiled"))
    assert two == pytest.approx(one, rel=1e-5)
