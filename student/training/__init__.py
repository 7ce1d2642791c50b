"""The training loop and what surrounds it: optimizer, checkpoints, metrics, preemption."""
