"""What the tensors of an IP-Adapter are called in its authors' files, which others have taken over.

The attentions are numbered as diffusers numbers all attentions of a UNet, those of pictures over themselves included,
which come first in each layer: so the n-th cross-attention has the n-th odd number.
"""

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion.files.parts_folder import UNCHANGED
from refiners.foundationals.latent_diffusion.image_prompt.projection import (
    FullImageProjection,
    ImageProjection,
    PerceiverResampler,
    ResamplerSpec,
)
from refiners.weights.rules import Names, Target

KEYS_AND_VALUES = Names({"TokenProjection_1.Linear": "to_k_ip", "TokenProjection_2.Linear": "to_v_ip"})
RESAMPLER_LAYER = Names(
    {
        "Residual_1.LayerNorm": "0.norm2",
        "Residual_1.Parallel.Linear": "0.to_q",
        "Residual_1.Parallel.Chain.PatchesAndTokens.Chain.LayerNorm": "0.norm1",
        "Residual_1.Parallel.Chain.Linear": "0.to_kv",
        "Residual_1.Linear": "0.to_out",
        "Residual_2.LayerNorm": "1.0",
        "Residual_2.Linear_1": "1.1",
        "Residual_2.Linear_2": "1.3",
    }
)
PLAIN = Names({"Linear": "proj", "LayerNorm": "norm"})
FULL = Names({"Linear_1": "proj.0", "Linear_2": "proj.2", "LayerNorm": "proj.3"})


def resampler_names(spec: ResamplerSpec) -> Names:
    """Names below a `PerceiverResampler`; a lone layer has no number with us."""
    ours, theirs = ("ResamplerLayer", "0") if spec.num_layers == 1 else ("ResamplerLayer_{n}", "{n-1}")
    return Names(
        {
            "Linear_1": "proj_in",
            "Parameter.weight": "latents",
            ours: (f"layers.{theirs}", RESAMPLER_LAYER),
            "Linear_2": "proj_out",
            "LayerNorm": "norm_out",
        }
    )


def projection_names(projection: fl.Chain) -> Names:
    """Names below a projection; those of a user's own kind stay as they are."""
    if isinstance(projection, PerceiverResampler):
        return resampler_names(projection.spec)
    if isinstance(projection, ImageProjection):
        return PLAIN
    return FULL if isinstance(projection, FullImageProjection) else UNCHANGED


def ip_adapter_names(projection: fl.Chain, num_attentions: int) -> Names:
    """Between the names of the projection, and of `DecoupledAttention_1` and so on, and those of files."""
    attentions: dict[str, Target] = {
        f"DecoupledAttention_{number}": (f"ip_adapter.{2 * number - 1}", KEYS_AND_VALUES)
        for number in range(1, num_attentions + 1)
    }
    return Names({**attentions, "": ("image_proj", projection_names(projection))})
