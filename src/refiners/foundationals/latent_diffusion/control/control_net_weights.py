"""ControlNets loaded from files, and saved."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from refiners.foundationals.latent_diffusion.control import control_lora, control_net_configs
from refiners.foundationals.latent_diffusion.control.control_net import ControlNet
from refiners.foundationals.latent_diffusion.control.control_net_files import (
    ORIGINAL_PREFIX,
    STEM,
    check_family,
    read_control_net,
)
from refiners.foundationals.latent_diffusion.control.control_net_names import diffusers_names, single_file_names
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.weights.files import write_safetensors
from refiners.weights.matching import match_all


def load_control_net(where: Path | str, unet: UNet) -> ControlNet:
    """A ControlNet for a UNet, on its device and in its dtype.

    where: a folder of diffusers, the name of such a repository on the hub, or a file in any form; a Control-LoRA
        becomes a ControlNet that shares the UNet's weights.
    Raises ValueError, which tells why, for what is damaged, no ControlNet, or for other models; FileNotFoundError.
    """
    file = read_control_net(where)
    check_family(file, unet)
    if control_lora.MARKER in file.tensors:
        return control_lora.make_control_net(file, unet)
    spec = file.spec(unet)
    control_net = ControlNet(spec, device="meta")
    shapes = {name: tensor.shape for name, tensor in control_net.state_dict().items()}
    matched = match_all(file.tensors, file.names(spec), shapes, str(file.path))
    placed = {name: tensor.to(unet.device, unet.dtype) for name, tensor in matched.items()}
    control_net.load_state_dict(placed, assign=True)
    return control_net


def save_control_net(control_net: ControlNet, where: Path | str, dtype: torch.dtype | None = None) -> None:
    """Save a ControlNet so that `load_control_net` can load it, and others can.

    where: a name that ends in `.safetensors` for a single file with the original names, else a folder for diffusers.
    dtype: None for that of the ControlNet.
    """
    path, spec = Path(where), control_net.spec
    is_single = path.suffix == ".safetensors"
    names = single_file_names(spec) if is_single else diffusers_names(spec)
    prefix = ORIGINAL_PREFIX if is_single else ""
    state = cast("dict[str, Tensor]", control_net.state_dict())
    tensors = {f"{prefix}{names.to_theirs(name)}": tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    if not is_single:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(control_net_configs.write_spec(spec), encoding="utf-8")
        path = path / f"{STEM}.safetensors"
    write_safetensors(path, tensors, metadata={"format": "pt"})
