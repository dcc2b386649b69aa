"""Control-LoRA (Stability AI, 2023): a ControlNet whose weights are the UNet's own, each with a low-rank update.

The file has the parts of a ControlNet that a UNet lacks, biases and norms in full, and `X.up` (out, rank), `X.down`
(rank, in) for each weight, which is the UNet's plus up @ down; convolutions have more dimensions.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.lora import Conv2dLora, LinearLora, LoraAdapter
from refiners.foundationals.latent_diffusion.control.control_net import ControlNet
from refiners.foundationals.latent_diffusion.control.control_net_files import ControlNetFile
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.weights.matching import match_all
from refiners.weights.rules import Names, UnknownNameError

MARKER = "lora_controlnet"  # an empty tensor of that name
PARTS = ("down", "up")
NAME = "control"  # of the updates, on their layers


def make_control_net(file: ControlNetFile, unet: UNet) -> ControlNet:
    """A ControlNet of a Control-LoRA, which shares weights with the UNet: a change of those is a change of both.

    Raises ValueError, which names it, for what does not fit the UNet.
    """
    spec = file.spec(unet)
    names, where = file.names(spec), str(file.path)
    control_net = ControlNet(spec, device="meta")
    shapes = {name: tensor.shape for name, tensor in control_net.state_dict().items()}
    shared = {name: tensor for name, tensor in unet.state_dict(keep_vars=True).items() if name in shapes}
    updates, whole = _split(file.tensors)
    wanted = {name: shape for name, shape in shapes.items() if name not in shared or names.to_theirs(name) in whole}
    own = match_all(whole, names, wanted, where)
    placed = {name: tensor.to(unet.device, unet.dtype) for name, tensor in own.items()}
    control_net.load_state_dict({**shared, **placed}, assign=True)
    for layer, parts in updates.items():
        _adapt(control_net, _path(names, layer, where), parts, where)
    return control_net


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The updates by their layer, and what is there in full."""
    updates: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            updates.setdefault(layer, {})[part] = tensor
        elif name != MARKER:
            whole[name] = tensor
    return updates, whole


def _path(names: Names, layer: str, where: str) -> str:
    try:
        ours = names.to_ours(f"{layer}.weight")
    except UnknownNameError as error:
        raise ValueError(f"{where}: {layer!r} is no layer of this ControlNet: {error}") from error
    assert ours is not None, "no name of a layer is dropped"
    return ours.removesuffix(".weight")


def _adapt(control_net: ControlNet, path: str, parts: Mapping[str, Tensor], where: str) -> None:
    holder, _, slot = path.rpartition(".")
    parent = cast(fl.Chain, control_net.get_submodule(holder))
    layer: Any = parent[slot]
    if len(parts) != len(PARTS):
        raise ValueError(f"{where}: {path} has {', '.join(parts)} only; both {' and '.join(PARTS)} are needed")
    placed = {part: tensor.to(layer.weight) for part, tensor in parts.items()}
    try:
        lora = (Conv2dLora if isinstance(layer, fl.Conv2d) else LinearLora).from_parts(layer, NAME, placed)
    except ValueError as error:
        raise ValueError(f"{where}: what is meant for {path} does not fit: {error}") from error
    LoraAdapter(layer, lora).inject(parent)
