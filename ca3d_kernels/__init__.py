"""Fused kernels for local temporal attention and float16 pre-parameter training."""

from ca3d_kernels.backends import UnsupportedInputError, use_backend
from ca3d_kernels.folded_conv.functional import folded_conv
from ca3d_kernels.local_attention.functional import (
    local_temporal_attention,
    local_temporal_attention_packed,
    published_key_table,
)
from ca3d_kernels.local_attention.module import LocalTemporalAttention
from ca3d_kernels.norm_relu_conv.functional import norm_relu, norm_relu_conv
from ca3d_kernels.preparam_step.mapping import LinearMapping, PreParamMapping, published_mapping
from ca3d_kernels.preparam_step.optimizer import PreParamSGD
from ca3d_kernels.preparam_step.parametrization import (
    PreParametrization,
    parametrize_with_pre_parameters,
    pre_parameter,
)
from ca3d_kernels.temporal_block.functional import temporal_block

__all__ = [
    "LinearMapping",
    "LocalTemporalAttention",
    "PreParamMapping",
    "PreParamSGD",
    "PreParametrization",
    "UnsupportedInputError",
    "folded_conv",
    "local_temporal_attention",
    "local_temporal_attention_packed",
    "norm_relu",
    "norm_relu_conv",
    "parametrize_with_pre_parameters",
    "pre_parameter",
    "published_key_table",
    "published_mapping",
    "temporal_block",
    "use_backend",
]
