"""Everything that a user may name as `fl.<name>` is there, under the name that it has."""

import pytest

import refiners.fluxion.layers as fl

NAMES = [
    *("Module", "WeightedModule", "ContextModule", "Chain", "Sum", "Residual", "Parallel", "Distribute"),
    *("Concatenate", "Matmul", "Passthrough", "UseContext", "SetContext", "Lambda", "Return", "GetArg"),
    *("Identity", "Parameter", "Buffer", "Converter", "Breakpoint", "Reshape", "Flatten", "Unflatten", "View"),
    *("Transpose", "Permute", "Squeeze", "Unsqueeze", "Slicing", "Multiply", "Sin", "Cos", "Linear"),
    *("MultiLinear", "Conv2d", "ConvTranspose2d", "Embedding", "LayerNorm", "GroupNorm", "LayerNorm2d"),
    *("InstanceNorm2d", "RMSNorm", "SiLU", "ReLU", "GeLU", "GeLUApproximation", "Sigmoid", "GLU", "MaxPool1d"),
    *("MaxPool2d", "Downsample", "Upsample", "Interpolate", "PixelUnshuffle", "ReflectionPad2d"),
    *("ScaledDotProductAttention", "Attention", "SelfAttention", "SelfAttention2d", "SetContextDefault"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_is_exported_under_its_own_name(name: str) -> None:
    assert name in fl.__all__
    assert getattr(fl, name).__name__ == name
    assert getattr(fl, name).__module__.startswith("refiners.fluxion.layers.")


def test_all_lists_what_is_there_and_nothing_twice() -> None:
    assert len(fl.__all__) == len(set(fl.__all__))
    assert [name for name in fl.__all__ if not hasattr(fl, name)] == []
