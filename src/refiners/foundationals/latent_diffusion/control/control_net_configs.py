"""The `config.json` of a ControlNet in diffusers' layout, from and to our spec."""

import json
from collections.abc import Mapping
from typing import Any

from refiners.foundationals.latent_diffusion.control.control_net import ControlNetSpec
from refiners.foundationals.latent_diffusion.files import diffusers_configs

# Options of diffusers' class that ours does not have, and the values at which they make no difference.
FIXED: dict[str, tuple[Any, ...]] = {
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb",),
}


def read_spec(config: Mapping[str, Any], where: str) -> ControlNetSpec:
    """The sizes. Raises ValueError if something is missing, or is something that this ControlNet is not."""
    if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise ValueError(f"{where}: this is the configuration of a {config['_class_name']}, not of a ControlNetModel")
    diffusers_configs.check_fixed(config, FIXED, where)
    try:
        return ControlNetSpec(
            unet=diffusers_configs.read_unet({"out_channels": config["in_channels"], **config}, where),
            condition_channels=tuple(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))),
            averages=config.get("global_pool_conditions", False),
        )
    except KeyError as error:
        raise ValueError(f"{where}: there is no entry {error}; it is damaged or of another kind") from error


def write_spec(spec: ControlNetSpec) -> str:
    """The contents of the file."""
    content = {
        "_class_name": "ControlNetModel",
        "_diffusers_version": diffusers_configs.LAYOUT,
        **diffusers_configs.way_down_config(spec.unet),
        "conditioning_embedding_out_channels": list(spec.condition_channels),
        "global_pool_conditions": spec.averages,
    }
    return json.dumps(content, indent=2) + "\n"
