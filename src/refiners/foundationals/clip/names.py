"""What the parameters of a text encoder are called in transformers' files and in Stable Diffusion 1's single files.

OpenCLIP's own files join the three input projections into one tensor, so they need more than names.
"""

from refiners.foundationals.clip.text_encoder import CLIP_L, CLIPTextSpec
from refiners.weights.rules import Names, Target

TRANSFORMERS_PREFIX = "text_model"
SINGLE_FILE_PREFIX = "cond_stage_model.transformer.text_model"

TRANSFORMER_LAYER = Names(
    {
        "Residual_1.LayerNorm": "layer_norm1",
        "Residual_1.SelfAttention.Distribute.Linear_1": "self_attn.q_proj",
        "Residual_1.SelfAttention.Distribute.Linear_2": "self_attn.k_proj",
        "Residual_1.SelfAttention.Distribute.Linear_3": "self_attn.v_proj",
        "Residual_1.SelfAttention.Linear": "self_attn.out_proj",
        "Residual_2.LayerNorm": "layer_norm2",
        "Residual_2.FeedForward.Linear_1": "mlp.fc1",
        "Residual_2.FeedForward.Linear_2": "mlp.fc2",
    }
)


def text_encoder_names(spec: CLIPTextSpec = CLIP_L, prefix: str = TRANSFORMERS_PREFIX) -> Names:
    """The names below `prefix`, which is one of the two above, or "" for what transformers 5 saves."""
    # a lone layer has no number with us
    layers: dict[str, Target] = (
        {"TransformerLayer": ("encoder.layers.0", TRANSFORMER_LAYER)}
        if spec.num_layers == 1
        else {"TransformerLayer_{n}": ("encoder.layers.{n-1}", TRANSFORMER_LAYER)}
    )
    encoder = Names(
        {
            "Sum.TokenEncoder": "embeddings.token_embedding",
            "Sum.PositionalEncoder.Embedding": "embeddings.position_embedding",
            **layers,
            "LayerNorm": "final_layer_norm",
        },
        dropped=["embeddings.position_ids"],  # 0 … 76, which older files hold
    )
    # SDXL's second encoder and whole CLIP models have a projection of the pooled text, which this tree does not
    return Names({"": (prefix, encoder)}, dropped=["text_projection"], aliases=_without_level(prefix))


def _without_level(prefix: str) -> dict[str, str]:
    """Files of some versions leave out the level `text_model`."""
    outer, _, _ = prefix.rpartition("text_model")
    return {f"{outer}{part}": f"{prefix}.{part}" for part in ("embeddings", "encoder", "final_layer_norm") if prefix}
