"""The configuration files of diffusers' folders, from and to our specs."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from refiners.foundationals.clip.text_encoder import CLIPTextSpec
from refiners.foundationals.clip.tokenizer import END, START, VOCABULARY_PATH, load_vocabulary
from refiners.foundationals.latent_diffusion.autoencoder import AutoencoderSpec
from refiners.foundationals.latent_diffusion.specs import SD1, StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet import UNetSpec
from refiners.solvers import SolverParams

Config = Mapping[str, Any]

# Options of diffusers' classes that ours do not have, and the values at which they make no difference.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
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
TEXT_ENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "model_type": ("clip_text_model",),
}
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def read_spec(
    where: str, configs: Mapping[str, Config], scheduler: Config, special_tokens: Config, merges: Path | None
) -> StableDiffusionSpec:
    """The spec of a folder.

    configs: of `unet`, `vae` and `text_encoder`.  merges: the tokenizer's.
    Raises ValueError if a part is missing something, or is something that this model is not.
    """
    try:
        unet = _read_unet(configs["unet"], f"{where}/unet")
        autoencoder = _read_autoencoder(configs["vae"], f"{where}/vae")
        text_encoder = _read_text_encoder(configs["text_encoder"], f"{where}/text_encoder", special_tokens)
    except KeyError as error:
        raise ValueError(
            f"{where}: a config.json has no entry {error}; the folder is damaged or of another kind"
        ) from error
    size = int(configs["unet"].get("sample_size") or 64) * autoencoder.downsampling_factor
    is_clips = text_encoder.vocabulary_size == SD1.text_encoder.vocabulary_size
    return StableDiffusionSpec(
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        solver_params=_read_scheduler(scheduler),
        default_size=size,
        vocabulary=VOCABULARY_PATH if is_clips or merges is None else merges,
    )


def _check_fixed(config: Config, fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for option, values in fixed.items():
        value = config.get(option, values[0])
        if value not in values:
            raise ValueError(
                f"{where}: {option} is {value!r}, which this model cannot be (only {' or '.join(map(repr, values))}); "
                "it is another kind of model"
            )


def _read_unet(config: Config, where: str) -> UNetSpec:
    _check_fixed(config, UNET_FIXED, where)
    channels = tuple(config["block_out_channels"])
    is_cross = [kind == DOWN[True] for kind in config["down_block_types"]]
    layers = _per_level(config.get("transformer_layers_per_block", 1), channels)
    return UNetSpec(
        channels=channels,
        transformer_layers=tuple(count if cross else 0 for count, cross in zip(layers, is_cross, strict=True)),
        num_heads=_per_level(config.get("attention_head_dim", 8), channels),  # diffusers' name for it is a mistake
        blocks_per_level=config["layers_per_block"],
        text_dim=config["cross_attention_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        has_linear_projection=config.get("use_linear_projection", False),
    )


def _per_level(value: int | list[int], channels: tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * len(channels) if isinstance(value, int) else tuple(value)


def _read_autoencoder(config: Config, where: str) -> AutoencoderSpec:
    _check_fixed(config, AUTOENCODER_FIXED, where)
    return AutoencoderSpec(
        channels=tuple(config["block_out_channels"]),
        blocks_per_level=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        latent_scale=config.get("scaling_factor", 0.18215),
    )


def _read_text_encoder(config: Config, where: str, special_tokens: Config) -> CLIPTextSpec:
    _check_fixed(config, TEXT_ENCODER_FIXED, where)
    padding: Any = special_tokens.get("pad_token", END)
    is_end = END in (padding, padding["content"] if isinstance(padding, dict) else None)
    return CLIPTextSpec(
        embedding_dim=config["hidden_size"],
        max_sequence_length=config.get("max_position_embeddings", 77),
        vocabulary_size=config.get("vocab_size", 49408),
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        feedforward_dim=config["intermediate_size"],
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        use_quick_gelu=config.get("hidden_act", "quick_gelu") == "quick_gelu",
        pad_token_id=None if is_end else 0,
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


def _read_scheduler(config: Config) -> SolverParams:
    params = {ours: config[theirs] for ours, theirs in SCHEDULER_ENTRIES.items() if theirs in config}
    types = {entry.name: entry.type for entry in fields(SolverParams)}
    return replace(SolverParams(), **{name: cast(Any, types[name])(value) for name, value in params.items()})


def write_spec(spec: StableDiffusionSpec) -> dict[str, str]:
    """The contents of all files of a folder but the weights', by their names in the folder."""
    index = {
        "_diffusers_version": "0.42.1",  # the layout of this version
        "_class_name": "StableDiffusionPipeline" if spec.unet.in_channels == 4 else "StableDiffusionInpaintPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    contents: dict[str, Any] = {
        "model_index.json": index,
        "unet/config.json": _unet_config(spec),
        "vae/config.json": _autoencoder_config(spec),
        "text_encoder/config.json": _text_encoder_config(spec.text_encoder),
        "scheduler/scheduler_config.json": {
            "_class_name": "DPMSolverMultistepScheduler",
            "steps_offset": 1,  # diffusers warns of anything else
            **{theirs: getattr(spec.solver_params, ours) for ours, theirs in SCHEDULER_ENTRIES.items()},
        },
        **_tokenizer_files(spec),
    }
    return {
        name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in contents.items()
    }


