"""Masked autoencoding (MAE, arXiv 2111.06377) on Vim."""
