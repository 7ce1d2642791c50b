"""The training loop runs here, with its optimizer, metrics, trackers and preemption."""
