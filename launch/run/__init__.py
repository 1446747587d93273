"""The life of a run: command line, folder, strategy, steps, signals, metrics."""
