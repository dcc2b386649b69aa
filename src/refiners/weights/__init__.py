from refiners.weights.files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from refiners.weights.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    read_header,
)
from refiners.weights.torch_files import read_torch

__all__ = [
    "DTYPES",
    "MAX_HEADER_BYTES",
    "Header",
    "TensorInfo",
    "read_header",
    "read_metadata",
    "read_safetensors",
    "read_torch",
    "write_safetensors",
]
