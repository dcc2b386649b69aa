"""Many adapters on one model: some as diffusers has them at once, all on and off in any order."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from control_specimens import randomize as randomize_control_net
from control_specimens import relative_error, their_control_net
from diffusion_specimens import generators, randomize, small_folder
from ip_adapter_specimens import give_to_theirs
from PIL import Image
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.control import ControlNet, ControlNetAdapter, ControlNetSpec, T2IAdapter
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.multi_diffusion import Region, RegionalPrompts
from refiners.foundationals.latent_diffusion.steering import (
    FreeUAdapter,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    StyleAlignedAdapter,
)
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names
from refiners.weights import write_safetensors

# diffusers' schedulers hand tensors to numpy in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES: dict[Any, Any] = {
    StableDiffusion_1: diffusers.StableDiffusionControlNetPipeline,
    StableDiffusion_XL: diffusers.StableDiffusionXLControlNetPipeline,
}
PROMPT: dict[str, Any] = {"prompt": "a cute cat", "negative_prompt": "blurry", "num_inference_steps": 2}
IMAGE = torch.randn(1, 1, 20, generator=torch.Generator().manual_seed(7))  # from an image encoder
CONDITION = Image.effect_noise((64, 64), 90).convert("RGB")


class Edit:
    """Something that goes on a model and off again."""

    def __init__(self, on: Callable[[], Any], off: Callable[[], Any]) -> None:
        self.on, self.off = on, off


def loras(model: Any, path: Path) -> Edit:
    """On all attention of the UNet; also writes the file for diffusers."""
    torch.manual_seed(0)
    names, adapters, tensors = diffusers_names(model.unet.spec), list[tuple[Any, Any]](), dict[str, Tensor]()
    paths = {id(module): name for name, module in model.unet.named_modules()}
    for attention in list(model.unet.layers(fl.Attention)):
        for linear, parent in attention.walk(nn.Linear):
            adapter = LoraAdapter(linear, rank=2)
            lora = adapter.loras["lora"]
            nn.init.normal_(lora.up.weight, std=0.2)
            name = f"unet.{names.to_theirs(paths[id(linear)])}"
            tensors |= {f"{name}.lora_A.weight": lora.down.weight, f"{name}.lora_B.weight": lora.up.weight}
            adapters.append((adapter, parent))
    write_safetensors(path, tensors)
    return Edit(
        lambda: [adapter.inject(parent) for adapter, parent in adapters],
        lambda: [adapter.eject() for adapter, _ in adapters],
    )


def control_net(model: Any, folder: Path) -> Edit:
    adapter = ControlNetAdapter(model, folder, scale=0.5)
    adapter.set_controlnet_condition(CONDITION)
    return Edit(adapter.inject, adapter.eject)


def ip_adapter(model: Any) -> tuple[IPAdapter, Edit]:
    torch.manual_seed(1)
    adapter = IPAdapter(model, image_proj=ImageProjection(20, model.unet.spec.text_dim), scale=0.8)
    randomize(adapter.image_proj)
    for attention in adapter.attentions:
        for linear in attention.image_attention.layers(fl.Linear):
            nn.init.normal_(linear.weight, std=0.3)
    with torch.no_grad():
        adapter.set_clip_image_embedding(adapter.embed_features(IMAGE[0]))
    return adapter, Edit(adapter.inject, adapter.eject)


def latents(model: Any) -> Tensor:
    """What the last step gives."""
    found: list[Tensor] = []
    model.generate(
        **PROMPT, seed=3, condition_scale=5.0, on_step=lambda report: found.append(report.latents), show_progress=False
    )
    return found[-1]


@pytest.mark.slow
@pytest.mark.parametrize("cls", PIPELINES)
def test_all_at_once_equal_diffusers_and_go_off_in_any_order(cls: Any, tmp_path: Path) -> None:
    small_folder(tmp_path / "model", cls)
    ours = cls.from_pretrained(tmp_path / "model")
    theirs_control = their_control_net(ours.spec.unet, (8, 8, 12, 16))
    randomize_control_net(theirs_control)
    theirs_control.save_pretrained(tmp_path / "control")
    before, tensors = latents(ours), {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    adapter, image_prompt = ip_adapter(ours)
    edits = [loras(ours, tmp_path / "lora.safetensors"), control_net(ours, tmp_path / "control"), image_prompt]

    theirs = PIPELINES[cls].from_pretrained(tmp_path / "model", controlnet=theirs_control)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    give_to_theirs(theirs.unet, adapter)
    expected = theirs(
        image=CONDITION,
        controlnet_conditioning_scale=0.5,
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(IMAGE), IMAGE])],
        guidance_scale=5.0,
        generator=generators(3)[0],
        output_type="latent",
        **PROMPT,
    ).images

    for on, off in zip(itertools.permutations(edits), reversed([*itertools.permutations(edits)]), strict=True):
        for edit in on:
            edit.on()
        assert relative_error(latents(ours), expected) < 1e-4
        assert tensors.keys() <= ours.state_dict().keys()
        for edit in off:
            edit.off()
        assert torch.equal(latents(ours), before)
        assert list(ours.state_dict()) == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in ours.state_dict().items())
    assert relative_error(before, expected) > 1e-2


def lora(model: Any) -> Any:
    linear, parent = next(model.unet.DownBlocks.walk(nn.Linear))
    adapter = LoraAdapter(linear, rank=2)
    nn.init.normal_(adapter.loras["lora"].up.weight)
    return Edit(lambda: adapter.inject(parent), adapter.eject)


def edge_control(model: Any) -> Edit:
    network = ControlNet(ControlNetSpec(model.unet.spec, (8, 12, 16)))
    randomize(network)
    adapter = ControlNetAdapter(model, network)
    adapter.set_controlnet_condition(torch.rand(1, 3, 32, 32))
    return Edit(adapter.inject, adapter.eject)


def depth_features(model: Any) -> Edit:
    adapter = T2IAdapter(model)
    adapter.set_condition_features(
        [torch.randn(1, place.width, 8 // 2**level, 8 // 2**level) for level, place in enumerate(adapter.places)]
    )
    return Edit(adapter.inject, adapter.eject)


def regions(model: Any) -> Edit:
    prompts = RegionalPrompts(model, [Region("a blue square", (0, 0, 0.5, 1))])
    return Edit(prompts.inject, prompts.eject)


def steering(cls: Any) -> Callable[[Any], Edit]:
    def make(model: Any) -> Edit:
        edit = cls(model if issubclass(cls, SelfAttentionGuidance | PerturbedAttentionGuidance) else model.unet)
        return Edit(edit.inject, edit.eject)

    return make


EDITS: dict[str, Callable[[Any], Edit]] = {
    "LoRA": lora,
    "ControlNet": edge_control,
    "T2I-Adapter": depth_features,
    "IP-Adapter": lambda model: ip_adapter(model)[1],
    "another IP-Adapter": lambda model: ip_adapter(model)[1],
    "regions": regions,
    "FreeU": steering(FreeUAdapter),
    "perturbed attention": steering(PerturbedAttentionGuidance),
    "self-attention guidance": steering(SelfAttentionGuidance),
    "StyleAligned": steering(StyleAlignedAdapter),
}


@pytest.mark.parametrize("seed", range(3))
def test_all_edits_go_on_and_off_in_any_order_without_a_trace(seed: int) -> None:
    model = StableDiffusion_1.from_pretrained("builtin")
    torch.manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8), model.compute_text_embedding("a red circle")

    @torch.no_grad()
    def predict() -> Tensor:
        return model.predict_noise(x, 7, text, condition_scale=3.0)

    before, keys, tree = predict(), list(model.state_dict()), repr(model.unet)
    chance = random.Random(seed)
    waiting = [(name, make(model)) for name, make in EDITS.items()]
    on: list[tuple[str, Edit]] = []
    last = before
    while waiting or on:
        if waiting and (not on or chance.random() < 0.6):
            name, edit = waiting.pop(chance.randrange(len(waiting)))
            edit.on()
            on.append((name, edit))
        else:
            name, edit = on.pop(chance.randrange(len(on)))
            edit.off()
        output = predict()
        assert relative_error(output, last) > 1e-6, f"{name} makes no difference"
        last = output
    assert torch.equal(last, before)
    assert list(model.state_dict()) == keys and repr(model.unet) == tree and not model.guidances
