"""Files of textual inversion (arXiv 2208.01618): the words that they teach, and the vectors of each.

Forms: `.pt` of the paper's own code and of A1111 (a dict `string_to_param`) and `.safetensors` (`emb_params`; `clip_l`
and `clip_g` for the two text encoders of Stable Diffusion XL), where the word is the name of the file; and diffusers'
`learned_embeds`, which has the word for a key.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from refiners.weights.files import read_safetensors
from refiners.weights.formats import A1111_NAMES, Content, identify
from refiners.weights.lora_keys.updates import check_finite
from refiners.weights.torch_files import is_torch_file, read_torch

MAX_VECTORS = 75  # the tokens of one prompt
_ENCODERS = {"clip_l", "clip_g"}


def read_concepts(path: Path | str) -> dict[str, tuple[Tensor, ...]]:
    """Read the words of a file, and their vectors (n, D): one tensor for each text encoder that they are for.

    Raises ValueError if the file is damaged, wants to run code or holds anything else, FileNotFoundError,
    IsADirectoryError.
    """
    tensors = read_torch(path) if is_torch_file(path) else read_safetensors(path)
    identity = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if identity.content is not Content.TEXTUAL_INVERSION:
        raise ValueError(f"{path} is no textual inversion but {identity}")
    vectors = {name: _vectors(path, name, tensor) for name, tensor in tensors.items()}
    check_finite((f"{path}: {name!r}", tensor) for name, tensor in vectors.items())
    return _by_word(Path(path).stem, vectors)


def _vectors(path: Path | str, name: str, tensor: Tensor) -> Tensor:
    vectors = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
    if not vectors.is_floating_point() or vectors.ndim != 2 or not vectors.numel() or len(vectors) > MAX_VECTORS:
        raise ValueError(
            f"{path}: {name!r} has shape {tuple(tensor.shape)} and is {tensor.dtype}, but the vectors of a word are "
            f"floating point and of shape (D,) or (n, D) with at most {MAX_VECTORS} of them"
        )
    return vectors


def _by_word(stem: str, vectors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    if vectors.keys() <= A1111_NAMES | _ENCODERS:
        return {stem: tuple(vectors.values())}
    return {name: (tensor,) for name, tensor in vectors.items()}
