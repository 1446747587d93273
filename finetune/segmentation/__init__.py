"""Semantic segmentation: UperNet over Vim, on ADE20K's layout or any pair of folders."""
