from refiners.weights.files import (
    read_metadata,
    read_safetensors,
    read_torch,
    write_safetensors,
)
from refiners.weights.header import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    read_header,
)

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
