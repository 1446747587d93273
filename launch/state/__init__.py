"""Durable state: checkpoints, and the whole tensors of models and optimizers that a strategy spreads out."""
