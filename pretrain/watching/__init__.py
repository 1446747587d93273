"""Knowing that a run learns: held-out pictures, probes on labelled ones, and trouble named while it happens."""
