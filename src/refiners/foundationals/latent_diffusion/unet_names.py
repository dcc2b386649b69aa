"""What the parameters of a UNet are called in diffusers' folders and in the original single files.

Both speak of the same blocks; they differ in how they number the steps down and up, and in the residual block.
The position encoder is known to neither, and that of guidance to diffusers alone: their names follow those of their
neighbours.
"""

from refiners.foundationals.latent_diffusion.unet import UNetSpec
from refiners.weights.rules import Names, Target

ATTENTION = Names(
    {
        "Distribute.Linear_1": "to_q",
        "Distribute.Linear_2": "to_k",
        "Distribute.Linear_3": "to_v",
        "Linear": "to_out.0",
    }
)
TRANSFORMER_LAYER = Names(
    {
        "Residual_1.LayerNorm": "norm1",
        "Residual_1.SelfAttention": ("attn1", ATTENTION),
        "Residual_2.LayerNorm": "norm2",
        "Residual_2.Attention": ("attn2", ATTENTION),
        "Residual_3.LayerNorm": "norm3",
        "Residual_3.FeedForward.Linear_1": "ff.net.0.proj",
        "Residual_3.FeedForward.Linear_2": "ff.net.2",
    }
)
RESIDUAL_BLOCK = Names(
    {
        "Chain.GroupNorm_1": "norm1",
        "Chain.Conv2d_1": "conv1",
        "Chain.Residual.Linear": "time_emb_proj",
        "Chain.GroupNorm_2": "norm2",
        "Chain.Conv2d_2": "conv2",
        "Conv2d": "conv_shortcut",
    }
)
SINGLE_FILE_RESIDUAL_BLOCK = Names(
    {
        "Chain.GroupNorm_1": "in_layers.0",
        "Chain.Conv2d_1": "in_layers.2",
        "Chain.Residual.Linear": "emb_layers.1",
        "Chain.GroupNorm_2": "out_layers.0",
        "Chain.Conv2d_2": "out_layers.3",
        "Conv2d": "skip_connection",
    }
)


def transformer(spec: UNetSpec, num_layers: int) -> Names:
    """Names below a `SpatialTransformer` of so many layers; a lone transformer layer has no number with us."""
    projection = "Linear" if spec.has_linear_projection else "Conv2d"
    is_lone = num_layers <= 1
    ours, theirs = ("TransformerLayer", "0") if is_lone else ("TransformerLayer_{n}", "{n-1}")
    return Names(
        {
            "GroupNorm": "norm",
            f"{projection}_1": "proj_in",
            ours: (f"transformer_blocks.{theirs}", TRANSFORMER_LAYER),
            f"{projection}_2": "proj_out",
        }
    )


def _middle_blocks(spec: UNetSpec, theirs: tuple[str, str], block: Names) -> dict[str, Target]:
    """The residual blocks of the middle; a lone one has no number with us."""
    ours = ("ResidualBlock_1", "ResidualBlock_2") if spec.num_middle_layers else ("ResidualBlock",)
    return {f"MiddleBlock.{name}": (path, block) for name, path in zip(ours, theirs, strict=False)}


