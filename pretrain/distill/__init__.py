"""Distillation: the features of a frozen teacher, learned by a Vim."""
