"""OpenCLIP's names of a text encoder, as in the single files of Stable Diffusion XL; and its two habits.

It joins the three input projections of an attention into one tensor, and keeps the text projection transposed. So
tensors are `separated` on the way in and `rejoined` on the way out; in between the names have one more level:
`attn.in_proj_weight.0` is the first third.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from refiners.foundationals.clip.names import PROJECTION, last_norm, layer_rules
from refiners.foundationals.clip.text_encoder import CLIPTextSpec
from refiners.weights.rules import Names, Target

TRANSFORMER_LAYER = Names(
    {
        "Residual_1.LayerNorm": "ln_1",
        "Residual_1.SelfAttention.Distribute.Linear_{n}.weight": "attn.in_proj_weight.{n-1}",
        "Residual_1.SelfAttention.Distribute.Linear_{n}.bias": "attn.in_proj_bias.{n-1}",
        "Residual_1.SelfAttention.Linear": "attn.out_proj",
        "Residual_2.LayerNorm": "ln_2",
        "Residual_2.FeedForward.Linear_1": "mlp.c_fc",
        "Residual_2.FeedForward.Linear_2": "mlp.c_proj",
    }
)
_JOINED = re.compile(r"(.*\.attn\.in_proj_(?:weight|bias))\.([012])")


def open_clip_names(spec: CLIPTextSpec, prefix: str) -> Names:
    """The names below `prefix`, of tensors that are `separated`."""
    projection: dict[str, Target] = {f"{PROJECTION}.weight": "text_projection"} if spec.projection_dim else {}
    encoder = Names(
        {
            "Sum.TokenEncoder": "token_embedding",
            "Sum.PositionalEncoder.Embedding.weight": "positional_embedding",
            **layer_rules(spec, "transformer.resblocks", TRANSFORMER_LAYER),
            last_norm(spec): "ln_final",
            **projection,
        },
        dropped=["logit_scale", "attn_mask", *([] if projection else ["text_projection"])],
    )
    return Names({"": (prefix, encoder)})


def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with the joined ones cut in three, and the text projection as a linear layer has it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")) and tensor.ndim:
            found |= {f"{name}.{index}": part for index, part in enumerate(tensor.tensor_split(3))}
        else:
            found[name] = _transposed(name, tensor)
    return found


def rejoined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `separated` does undone; tensors of other models stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = _JOINED.fullmatch(name)
        if part is None:
            found[name] = _transposed(name, tensor)
        elif part[2] == "0":
            found[part[1]] = torch.cat([tensors[f"{part[1]}.{index}"] for index in range(3)])
    return found


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if name.endswith(".model.text_projection") and tensor.ndim == 2 else tensor
