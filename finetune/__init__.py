"""Downstream tasks on a published backbone."""
