"""Bundles of parameters of a Vim mixer: of one scan direction, and of the LayerNorm before the gate."""

from typing import NamedTuple

from torch import Tensor


class ScanWeights(NamedTuple):
    """Parameters of one direction; d inner channels, n states, r dt rank, w conv taps."""

    conv_weight: Tensor
    """(d, w) depthwise taps; the last one meets the token itself."""
    conv_bias: Tensor | None
    """(d,)"""
    x_proj: Tensor
    """(r + 2 n, d), rows in the order dt low rank, B, C."""
    dt_proj: Tensor
    """(d, r)"""
    dt_bias: Tensor
    """(d,), added before softplus."""
    A_log: Tensor
    """(d, n); A = -exp(A_log)."""
    D: Tensor
    """(d,) skip."""


class NormWeights(NamedTuple):
    """Parameters of a LayerNorm over d channels."""

    weight: Tensor
    """(d,)"""
    bias: Tensor
    """(d,)"""
