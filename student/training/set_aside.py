"""A model is looked at in the middle of a run, and nothing of the run is touched."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from featcache.runtime import device as devices
from student.training.train_state import TrainState


@contextlib.contextmanager
def set_aside(state: TrainState) -> Iterator[None]:
    """Put the model into eval mode in the run's precision, without gradients; modes and generators
    are as they were afterwards."""
    modes = [(module, module.training) for module in state.module.modules()]
    with generators_kept(state.acc.device), torch.no_grad(), state.acc.autocast():
        state.module.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Leave the global generators of torch, numpy and Python as they were: a network that is built
    draws start values, and a recipe of the user's own may draw in its forward."""
    legacy: Any = np.random  # whose global state is not ours to use, but a user's recipe may
    numpy_state, python_state = legacy.get_state(), random.getstate()
    cuda = devices.is_gpu(device) and torch.cuda.is_available()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        try:
            yield
        finally:
            legacy.set_state(numpy_state)
            random.setstate(python_state)
