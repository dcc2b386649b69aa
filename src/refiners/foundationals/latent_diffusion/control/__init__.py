"""What leads a UNet by pictures."""

from refiners.foundationals.latent_diffusion.control.control_net import ControlNet, ControlNetSpec
from refiners.foundationals.latent_diffusion.control.control_net_adapter import ControlNetAdapter
from refiners.foundationals.latent_diffusion.control.control_net_weights import load_control_net, save_control_net
from refiners.foundationals.latent_diffusion.control.t2i_adapter import T2IAdapter
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import ConditionEncoder, T2ISpec

__all__ = [
    "ConditionEncoder",
    "ControlNet",
    "ControlNetAdapter",
    "ControlNetSpec",
    "T2IAdapter",
    "T2ISpec",
    "load_control_net",
    "save_control_net",
]
