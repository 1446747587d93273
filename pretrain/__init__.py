"""Masked-image pretraining of Vim backbones: masks, the autoencoder, data, the training loop."""
