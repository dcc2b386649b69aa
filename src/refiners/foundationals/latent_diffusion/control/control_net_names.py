"""What the parameters of a ControlNet are called by diffusers and in the original files, below `control_model`.

Both call the copy of the UNet as they call the UNet.
"""

from refiners.foundationals.latent_diffusion import unet_names
from refiners.foundationals.latent_diffusion.control.control_net import ControlNetSpec
from refiners.weights.rules import Names

CONDITION_ENCODER = "SetContextDefault.ConditionEncoder"


def diffusers_names(spec: ControlNetSpec) -> Names:
    """Ours to those of diffusers' `ControlNetModel`."""
    return Names(
        {
            f"{CONDITION_ENCODER}.Conv2d_1": "controlnet_cond_embedding.conv_in",
            f"{CONDITION_ENCODER}.Conv2d_{{n}}": "controlnet_cond_embedding.blocks.{n-2}",
            f"{CONDITION_ENCODER}.ZeroConvolution": "controlnet_cond_embedding.conv_out",
            "ControlOutputs.Chain_{n}.ZeroConvolution": "controlnet_down_blocks.{n-1}",
            "ControlOutputs.ZeroConvolution": "controlnet_mid_block",
            "": ("", unet_names.diffusers_names(spec.unet)),
        }
    )


def single_file_names(spec: ControlNetSpec) -> Names:
    """Ours to those of the original files."""
    convolutions = 2 * len(spec.condition_channels) - 1  # an activation follows each
    encoder = {
        f"{CONDITION_ENCODER}.Conv2d_{number}": f"input_hint_block.{2 * number - 2}"
        for number in range(1, convolutions + 1)
    }
    return Names(
        {
            **encoder,
            f"{CONDITION_ENCODER}.ZeroConvolution": f"input_hint_block.{2 * convolutions}",
            "ControlOutputs.Chain_{n}.ZeroConvolution": "zero_convs.{n-1}.0",
            "ControlOutputs.ZeroConvolution": "middle_block_out.0",
            "": ("", unet_names.single_file_names(spec.unet)),
        }
    )
