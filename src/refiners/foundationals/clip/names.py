"""What the parameters of a text encoder are called in transformers' files and in the single files of Stable Diffusion.

OpenCLIP's names, which some of the single files have, are in `open_clip.py`.
"""

from refiners.foundationals.clip.text_encoder import CLIP_L, CLIPTextSpec
from refiners.weights.rules import Names, Target

TRANSFORMERS_PREFIX = "text_model"
SINGLE_FILE_PREFIX = "cond_stage_model.transformer.text_model"  # of Stable Diffusion 1
XL_SINGLE_FILE_PREFIX = "conditioner.embedders.0.transformer.text_model"  # the first of Stable Diffusion XL

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
    """The names below `prefix`, which is one of those above, or "" for what transformers 5 saves."""
    encoder = Names(
        {
            "Sum.TokenEncoder": "embeddings.token_embedding",
            "Sum.PositionalEncoder.Embedding": "embeddings.position_embedding",
            **layer_rules(spec, "encoder.layers", TRANSFORMER_LAYER),
            last_norm(spec): "final_layer_norm",
        },
        dropped=["embeddings.position_ids"],  # 0 … 76, which older files hold
    )
    # a tree without a projection leaves that of SDXL's second encoder and of whole CLIP models out
    projection: dict[str, Target] = {PROJECTION: "text_projection"} if spec.projection_dim else {}
    dropped = [] if spec.projection_dim else ["text_projection"]
    return Names({**projection, "": (prefix, encoder)}, dropped=dropped, aliases=_without_level(prefix))


PROJECTION = "Parallel.PooledText.Linear"


def last_norm(spec: CLIPTextSpec) -> str:
    """Where the last norm sits."""
    return "Parallel.PooledText.LayerNorm" if spec.projection_dim else "LayerNorm"


def layer_rules(spec: CLIPTextSpec, theirs: str, layer: Names) -> dict[str, Target]:
    """Rules for the layers, which are numbered through in files; a lone layer of a chain has no number with us."""
    pooled = spec.skipped_layers if spec.projection_dim else 0
    trunk, rules = spec.num_layers - pooled, dict[str, Target]()
    for number in range(1, pooled + 1):
        ours = "Parallel.PooledText.TransformerLayer" + (f"_{number}" if pooled > 1 else "")
        rules[ours] = (f"{theirs}.{trunk + number - 1}", layer)
    if trunk == 1:
        return {**rules, "TransformerLayer": (f"{theirs}.0", layer)}
    return {**rules, "TransformerLayer_{n}": (f"{theirs}.{{n-1}}", layer)}


def _without_level(prefix: str) -> dict[str, str]:
    """Files of some versions leave out the level `text_model`."""
    outer, _, _ = prefix.rpartition("text_model")
    return {f"{outer}{part}": f"{prefix}.{part}" for part in ("embeddings", "encoder", "final_layer_norm") if prefix}