def _unet_config(spec: StableDiffusionSpec) -> dict[str, Any]:
    unet = spec.unet
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": list(unet.num_heads),
        "block_out_channels": list(unet.channels),
        "cross_attention_dim": unet.text_dim,
        "down_block_types": [DOWN[count > 0] for count in unet.transformer_layers],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.blocks_per_level,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "sample_size": spec.default_size // spec.autoencoder.downsampling_factor,
        "transformer_layers_per_block": [max(count, 1) for count in unet.transformer_layers],
        "up_block_types": [UP[count > 0] for count in reversed(unet.transformer_layers)],
        "use_linear_projection": unet.has_linear_projection,
    }


def _autoencoder_config(spec: StableDiffusionSpec) -> dict[str, Any]:
    autoencoder = spec.autoencoder
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(autoencoder.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(autoencoder.channels),
        "latent_channels": autoencoder.latent_channels,
        "layers_per_block": autoencoder.blocks_per_level,
        "norm_num_groups": autoencoder.norm_groups,
        "sample_size": spec.default_size,
        "scaling_factor": autoencoder.latent_scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(autoencoder.channels),
    }


def _text_encoder_config(spec: CLIPTextSpec) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": spec.vocabulary_size - 2,
        "eos_token_id": spec.vocabulary_size - 1,
        "hidden_act": "quick_gelu" if spec.use_quick_gelu else "gelu",
        "hidden_size": spec.embedding_dim,
        "intermediate_size": spec.feedforward_dim,
        "layer_norm_eps": spec.layer_norm_eps,
        "max_position_embeddings": spec.max_sequence_length,
        "model_type": "clip_text_model",
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_layers,
        "vocab_size": spec.vocabulary_size,
    }


def _tokenizer_files(spec: StableDiffusionSpec) -> dict[str, Any]:
    vocabulary = load_vocabulary(str(spec.vocabulary)).get_vocab()
    padding = END if spec.text_encoder.pad_token_id is None else "!"
    special = {"bos_token": START, "eos_token": END, "pad_token": padding, "unk_token": END}
    return {
        "tokenizer/vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "tokenizer/merges.txt": spec.vocabulary.read_text(encoding="utf-8"),
        "tokenizer/special_tokens_map.json": special,
        "tokenizer/tokenizer_config.json": {
            **special,
            "model_max_length": spec.text_encoder.max_sequence_length,
            "tokenizer_class": "CLIPTokenizer",
        },
    }
