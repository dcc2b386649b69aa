"""The configuration files of diffusers' folders, from and to our specs."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from refiners.foundationals.clip.text_encoder import CLIP_L
from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH
from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec
from refiners.foundationals.latent_diffusion.embedded import EMBEDDED
from refiners.foundationals.latent_diffusion.files.checked_options import Config, check_fixed
from refiners.foundationals.latent_diffusion.files.diffusers_text_configs import (
    TOKENIZERS,
    read_text_encoder,
    text_encoder_config,
    tokenizer_files,
)
from refiners.foundationals.latent_diffusion.specs import SD1, SDXL, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec
from refiners.solvers import SolverParams

# What diffusers calls blocks with transformers, and without.
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
MIDDLE = {True: "UNetMidBlock2DCrossAttn", False: "UNetMidBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
# Options of diffusers' classes that ours do not have, and the values at which they make no difference.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": (MIDDLE[True], MIDDLE[False]),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_type": ("positional",),
    "upcast_attention": (False, None),
}
AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
LAYOUT = "0.42.1"  # the version of diffusers whose layout we write
_SD1_PIPELINES = {"make": "StableDiffusionPipeline", "fill in": "StableDiffusionInpaintPipeline"}
_XL_PIPELINES = {
    "make": "StableDiffusionXLPipeline",
    "fill in": "StableDiffusionXLInpaintPipeline",
    "refine": "StableDiffusionXLImg2ImgPipeline",
}


def read_spec(
    where: str,
    configs: Mapping[str, Config],
    scheduler: Config,
    tokenizers: Mapping[str, Config],
    merges: Path | None,
) -> StableDiffusionSpec:
    """The spec of a folder.

    configs: of `unet`, `vae`, and `text_encoder`, `text_encoder_2` or both.
    tokenizers: the settings of the tokenizer of each text encoder.  merges: of all of them.
    Raises ValueError if a part is missing something, or is something that this model is not.
    """
    is_xl = "text_encoder_2" in configs
    like = EMBEDDED if "position_frequencies" in configs["unet"] else SDXL if is_xl else SD1
    try:
        unet = read_unet(configs["unet"], f"{where}/unet")
        autoencoder = _read_autoencoder(configs["vae"], f"{where}/vae", is_xl)
        text_encoders = {
            name: read_text_encoder(
                configs[name], f"{where}/{name}", tokenizers[name], int(is_xl), name == "text_encoder_2"
            )
            for name in TOKENIZERS
            if name in configs
        }
    except KeyError as error:
        raise ValueError(
            f"{where}: a config.json has no entry {error}; the folder is damaged or of another kind"
        ) from error
    size = int(configs["unet"].get("sample_size") or 64) * autoencoder.downsampling_factor
    is_clips = all(text.vocabulary_size == CLIP_L.vocabulary_size for text in text_encoders.values())
    return StableDiffusionSpec(
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoders.get("text_encoder"),
        text_encoder_2=text_encoders.get("text_encoder_2"),
        solver_params=_read_scheduler(scheduler, like.solver_params),
        default_size=size,
        condition_scale=like.condition_scale,
        vocabulary=VOCABULARY_PATH if is_clips or merges is None else merges,
    )


def read_unet(config: Config, where: str) -> UNetSpec:
    """The sizes of a UNet. Raises ValueError, KeyError for what is none of ours, or incomplete."""
    check_fixed(config, UNET_FIXED, where)
    channels = tuple(config["block_out_channels"])
    is_cross = [kind == DOWN[True] for kind in config["down_block_types"]]
    layers = _per_level(config.get("transformer_layers_per_block", 1), channels)
    middle = 0 if config.get("mid_block_type") == MIDDLE[False] else layers[-1]
    spec = UNetSpec(
        channels=channels,
        transformer_layers=tuple(count if cross else 0 for count, cross in zip(layers, is_cross, strict=True)),
        num_heads=_per_level(config.get("attention_head_dim", 8), channels),  # diffusers' name for it is a mistake
        blocks_per_level=config["layers_per_block"],
        text_dim=config["cross_attention_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        has_linear_projection=config.get("use_linear_projection", False),
        guidance_waves=config.get("time_cond_proj_dim") or 0,
        position_frequencies=config.get("position_frequencies", 0),
        **_read_added_conditions(config),
    )
    return spec.with_middle_layers(middle)


def _read_added_conditions(config: Config) -> dict[str, int]:
    """The sizes of what is added to the time.

    The configuration tells the sum of two widths. The refiner alone has 5 time ids, and it alone reads text as wide as
    the pooled one.
    """
    if config.get("addition_embed_type") is None:
        return {}
    width, waves = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    count = 5 if width - 5 * waves == config["cross_attention_dim"] else 6
    return {"pooled_text_dim": width - count * waves, "num_time_ids": count, "time_id_waves": waves}


def _per_level(value: int | list[int], channels: tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * len(channels) if isinstance(value, int) else tuple(value)


def _read_autoencoder(config: Config, where: str, is_xl: bool) -> AutoencoderSpec:
    check_fixed(config, AUTOENCODER_FIXED, where)
    return AutoencoderSpec(
        channels=tuple(config["block_out_channels"]),
        blocks_per_level=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        latent_scale=config.get("scaling_factor", 0.18215),
        needs_float32=is_xl and config.get("force_upcast", True),  # only the pipelines of XL look at it
    )


# diffusers' entry for each of ours that says how the model was trained; how to sample is the solver's own business
SCHEDULER_ENTRIES = {
    "num_train_timesteps": "num_train_timesteps",
    "initial_diffusion_rate": "beta_start",
    "final_diffusion_rate": "beta_end",
    "noise_schedule": "beta_schedule",
    "model_prediction_type": "prediction_type",
    "rescale_to_zero_terminal_snr": "rescale_betas_zero_snr",
}


def _read_scheduler(config: Config, otherwise: SolverParams) -> SolverParams:
    params = {ours: config[theirs] for ours, theirs in SCHEDULER_ENTRIES.items() if theirs in config}
    types = {entry.name: entry.type for entry in fields(SolverParams)}
    return replace(otherwise, **{name: cast(Any, types[name])(value) for name, value in params.items()})


def write_spec(spec: StableDiffusionSpec) -> dict[str, str]:
    """The contents of all files of a folder but the weights', by their names in the folder."""
    text_configs: dict[str, Any] = {}
    for name, text in spec.text_encoders.items():
        text_configs[f"{name}/config.json"] = text_encoder_config(text)
        text_configs |= tokenizer_files(TOKENIZERS[name], text, spec.vocabulary)
    contents: dict[str, Any] = {
        "model_index.json": _index(spec),
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "out_channels": spec.unet.out_channels,
            **({"position_frequencies": waves} if (waves := spec.unet.position_frequencies) else {}),  # ours alone
            "sample_size": spec.default_size // spec.autoencoder.downsampling_factor,
            "time_cond_proj_dim": spec.unet.guidance_waves or None,
            "up_block_types": [UP[count > 0] for count in reversed(spec.unet.transformer_layers)],
            **way_down_config(spec.unet),
        },
        "vae/config.json": _autoencoder_config(spec),
        "scheduler/scheduler_config.json": {
            "_class_name": "DPMSolverMultistepScheduler",
            "steps_offset": 1,  # diffusers warns of anything else
            **{theirs: getattr(spec.solver_params, ours) for ours, theirs in SCHEDULER_ENTRIES.items()},
        },
        **text_configs,
    }
    return {
        name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in contents.items()
    }


