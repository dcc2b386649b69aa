"""The layers of the language, all under one name: `import refiners.fluxion.layers as fl`."""

from refiners.fluxion.layers.activations import GLU, Activation, GeLU, GeLUApproximation, ReLU, Sigmoid, SiLU
from refiners.fluxion.layers.attention import Attention, ScaledDotProductAttention, SelfAttention, SelfAttention2d
from refiners.fluxion.layers.chain import Chain, ContextModule
from refiners.fluxion.layers.combinators import (
    Cascade,
    Concatenate,
    Distribute,
    Matmul,
    Parallel,
    Passthrough,
    Residual,
    Sum,
)
from refiners.fluxion.layers.contexts import SetContext, SetContextDefault, UseContext
from refiners.fluxion.layers.conv import Conv2d, ConvTranspose2d
from refiners.fluxion.layers.embedding import Embedding
from refiners.fluxion.layers.functional import Breakpoint, Converter, GetArg, Identity, Lambda
from refiners.fluxion.layers.linear import Linear, MultiLinear
from refiners.fluxion.layers.module import Module, Return, WeightedModule
from refiners.fluxion.layers.norm import GroupNorm, InstanceNorm2d, LayerNorm, LayerNorm2d, RMSNorm
from refiners.fluxion.layers.parameters import Buffer, Parameter
from refiners.fluxion.layers.pointwise import Cos, Multiply, Sin
from refiners.fluxion.layers.recomputed import Recomputed
from refiners.fluxion.layers.sampling import (
    AvgPool2d,
    Downsample,
    Interpolate,
    MaxPool1d,
    MaxPool2d,
    PixelUnshuffle,
    ReflectionPad2d,
    Upsample,
)
from refiners.fluxion.layers.shapes import (
    Flatten,
    Permute,
    Reshape,
    Slicing,
    Squeeze,
    Transpose,
    Unflatten,
    Unsqueeze,
    View,
)
from refiners.fluxion.layers.transaction import transaction

__all__ = [
    "GLU",
    "Activation",
    "Attention",
    "AvgPool2d",
    "Breakpoint",
    "Buffer",
    "Cascade",
    "Chain",
    "Concatenate",
    "ContextModule",
    "Conv2d",
    "ConvTranspose2d",
    "Converter",
    "Cos",
    "Distribute",
    "Downsample",
    "Embedding",
    "Flatten",
    "GeLU",
    "GeLUApproximation",
    "GetArg",
    "GroupNorm",
    "Identity",
    "InstanceNorm2d",
    "Interpolate",
    "Lambda",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "Matmul",
    "MaxPool1d",
    "MaxPool2d",
    "Module",
    "MultiLinear",
    "Multiply",
    "Parallel",
    "Parameter",
    "Passthrough",
    "Permute",
    "PixelUnshuffle",
    "RMSNorm",
    "ReLU",
    "Recomputed",
    "ReflectionPad2d",
    "Reshape",
    "Residual",
    "Return",
    "ScaledDotProductAttention",
    "SelfAttention",
    "SelfAttention2d",
    "SetContext",
    "SetContextDefault",
    "SiLU",
    "Sigmoid",
    "Sin",
    "Slicing",
    "Squeeze",
    "Sum",
    "Transpose",
    "Unflatten",
    "Unsqueeze",
    "Upsample",
    "UseContext",
    "View",
    "WeightedModule",
    "transaction",
]
