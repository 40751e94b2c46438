"""What operations do to channels, by kind. Imports torch alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dist_gsl.attention import UnevenMultiheadAttention
from dist_gsl.removal import BatchNorm, Convolution, Transposed

__all__ = ["BatchNorm", "Convolution", "Transposed"]

# Element by element, whatever they make of zero.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Softsign, nn.Softplus, nn.Sigmoid,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: set[Any] = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softsign, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.tanh, F.sigmoid, torch.relu, torch.tanh, torch.selu, torch.sigmoid, torch.abs, torch.exp,
    torch.clamp, torch.neg, torch.square, torch.sqrt, operator.neg,
}  # fmt: skip
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
ELEMENTWISE_METHODS = {"relu", "tanh", "sigmoid", "abs", "exp", "clamp", "neg", "square", "sqrt", "contiguous", "float", "double", "clone", "detach"}
SUMS: set[Any] = {operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub, "add", "sub"}
QUOTIENTS: set[Any] = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "div", *QUOTIENTS}
IN_PLACE: set[Any] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
# Over windows of the last so many dimensions.
POOLED_DIMS: dict[object, int] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 3),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, torch.max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, torch.max_pool3d), 3),
}
# Move elements and change none: {what: does it fix sizes by its arguments?}
MOVES: set[Any] = {
    torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze, torch.flatten, torch.movedim, torch.swapaxes, torch.unbind,
    "permute", "transpose", "unsqueeze", "squeeze", "flatten", "movedim", "t", "unbind",
}  # fmt: skip
RESHAPES: set[Any] = {torch.reshape, "view", "reshape", "unflatten", torch.unflatten, "expand"}
CHUNKS: set[Any] = {torch.chunk, "chunk"}
SPLITS: set[Any] = {torch.split, "split", torch.tensor_split, "tensor_split"}
ATTENTION = (nn.MultiheadAttention, UnevenMultiheadAttention)
SHAPE_ONLY = {"size", "dim", "numel"}
"""Read the shape of a value and not the value."""


