"""What the parameters of an autoencoder are called in diffusers' folders and in the original single files."""

from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec
from refiners.weights.rules import Names, Target

RESIDUAL_BLOCK = {
    "Chain.GroupNorm_1": "norm1",
    "Chain.Conv2d_1": "conv1",
    "Chain.GroupNorm_2": "norm2",
    "Chain.Conv2d_2": "conv2",
}
DIFFUSERS_BLOCK = Names({**RESIDUAL_BLOCK, "Conv2d": "conv_shortcut"})
SINGLE_FILE_BLOCK = Names({**RESIDUAL_BLOCK, "Conv2d": "nin_shortcut"})
DIFFUSERS_MIDDLE = Names(
    {
        "ResidualBlock_{n}": ("resnets.{n-1}", DIFFUSERS_BLOCK),
        "Residual.GroupNorm": "attentions.0.group_norm",
        "Residual.SelfAttention2d.Distribute.Linear_1": "attentions.0.to_q",
        "Residual.SelfAttention2d.Distribute.Linear_2": "attentions.0.to_k",
        "Residual.SelfAttention2d.Distribute.Linear_3": "attentions.0.to_v",
        "Residual.SelfAttention2d.Linear": "attentions.0.to_out.0",
    },
    aliases={  # folders of diffusers before 0.17, Stable Diffusion 1.5's own among them
        "attentions.0.query": "attentions.0.to_q",
        "attentions.0.key": "attentions.0.to_k",
        "attentions.0.value": "attentions.0.to_v",
        "attentions.0.proj_attn": "attentions.0.to_out.0",
    },
)
SINGLE_FILE_MIDDLE = Names(
    {
        "ResidualBlock_{n}": ("block_{n}", SINGLE_FILE_BLOCK),
        "Residual.GroupNorm": "attn_1.norm",
        "Residual.SelfAttention2d.Distribute.Linear_1": "attn_1.q",
        "Residual.SelfAttention2d.Distribute.Linear_2": "attn_1.k",
        "Residual.SelfAttention2d.Distribute.Linear_3": "attn_1.v",
        "Residual.SelfAttention2d.Linear": "attn_1.proj_out",
    }
)


def diffusers_names(spec: AutoencoderSpec) -> Names:
    """Ours to those of diffusers' `AutoencoderKL`."""
    encoder: dict[str, Target] = {
        "Conv2d_1": "conv_in",
        "MiddleBlock": ("mid_block", DIFFUSERS_MIDDLE),
        "GroupNorm": "conv_norm_out",
        "Conv2d_2": "conv_out",
        **_encoder_blocks(spec, "down_blocks.{n-1}.resnets", DIFFUSERS_BLOCK),
        "EncoderLevel_{n}.Downsample.Conv2d": "down_blocks.{n-1}.downsamplers.0.conv",
    }
    decoder: dict[str, Target] = {
        "Conv2d_2": "conv_in",
        "MiddleBlock": ("mid_block", DIFFUSERS_MIDDLE),
        "DecoderLevel_{n}.ResidualBlock_{k}": ("up_blocks.{n-1}.resnets.{k-1}", DIFFUSERS_BLOCK),
        "DecoderLevel_{n}.Upsample.Conv2d": "up_blocks.{n-1}.upsamplers.0.conv",
        "GroupNorm": "conv_norm_out",
        "Conv2d_3": "conv_out",
    }
    return _whole(encoder, decoder)


def single_file_names(spec: AutoencoderSpec) -> Names:
    """Ours to those of the original files, below `first_stage_model`. There, levels up count from full resolution.

    The attention's projections are 1x1 convolutions there: their weights end in two dimensions of size 1.
    """
    encoder: dict[str, Target] = {
        "Conv2d_1": "conv_in",
        **_encoder_blocks(spec, "down.{n-1}.block", SINGLE_FILE_BLOCK),
        "EncoderLevel_{n}.Downsample.Conv2d": "down.{n-1}.downsample.conv",
        "MiddleBlock": ("mid", SINGLE_FILE_MIDDLE),
        "GroupNorm": "norm_out",
        "Conv2d_2": "conv_out",
    }
    decoder: dict[str, Target] = {
        "Conv2d_2": "conv_in",
        "MiddleBlock": ("mid", SINGLE_FILE_MIDDLE),
        "GroupNorm": "norm_out",
        "Conv2d_3": "conv_out",
    }
    levels = len(spec.channels)
    for level in range(levels):
        ours = f"DecoderLevel_{levels - level}"
        decoder[f"{ours}.ResidualBlock_{{k}}"] = (f"up.{level}.block.{{k-1}}", SINGLE_FILE_BLOCK)
        decoder[f"{ours}.Upsample.Conv2d"] = f"up.{level}.upsample.conv"
    return _whole(encoder, decoder)


def _encoder_blocks(spec: AutoencoderSpec, theirs: str, below: Names) -> dict[str, Target]:
    """A lone block of a level has no number with us."""
    if spec.blocks_per_level == 1:
        return {"EncoderLevel_{n}.ResidualBlock": (f"{theirs}.0", below)}
    return {"EncoderLevel_{n}.ResidualBlock_{k}": (f"{theirs}.{{k-1}}", below)}


def _whole(encoder: dict[str, Target], decoder: dict[str, Target]) -> Names:
    return Names(
        {
            "Encoder.Conv2d_3": "quant_conv",
            "Encoder": ("encoder", Names(encoder)),
            "Decoder.Conv2d_1": "post_quant_conv",
            "Decoder": ("decoder", Names(decoder)),
        }
    )
