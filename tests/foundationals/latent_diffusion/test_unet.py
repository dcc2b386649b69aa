"""The UNet against diffusers' `UNet2DConditionModel` at random, non-trivial weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names, single_file_names
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_REFINER_UNET, SDXL_UNET

SMALL: dict[str, Any] = {"text_dim": 16, "norm_groups": 8}
ADDED: dict[str, Any] = {"pooled_text_dim": 10, "time_id_waves": 8}
SPECS = {
    "transformer above": UNetSpec(channels=(32, 64), transformer_layers=(1, 0), num_heads=(2, 4), **SMALL),
    "inpainting": UNetSpec((32, 64, 64), (1, 1, 0), (2, 4, 8), in_channels=9, **SMALL),
    "transformers below, linear": UNetSpec((32, 64, 96), (0, 2, 3), (2, 4, 8), has_linear_projection=True, **SMALL),
    "SDXL": UNetSpec((32, 64, 96), (0, 2, 3), (2, 4, 8), has_linear_projection=True, **SMALL, **ADDED, num_time_ids=6),
    "SDXL refiner": UNetSpec(
        (32, 64, 64, 96), (0, 2, 2, 0), (2, 4, 4, 8), has_linear_projection=True, **SMALL, **ADDED, num_time_ids=5
    ),
    "distilled with guidance": UNetSpec((32, 64), (1, 1), (2, 4), guidance_waves=12, **SMALL, **ADDED, num_time_ids=6),
}


def reference(spec: UNetSpec) -> UNet2DConditionModel:
    has_transformer = spec.transformer_layers
    layers = [max(count, 1) for count in has_transformer]
    layers[-1] = spec.num_middle_layers  # diffusers takes those of the middle from the last level
    return UNet2DConditionModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        block_out_channels=spec.channels,
        layers_per_block=spec.blocks_per_level,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_transformer),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_transformer)),
        transformer_layers_per_block=tuple(layers),
        attention_head_dim=spec.num_heads,
        cross_attention_dim=spec.text_dim,
        norm_num_groups=spec.norm_groups,
        use_linear_projection=spec.has_linear_projection,
        addition_embed_type="text_time" if spec.pooled_text_dim else None,
        addition_time_embed_dim=spec.time_id_waves,
        projection_class_embeddings_input_dim=spec.pooled_text_dim + spec.num_time_ids * spec.time_id_waves,
        time_cond_proj_dim=spec.guidance_waves or None,
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


Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]


def inputs(spec: UNetSpec, height: int = 9, width: int = 11) -> Inputs:
    """Latents, time steps, and all conditions that the UNet reads."""
    conditions = {
        "clip_text_embedding": torch.randn(2, 7, spec.text_dim),
        "pooled_text_embedding": torch.randn(2, spec.pooled_text_dim),
        "time_ids": torch.randint(0, 1024, (2, spec.num_time_ids)).float(),
        "condition_scale": torch.tensor([3.0, 8.5]),
    }
    latents = torch.randn(2, spec.in_channels, height, width)
    return latents, torch.tensor([5, 700]), {name: conditions[name] for name in spec.conditions}


def predict(unet: UNet, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    unet.set_timestep(timestep)
    unet.set_conditions(conditions)
    return unet(latents)


def predict_theirs(unet: Any, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    others: dict[str, Any] = {}
    if "time_ids" in conditions:
        added = {"text_embeds": conditions["pooled_text_embedding"], "time_ids": conditions["time_ids"]}
        others["added_cond_kwargs"] = added
    if "condition_scale" in conditions:
        scale = conditions["condition_scale"] - 1
        width = unet.config.time_cond_proj_dim
        others["timestep_cond"] = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, scale, width)
    return unet(latents, timestep, conditions["clip_text_embedding"], **others).sample


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_prediction_equals_diffusers(spec: UNetSpec, size: tuple[int, int]) -> None:
    ours, theirs = pair(spec)
    arguments = inputs(spec, *size)
    with torch.no_grad():
        expected = predict_theirs(theirs, *arguments)
        assert relative_error(predict(ours, *arguments), expected) < 1e-5


@pytest.mark.parametrize("name", ["transformer above", "SDXL", "distilled with guidance"])
def test_gradients_equal_diffusers(name: str) -> None:
    spec = SPECS[name]
    ours, theirs = pair(spec)
    arguments = inputs(spec)
    text = arguments[2]["clip_text_embedding"].requires_grad_()
    predict(ours, *arguments).square().mean().backward()
    ours_text, text.grad = text.grad, None
    predict_theirs(theirs, *arguments).square().mean().backward()
    assert ours_text is not None and text.grad is not None
    assert relative_error(ours_text, text.grad) < 1e-4
    names, gradients = diffusers_names(spec), dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        found = gradients[str(names.to_ours(key))].grad
        assert found is not None and parameter.grad is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-3, atol=1e-5 * parameter.grad.abs().max().item() + 1e-9), (
            key
        )


FULL = {
    "SD1": (SD1_UNET, 686),
    "SDXL": (SDXL_UNET, 1680),
    "SDXL refiner": (SDXL_REFINER_UNET, 1220),
    "SDXL inpainting": (replace(SDXL_UNET, in_channels=9), 1680),
    "SDXL LCM": (replace(SDXL_UNET, guidance_waves=256), 1681),
}


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "count"), FULL.values(), ids=FULL)
def test_every_key_of_the_full_size_has_its_place_in_both_formats(spec: UNetSpec, count: int) -> None:
    with torch.device("meta"):
        theirs = reference(spec).state_dict()
    ours = UNet(spec, device="meta").state_dict()
    assert len(ours) == count
    names, original = diffusers_names(spec), single_file_names(spec)
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
@pytest.mark.parametrize("name", ["transformer above", "SDXL"])
def test_a_step_compiles_into_one_graph_for_all_steps(name: str) -> None:
    spec = SPECS[name]
    ours, _ = pair(spec)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in (700, 500, 3):
            latents, _, conditions = inputs(spec)
            timestep = torch.tensor([step, step])
            ours.set_timestep(timestep)
            ours.set_conditions(conditions)
            assert torch.allclose(compiled(latents), predict(ours, latents, timestep, conditions), atol=1e-5)


def test_a_spec_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one entry per level"):
        UNetSpec(channels=(32, 64), transformer_layers=(1,))
    with pytest.raises(ValueError, match="pooled_text_dim 8 and num_time_ids 0 go together"):
        UNetSpec(pooled_text_dim=8)


def test_a_unet_says_which_conditions_it_reads() -> None:
    ours, _ = pair(SPECS["SDXL"])
    with pytest.raises(ValueError, match="given clip_text_embedding, pooled_text_embedding, time_ids, but was given x"):
        ours.set_conditions({"x": torch.zeros(1)})
