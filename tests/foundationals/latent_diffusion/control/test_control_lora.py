"""Control-LoRAs: against the ControlNet that they stand for, and against diffusers reading the same file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from control_specimens import (
    CHANNELS,
    SDXL,
    inputs,
    predict,
    predict_theirs,
    randomize,
    relative_error,
    their_control_net,
    unet_pair,
)
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.control import ControlNet, ControlNetAdapter, ControlNetSpec
from refiners.foundationals.latent_diffusion.control.control_lora import make_control_net
from refiners.foundationals.latent_diffusion.control.control_net_files import ControlNetFile
from refiners.foundationals.latent_diffusion.control.control_net_names import diffusers_names, single_file_names
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_UNET
from refiners.weights.files import read_safetensors, write_safetensors
from refiners.weights.formats import Content, Family, identify

SD1 = UNetSpec((8, 16, 16, 16), (1, 1, 1, 0), (2, 2, 2, 2), text_dim=16, norm_groups=8)
SPECS = {"SD1": SD1, "SDXL": SDXL}
RANK = 4
WHOLE = ("input_hint_block.", "zero_convs.", "middle_block_out.")


def control_lora(spec: ControlNetSpec) -> dict[str, Tensor]:
    """What a file of a small Control-LoRA holds, at random, non-trivial values."""
    control_net = ControlNet(spec)
    randomize(control_net, seed=3)
    torch.manual_seed(0)
    names = single_file_names(spec)
    tensors = {"lora_controlnet": torch.zeros(0)}
    for key, tensor in control_net.state_dict().items():
        name = str(names.to_theirs(key))
        layer, _, kind = name.rpartition(".")
        if kind == "bias" or tensor.ndim == 1 or name.startswith(WHOLE):
            tensors[name] = tensor
        else:
            tensors[f"{layer}.up"] = 0.1 * torch.randn(tensor.shape[0], RANK, *[1] * (tensor.ndim - 2))
            tensors[f"{layer}.down"] = 0.1 * torch.randn(RANK, *tensor.shape[1:])
    return tensors


def written(spec: UNetSpec, folder: Path, **changes: Tensor | None) -> Path:
    tensors = {**control_lora(ControlNetSpec(spec, CHANNELS)), **changes}
    path = folder / "control-lora.safetensors"
    write_safetensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return path


def materialized(path: Path, unet: UNet) -> Any:
    """The ControlNet of diffusers whose weights are the UNet's plus up @ down, and in full what the file has so."""
    spec = ControlNetSpec(unet.spec, CHANNELS)
    original, names = single_file_names(spec), diffusers_names(spec)
    tensors = read_safetensors(path)
    state: dict[str, Tensor] = {}
    for key in ControlNet(spec, device="meta").state_dict():
        name = str(original.to_theirs(key))
        layer = name.removesuffix(".weight")
        if name in tensors:
            state[str(names.to_theirs(key))] = tensors[name]
        else:
            weight = unet.state_dict()[key]
            update = tensors[f"{layer}.up"].flatten(1) @ tensors[f"{layer}.down"].flatten(1)
            state[str(names.to_theirs(key))] = weight + update.reshape(weight.shape)
    theirs = their_control_net(unet.spec)
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_is_the_controlnet_of_the_unets_weights_plus_the_updates(spec: UNetSpec, tmp_path: Path) -> None:
    unet, their_unet = unet_pair(spec)
    path, arguments = written(spec, tmp_path), inputs(spec, 16, 8)
    adapter = ControlNetAdapter(unet, path, scale=0.8).inject()
    adapter.set_controlnet_condition(arguments[-1])
    with torch.no_grad():
        expected = predict_theirs(their_unet, [(materialized(path, unet), 0.8)], *arguments)
        assert relative_error(predict(unet, *arguments), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_diffusers_makes_the_same_of_the_same_file(tmp_path: Path) -> None:
    """Where the biases of updated layers are the UNet's: diffusers 0.42 leaves those of the file out."""
    unet, their_unet = unet_pair(SDXL)
    spec = ControlNetSpec(SDXL)
    own, names, tensors = unet.state_dict(), single_file_names(spec), control_lora(spec)
    layers = {name.removesuffix(".up") for name in tensors if name.endswith(".up")}
    for name in tensors:
        if name.removesuffix(".bias") in layers:
            tensors[name] = own[str(names.to_ours(name))]
    write_safetensors(tmp_path / "control.safetensors", tensors)
    theirs = their_control_net(SDXL, spec.condition_channels)
    theirs.load_state_dict(their_unet.state_dict(), strict=False)
    theirs.load_lora_adapter(str(tmp_path), weight_name="control.safetensors", prefix=None)
    adapter = ControlNetAdapter(unet, tmp_path / "control.safetensors").inject()
    *arguments, _ = inputs(SDXL)
    picture = torch.rand(2, 3, 64, 96)
    adapter.set_controlnet_condition(picture)
    with torch.no_grad():
        expected = predict_theirs(their_unet, [(theirs, 1.0)], *arguments, picture)
        assert relative_error(predict(unet, *arguments), expected) < 1e-5
        adapter.eject()
        assert relative_error(predict(unet, *arguments), expected) > 1e-2


def test_it_shares_the_unets_weights_and_leaves_the_unet_as_it_was(tmp_path: Path) -> None:
    unet, _ = unet_pair(SDXL)
    arguments = inputs(SDXL)
    LoraAdapter(unet.ensure_find(nn.Linear), rank=2).inject()  # which the Control-LoRA does not share
    with torch.no_grad():
        before, keys = predict(unet, *arguments), list(unet.state_dict())
        adapter = ControlNetAdapter(unet, written(SDXL, tmp_path)).inject()
        adapter.set_controlnet_condition(arguments[-1])
        led = predict(unet, *arguments)
        own = dict(adapter.control_net.named_parameters())
        shared = [key for key, tensor in unet.named_parameters() if own.get(key) is tensor]
        assert len(shared) == len(
            [key for key in own if key.endswith(".LinearLora.up.weight") or ".Conv2dLora.up" in key]
        )
        unet.to(torch.float64).to(torch.float32)
        assert all(own[key] is tensor for key, tensor in unet.named_parameters() if key in shared)
        assert torch.allclose(predict(unet, *arguments), led, atol=1e-6)
        adapter.eject()
        assert torch.equal(predict(unet, *arguments), before) and list(unet.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "family"), [(SD1_UNET, Family.SD1), (SDXL_UNET, Family.SDXL)], ids=["SD1", "SDXL"])
