"""Selective-scan ops for Vision Mamba: one definition, several backends, no build step."""

from vim_kernels.dispatch.choice import available_backends as available_backends
from vim_kernels.dispatch.choice import set_backend as set_backend
from vim_kernels.dispatch.choice import use_backend as use_backend
from vim_kernels.dispatch.contract import Lines as Lines
from vim_kernels.dispatch.contract import NormWeights as NormWeights
from vim_kernels.dispatch.contract import Part as Part
from vim_kernels.dispatch.contract import ScanWeights as ScanWeights
from vim_kernels.memory import less_memory as less_memory
from vim_kernels.memory import saved_bytes as saved_bytes
from vim_kernels.memory import saved_bytes_one_way as saved_bytes_one_way
from vim_kernels.ops import add_rms_norm as add_rms_norm
from vim_kernels.ops import bidirectional_scan as bidirectional_scan
from vim_kernels.ops import bidirectional_scan_part as bidirectional_scan_part
from vim_kernels.ops import causal_conv1d as causal_conv1d
from vim_kernels.ops import pooled_scan as pooled_scan
from vim_kernels.ops import selective_scan as selective_scan
from vim_kernels.ops import takes_parts as takes_parts
