"""Next embedding prediction (NEPA, arXiv 2512.16922) on Vim."""