def _index(spec: StableDiffusionSpec) -> dict[str, Any]:
    """What diffusers is to make of the folder."""
    parts: dict[str, Any] = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for name, tokenizer in TOKENIZERS.items():
        text = spec.text_encoders.get(name)
        if text or spec.text_encoder_2:
            cls = "CLIPTextModelWithProjection" if text and text.projection_dim else "CLIPTextModel"
            parts[name] = ["transformers", cls] if text else [None, None]
            parts[tokenizer] = ["transformers", "CLIPTokenizer"] if text else [None, None]
    own = _XL_PIPELINES if spec.text_encoder_2 else _SD1_PIPELINES
    is_refiner = spec.text_encoder is None
    return {
        "_class_name": own["fill in" if spec.is_inpainting else "refine" if is_refiner else "make"],
        "_diffusers_version": LAYOUT,
        "feature_extractor": [None, None],
        **({} if spec.text_encoder_2 else {"requires_safety_checker": False, "safety_checker": [None, None]}),
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        **({"force_zeros_for_empty_prompt": not is_refiner} if spec.text_encoder_2 else {}),
        **({"requires_aesthetics_score": True} if is_refiner else {}),
        **parts,
    }


def way_down_config(unet: UNetSpec) -> dict[str, Any]:
    """What a UNet's configuration says of all but its way up and its output."""
    layers = [max(count, 1) for count in unet.transformer_layers]
    if not unet.transformer_layers[-1]:
        layers[-1] = max(unet.num_middle_layers, 1)  # the last number is that of the middle block as well
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": unet.time_id_waves,
        "projection_class_embeddings_input_dim": unet.pooled_text_dim + unet.num_time_ids * unet.time_id_waves,
    }
    return {
        **(added if unet.pooled_text_dim else {}),
        "attention_head_dim": list(unet.num_heads),
        "block_out_channels": list(unet.channels),
        "cross_attention_dim": unet.text_dim,
        "down_block_types": [DOWN[count > 0] for count in unet.transformer_layers],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.blocks_per_level,
        "norm_num_groups": unet.norm_groups,
        **({} if unet.num_middle_layers else {"mid_block_type": MIDDLE[False]}),
        "transformer_layers_per_block": layers,
        "use_linear_projection": unet.has_linear_projection,
    }


def _autoencoder_config(spec: StableDiffusionSpec) -> dict[str, Any]:
    autoencoder = spec.autoencoder
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(autoencoder.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(autoencoder.channels),
        **({"force_upcast": autoencoder.needs_float32} if spec.text_encoder_2 else {}),
        "latent_channels": autoencoder.latent_channels,
        "layers_per_block": autoencoder.blocks_per_level,
        "norm_num_groups": autoencoder.norm_groups,
        "sample_size": spec.default_size,
        "scaling_factor": autoencoder.latent_scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(autoencoder.channels),
    }
