"""Image classification: fine-tuning as DeiT and MAE do it, linear probe, nearest neighbours."""