def diffusers_names(spec: UNetSpec) -> Names:
    """Ours to those of diffusers' `UNet2DConditionModel`."""
    last, blocks = len(spec.channels) - 1, spec.blocks_per_level
    rules: dict[str, Target] = {
        "Passthrough.TimestepEncoder.Linear_{n}": "time_embedding.linear_{n}",
        "Passthrough.TimestepEncoder.GuidanceEncoder.Linear": "time_embedding.cond_proj",
        "Passthrough.TimestepEncoder.TextTimeEncoder.Linear_{n}": "add_embedding.linear_{n}",
        "DownBlocks.Chain_1.Conv2d": "conv_in",
        "DownBlocks.Chain_1.PositionEncoder.Conv2d": "position_conv",
        **_middle_blocks(spec, ("mid_block.resnets.0", "mid_block.resnets.1"), RESIDUAL_BLOCK),
        "MiddleBlock.SpatialTransformer": ("mid_block.attentions.0", transformer(spec, spec.num_middle_layers)),
        "OutputBlock.GroupNorm": "conv_norm_out",
        "OutputBlock.Conv2d": "conv_out",
    }
    for level, layers in enumerate(spec.transformer_layers):
        for block in range(blocks):
            step = f"DownBlocks.Chain_{level * (blocks + 1) + block + 2}"
            rules[f"{step}.ResidualBlock"] = (f"down_blocks.{level}.resnets.{block}", RESIDUAL_BLOCK)
            rules[f"{step}.SpatialTransformer"] = (f"down_blocks.{level}.attentions.{block}", transformer(spec, layers))
        if level < last:
            down = f"DownBlocks.Chain_{(level + 1) * (blocks + 1) + 1}.Downsample.Conv2d"
            rules[down] = f"down_blocks.{level}.downsamplers.0.conv"
        for block in range(blocks + 1):
            step = f"UpBlocks.Chain_{level * (blocks + 1) + block + 1}"
            rules[f"{step}.ResidualBlock"] = (f"up_blocks.{level}.resnets.{block}", RESIDUAL_BLOCK)
            rules[f"{step}.SpatialTransformer"] = (
                f"up_blocks.{level}.attentions.{block}",
                transformer(spec, spec.transformer_layers[last - level]),
            )
        if level < last:
            up = f"UpBlocks.Chain_{(level + 1) * (blocks + 1)}.Upsample.Conv2d"
            rules[up] = f"up_blocks.{level}.upsamplers.0.conv"
    return Names(rules)


def single_file_names(spec: UNetSpec) -> Names:
    """Ours to those of the original files, below `model.diffusion_model`."""
    last, blocks = len(spec.channels) - 1, spec.blocks_per_level
    rules: dict[str, Target] = {
        "Passthrough.TimestepEncoder.Linear_1": "time_embed.0",
        "Passthrough.TimestepEncoder.Linear_2": "time_embed.2",
        "Passthrough.TimestepEncoder.GuidanceEncoder.Linear": "time_embed.cond_proj",
        "Passthrough.TimestepEncoder.TextTimeEncoder.Linear_1": "label_emb.0.0",
        "Passthrough.TimestepEncoder.TextTimeEncoder.Linear_2": "label_emb.0.2",
        "DownBlocks.Chain_1.Conv2d": "input_blocks.0.0",
        "DownBlocks.Chain_1.PositionEncoder.Conv2d": "input_blocks.0.1",
        "DownBlocks.Chain_{n}.Downsample.Conv2d": "input_blocks.{n-1}.0.op",
        "DownBlocks.Chain_{n}.ResidualBlock": ("input_blocks.{n-1}.0", SINGLE_FILE_RESIDUAL_BLOCK),
        **_middle_blocks(spec, ("middle_block.0", "middle_block.2"), SINGLE_FILE_RESIDUAL_BLOCK),
        "MiddleBlock.SpatialTransformer": ("middle_block.1", transformer(spec, spec.num_middle_layers)),
        "UpBlocks.Chain_{n}.ResidualBlock": ("output_blocks.{n-1}.0", SINGLE_FILE_RESIDUAL_BLOCK),
        "OutputBlock.GroupNorm": "out.0",
        "OutputBlock.Conv2d": "out.2",
    }
    for level, layers in enumerate(spec.transformer_layers):
        has_transformer = layers > 0
        first_down = level * (blocks + 1) + 1
        first_up = (last - level) * (blocks + 1)
        for step in range(first_down, first_down + blocks) if has_transformer else ():
            ours = f"DownBlocks.Chain_{step + 1}.SpatialTransformer"
            rules[ours] = (f"input_blocks.{step}.1", transformer(spec, layers))
        for step in range(first_up, first_up + blocks + 1) if has_transformer else ():
            ours = f"UpBlocks.Chain_{step + 1}.SpatialTransformer"
            rules[ours] = (f"output_blocks.{step}.1", transformer(spec, layers))
        if level > 0:  # the enlarging convolution comes last in its step
            step = first_up + blocks
            rules[f"UpBlocks.Chain_{step + 1}.Upsample.Conv2d"] = f"output_blocks.{step}.{1 + has_transformer}.conv"
    return Names(rules)
