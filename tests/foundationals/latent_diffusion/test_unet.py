"""The UNet against diffusers' `UNet2DConditionModel` at random, non-trivial weights."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.unet import SD1_UNET
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names, single_file_names

SMALL: dict[str, Any] = {"text_dim": 16, "norm_groups": 8}
SPECS = {
    "transformer above": UNetSpec(channels=(32, 64), transformer_layers=(1, 0), num_heads=(2, 4), **SMALL),
    "inpainting": UNetSpec((32, 64, 64), (1, 1, 0), (2, 4, 8), in_channels=9, **SMALL),
    "transformers below, linear": UNetSpec((32, 64, 96), (0, 2, 3), (2, 4, 8), has_linear_projection=True, **SMALL),
}


def reference(spec: UNetSpec) -> UNet2DConditionModel:
    has_transformer = spec.transformer_layers
    return UNet2DConditionModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        block_out_channels=spec.channels,
        layers_per_block=spec.blocks_per_level,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_transformer),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_transformer)),
        transformer_layers_per_block=tuple(max(layers, 1) for layers in has_transformer),
        attention_head_dim=spec.num_heads,
        cross_attention_dim=spec.text_dim,
        norm_num_groups=spec.norm_groups,
        use_linear_projection=spec.has_linear_projection,
    )


def pair(spec: UNetSpec) -> tuple[UNet, Any]:
    torch.manual_seed(0)
    theirs, ours, names = reference(spec), UNet(spec), diffusers_names(spec)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    ours.load_state_dict({str(names.to_ours(key)): tensor for key, tensor in theirs.state_dict().items()})
    return ours, theirs


def inputs(spec: UNetSpec, height: int = 9, width: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(2, spec.in_channels, height, width)
    return latents, torch.tensor([5, 700]), torch.randn(2, 7, spec.text_dim)


def predict(unet: UNet, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    unet.set_timestep(timestep)
    unet.set_clip_text_embedding(text)
    return unet(latents)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_prediction_equals_diffusers(spec: UNetSpec, size: tuple[int, int]) -> None:
    ours, theirs = pair(spec)
    latents, timestep, text = inputs(spec, *size)
    with torch.no_grad():
        expected = theirs(latents, timestep, text).sample
        assert relative_error(predict(ours, latents, timestep, text), expected) < 1e-5


def test_gradients_equal_diffusers() -> None:
    spec = SPECS["transformer above"]
    ours, theirs = pair(spec)
    latents, timestep, text = inputs(spec)
    text.requires_grad_()
    predict(ours, latents, timestep, text).square().mean().backward()
    ours_text, text.grad = text.grad, None
    theirs(latents, timestep, text).sample.square().mean().backward()
    assert ours_text is not None and text.grad is not None
    assert relative_error(ours_text, text.grad) < 1e-4
    names, gradients = diffusers_names(spec), dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        found = gradients[str(names.to_ours(key))].grad
        assert found is not None and parameter.grad is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-3, atol=1e-5 * parameter.grad.abs().max().item() + 1e-9), (
            key
        )


@pytest.mark.slow
def test_every_key_of_the_full_size_has_its_place_in_both_formats() -> None:
    with torch.device("meta"):
        theirs = reference(SD1_UNET).state_dict()
    ours = UNet(device="meta").state_dict()
    names, original = diffusers_names(SD1_UNET), single_file_names(SD1_UNET)
    assert {names.to_theirs(key) for key in ours} == set(theirs)
    for key, tensor in ours.items():
        assert theirs[str(names.to_theirs(key))].shape == tensor.shape
        assert names.to_ours(str(names.to_theirs(key))) == key
        assert original.to_ours(str(original.to_theirs(key))) == key
    assert len({original.to_theirs(key) for key in ours}) == len(ours)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_both_tables_invert_on_every_key(spec: UNetSpec) -> None:
    for names in (diffusers_names(spec), single_file_names(spec)):
        for key in UNet(spec, device="meta").state_dict():
            assert names.to_ours(str(names.to_theirs(key))) == key


def test_all_linears_adapt_and_eject_bit_exactly() -> None:
    spec = SPECS["transformer above"]
    ours, _ = pair(spec)
    arguments = inputs(spec)
    with torch.no_grad():
        before, keys = predict(ours, *arguments), list(ours.state_dict())
        adapters = [LoraAdapter(linear, rank=2).inject(parent) for linear, parent in ours.walk(nn.Linear)]
        for adapter in adapters:
            nn.init.normal_(adapter.loras["lora"].up.weight)
        assert not torch.allclose(predict(ours, *arguments), before)
        for adapter in adapters:
            adapter.eject()
        assert torch.equal(predict(ours, *arguments), before) and list(ours.state_dict()) == keys


@pytest.mark.slow
def test_a_step_compiles_into_one_graph_for_all_steps() -> None:
    spec = SPECS["transformer above"]
    ours, _ = pair(spec)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in (700, 500, 3):
            latents, _, text = inputs(spec)
            timestep = torch.tensor([step, step])
            ours.set_timestep(timestep)
            ours.set_clip_text_embedding(text)
            assert torch.allclose(compiled(latents), predict(ours, latents, timestep, text), atol=1e-5)


def test_a_spec_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one entry per level"):
        UNetSpec(channels=(32, 64), transformer_layers=(1,))