def test_every_key_of_the_full_size_has_its_place(spec: UNetSpec, family: Family) -> None:
    with torch.device("meta"):
        tensors = control_lora(ControlNetSpec(spec))
    identity = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert (identity.content, identity.family) == (Content.CONTROLNET, family)
    control_net = make_control_net(ControlNetFile(Path(), tensors, None), UNet(spec, device="meta"))
    ups = [key for key in control_net.state_dict() if key.endswith(".up.weight")]
    assert len(ups) == len([name for name in tensors if name.endswith(".up")]) > 100


LAYER = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
CHANGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half an update": ({f"{LAYER}.up": None}, "down only"),
    "another width": ({f"{LAYER}.down": torch.zeros(RANK, 5)}, "does not fit"),
    "another rank": ({f"{LAYER}.down": torch.zeros(RANK + 1, 32)}, "does not fit"),
    "an unknown layer": ({"output_blocks.0.0.in_layers.9.up": torch.zeros(1, 1)}, "output_blocks"),
    "an unknown tensor": ({"other.weight": torch.zeros(1)}, "other.weight"),
    "no zero convolution": ({"zero_convs.2.0.weight": None}, "zero_convs.2.0.weight"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ControlNetAdapter(UNet(SDXL), written(SDXL, tmp_path, **changes))
