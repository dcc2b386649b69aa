"""What the parameters of an image encoder are called in transformers' files, and reading such files."""

from pathlib import Path

import torch

from refiners.foundationals.clip.image_encoder import (
    CLIP_IMAGE_G,
    CLIP_IMAGE_H,
    CLIP_IMAGE_L,
    CLIPImageEncoder,
    CLIPImageSpec,
)
from refiners.foundationals.clip.names import TRANSFORMER_LAYER
from refiners.weights.matching import match_all
from refiners.weights.rules import Names
from refiners.weights.tensors import read_tensors

_VISION = Names(
    {
        "PatchEncoder.Chain_1.Parameter.weight": "embeddings.class_embedding",
        "PatchEncoder.Chain_2.Conv2d": "embeddings.patch_embedding",
        "PositionalEncoder.Parameter": "embeddings.position_embedding",
        "LayerNorm": "pre_layrnorm",  # spelled so in their code
        "TransformerLayer_{n}": ("encoder.layers.{n-1}", TRANSFORMER_LAYER),
        "PooledPicture.LayerNorm": "post_layernorm",
    },
    dropped=["embeddings.position_ids"],  # 0, 1, …, which older files hold
)
# Files of a whole CLIP have its text encoder as well.
IMAGE_ENCODER = Names(
    {"PooledPicture.Linear": "visual_projection", "": ("vision_model", _VISION)},
    dropped=["text_model", "text_projection", "logit_scale"],
)
_FILES = ("model.safetensors", "pytorch_model.bin")
_SPECS = (CLIP_IMAGE_H, CLIP_IMAGE_L, CLIP_IMAGE_G)


def load_clip_image_encoder(
    path: Path | str,
    spec: CLIPImageSpec | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CLIPImageEncoder:
    """Load an image encoder, or that of a whole CLIP, with transformers' names.

    path: a file, or a folder with a `model.safetensors` or `pytorch_model.bin`.
    spec: None for the one of H, L and bigG that has the width of the file's.
    dtype: None for torch's default.
    Raises ValueError if the file is damaged or holds something else, FileNotFoundError if there is none.
    """
    path = next((Path(path) / name for name in _FILES if (Path(path) / name).is_file()), path)
    tensors = read_tensors(path)
    projection = tensors.get("visual_projection.weight")
    if spec is None and projection is not None:
        spec = next((known for known in _SPECS if projection.shape[-1] == known.embedding_dim), None)
    if spec is None:
        raise ValueError(
            f"{path}: no CLIP image encoder of size H, L or bigG with transformers' names, which has "
            "'visual_projection.weight'; give the spec of another size"
        )
    encoder = CLIPImageEncoder(spec, device="meta")
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    matched = match_all(tensors, IMAGE_ENCODER, shapes, str(path))
    dtype = dtype or torch.get_default_dtype()
    state = {name: tensor.to(device=device or "cpu", dtype=dtype) for name, tensor in matched.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder
