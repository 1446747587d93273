"""Colours of classes, for the pictures of every task."""

import colorsys

import numpy as np


def palette(classes: int) -> np.ndarray:
    """(classes, 3) colours in [0, 1], far apart for neighbours in the list."""
    hues = np.arange(classes) * 0.61803398875 % 1  # the golden ratio spreads any number of them
    return np.array([colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (k % 2), 1 - 0.25 * (k % 3)) for k, hue in enumerate(hues)])
