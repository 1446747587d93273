"""How a run starts, survives and ends: configuration, accelerator, run folder, checkpoints, signals, metrics."""
