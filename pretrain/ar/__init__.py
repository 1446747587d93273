"""Autoregression by clusters of patches (ARM, arXiv 2406.07537; MAP, arXiv 2410.00871) on Vim."""
