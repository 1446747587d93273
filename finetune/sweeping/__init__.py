"""Sweeps over fine-tuning runs: Ray Tune runs the trials, Optuna's study is the record of them."""
