"""Detection and instance segmentation: Mask R-CNN and Cascade Mask R-CNN over Vim."""
