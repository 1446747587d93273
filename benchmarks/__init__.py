"""Scripts that print tables: ours beside peers, measured in one run."""
