"""The training state is the model, its optimizer and its average, as Accelerate prepares them; a
checkpoint holds it.

    Model -> (restored) -> average -> activation checkpointing -> compile
    -> Accelerate (DDP, FSDP, autocast, scaler)

A checkpoint is one file of whole tensors however the weights are sharded over processes, so a run
may go on with another number of processes, with FSDP or without. All processes build, step and save
together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as spread
from torch.distributed.tensor import DTensor, distribute_tensor

from featcache.runtime import device as devices
from student import checkpoint
from student.models import drop_path
from student.training import activation_checkpointing

StateDict = dict[str, Any]


@dataclass(frozen=True)
class RunOptions:
    """Say how a model is run and looked after, whatever the recipe."""

    ema: float | None = None  # decay of the average of the weights; None: no average
    compiled: bool = False
    checkpoint_activations: bool = False
    # steps without a finite loss that may be left out; None: the first one stops
    skip_nonfinite: int | None = None


@dataclass
class TrainState:
    """Holds all that changes in a run: `module` is the recipe's own model, `model` what is
    called."""

    acc: Accelerator
    module: nn.Module
    model: Any
    optimizer: Any
    run_options: RunOptions
    average: ModelEmaV3 | None = None
    skipped: int = 0  # steps that were not applied
    drop_rates: tuple[float, ...] = ()  # of the branches whose drop path comes with the batch
    _held: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        raw = getattr(self.optimizer, "optimizer", self.optimizer)
        on_gpu = devices.is_gpu(self.acc.device) and bool(raw.defaults.get("fused"))
        if (
            on_gpu
            and self.acc.scaler is None
            and self.run_options.skip_nonfinite is None
            and not sharded(self.acc)
        ):
            self._held = torch.zeros((), device=self.acc.device)

    def update(self, loss: Tensor, step: int) -> bool:
        """Make one step of the optimizer, unless the loss is not finite; return False where it is
        known that nothing was applied.

        On a GPU nothing waits for the loss: the fused kernel is told on the device to change
        nothing from the first loss that is not finite on, so that weights are still those that gave
        it when the host comes to look.
        """
        if self._held is not None:
            self._held = torch.maximum(self._held, (~loss.detach().isfinite()).float())
            self.optimizer.optimizer.found_inf = self._held
        elif not bool(loss.isfinite()):
            self._leave_out()
            return False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.module, step=step + 1)
        return True

    def _leave_out(self) -> None:
        self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        # its scale is not to blame; this forgets what it saw of these gradients
        if self.acc.scaler is not None:
            self.acc.scaler.update(self.acc.scaler.get_scale())

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, whole, in every process. Called by all processes together."""
        if not sharded(self.acc):
            return self.module.state_dict()
        options = spread.StateDictOptions(full_state_dict=True)
        return dict[str, Any](spread.get_model_state_dict(self.module, options=options))

    def state_dict(self) -> StateDict:
        """Return the content of a checkpoint, whole in the first process. Called by all processes
        together."""
        scaler = self.acc.scaler.state_dict() if self.acc.scaler is not None else {}
        if sharded(self.acc):
            options = spread.StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, optimizer = spread.get_state_dict(
                self.module, self.optimizer.optimizer, options=options
            )
            own: StateDict = {"model": model, "optimizer": _by_number(optimizer), "scaler": scaler}
        else:
            own = {
                "model": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler,
            }
        return {**own, **self._averaged(), "skipped": self.skipped}

    def _averaged(self) -> StateDict:
        """Return the average's part of a checkpoint, of whole tensors. Called by all processes
        together."""
        if self.average is None:
            return {}
        values = self.average.module.state_dict()
        if sharded(self.acc):  # one at a time, so that a GPU never holds all of it
            values = {name: whole(value).cpu() for name, value in values.items()}
        return {checkpoint.EMA: values}


def sharded(acc: Accelerator) -> bool:
    """Return whether each process holds a part of the weights (FSDP)."""
    return acc.distributed_type == DistributedType.FSDP


def whole(value: Tensor) -> Tensor:
    """Gather a tensor whose parts lie in several processes (FSDP); return any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def build_train_state(
    acc: Accelerator,
    module: nn.Module,
    optimizer: Any,
    run_options: RunOptions,
    run: Path,
    saved: StateDict | None,
) -> TrainState:
    """Prepare model and optimizer for this process, as they start or as a checkpoint left them."""
    if saved is not None:
        checkpoint.restore(run, saved, module, None if sharded(acc) else optimizer)
        saved = {**saved, "optimizer": checkpoint.optimizer_state(run, saved, optimizer)}
    drop_rates = drop_path.attach(module)
    average = None if run_options.ema is None else _average(module, run_options.ema, run, saved)
    if run_options.checkpoint_activations:
        activation_checkpointing.apply(module)
    if run_options.compiled:
        module.compile()
    model, optimizer = acc.prepare(module, optimizer)
    if average is not None and sharded(acc):
        _shard_average(average.module, module)
    if saved is not None:
        _restore_prepared(run, saved, acc, module, optimizer)
    model.train()
    skipped = int(saved.get("skipped", 0)) if saved is not None else 0
    return TrainState(acc, module, model, optimizer, run_options, average, skipped, drop_rates)


def _restore_prepared(
    run: Path, saved: StateDict, acc: Accelerator, module: nn.Module, optimizer: Any
) -> None:
    """Restore what takes its content only when Accelerate has prepared it: the optimizer under
    FSDP, and the scaler."""
    if sharded(acc):
        options = spread.StateDictOptions(full_state_dict=True)
        named = _by_name(saved["optimizer"], module, optimizer.optimizer)
        spread.set_optimizer_state_dict(module, optimizer.optimizer, named, options=options)
    if acc.scaler is not None and saved.get("scaler"):
        acc.scaler.load_state_dict(checkpoint.check_scaler(run, saved, acc.scaler.state_dict()))


def _average(module: nn.Module, decay: float, run: Path, saved: StateDict | None) -> ModelEmaV3:
    """Build timm's exponential moving average; its warm-up is a function of the step, so that a run
    resumes exactly."""
    average = ModelEmaV3(module, decay=decay, use_warmup=True)
    average.module.requires_grad_(False)
    if saved is not None:
        checkpoint.restore_ema(run, saved, average.module)
    return average


def _shard_average(average: nn.Module, module: nn.Module) -> None:
    """Keep of an average, which is whole in every process, the part of this process: that of the
    weights, so that both are averaged where they lie."""
    own = list(average.named_parameters())
    for (name, value), weight in zip(own, module.parameters(), strict=True):
        assert isinstance(weight, DTensor)  # FSDP leaves none whole
        part = distribute_tensor(value.data, weight.device_mesh, weight.placements)
        path, _, last = name.rpartition(".")
        setattr(average.get_submodule(path), last, nn.Parameter(part, requires_grad=False))


def _by_number(state: StateDict) -> StateDict:
    """Key an optimizer's state by numbers, as torch's own `state_dict` has it, not by names."""
    names = [name for group in state.get("param_groups", []) for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in state.get("param_groups", [])
    ]
    return {
        "state": {number[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": groups,
    }


def _by_name(state: StateDict, module: nn.Module, optimizer: torch.optim.Optimizer) -> StateDict:
    """Key an optimizer's state by the names of this model's parameters: `_by_number` reversed."""
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [
        known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]
    ]
    groups = [
        {**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]
    ]
    return {
        "state": {names[i]: values for i, values in state["state"].items()},
        "param_groups": groups,
    }
