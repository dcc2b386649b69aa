"""A T2I-Adapter in a UNet: against diffusers' UNet and pipeline, with other adapters, in copies, compiled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_specimens import SD1, SDXL, SPECS, Inputs, inputs, predict, relative_error, their_arguments, their_unet
from diffusers import (
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
)
from diffusers import T2IAdapter as TheirAdapter
from diffusion_specimens import randomize, small_folder
from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.adapters.scaling import Scaling
from refiners.fluxion.utils import load_from_safetensors
from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_XL, UNet, UNetSpec
from refiners.foundationals.latent_diffusion.control.t2i_adapter import AddedFeatures, T2IAdapter
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import (
    ConditionEncoder,
    T2ISpec,
    feature_places,
)
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import diffusers_names as adapter_names
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import save_condition_encoder
from refiners.foundationals.latent_diffusion.unet_names import diffusers_names
from refiners.solvers import DDIM


def small_unet(spec: UNetSpec = SD1) -> UNet:
    torch.manual_seed(0)
    unet = UNet(spec)
    randomize(unet)
    return unet


def small_adapter(unet: UNet, name: str = "control", **options: Any) -> T2IAdapter:
    encoder = ConditionEncoder(T2ISpec.for_unet(unet.spec, 8))
    randomize(encoder)
    return T2IAdapter(unet, name, encoder, **options)


def random_features(spec: UNetSpec, batch: int = 1, side: int = 8) -> list[Tensor]:
    places = feature_places(spec)
    return [torch.randn(batch, place.width, side // place.scale, side // place.scale) for place in places]


def call_of(spec: UNetSpec = SD1) -> Inputs:
    return inputs(spec, height=8, width=8)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@torch.no_grad()
def test_prediction_equals_diffusers(spec: UNetSpec, scale: float) -> None:
    unet, theirs, names = small_unet(spec), their_unet(spec), diffusers_names(spec)
    theirs.load_state_dict({str(names.to_theirs(key)): tensor for key, tensor in unet.state_dict().items()})
    features = random_features(spec)
    latents, timestep, conditions, _ = call = call_of(spec)
    adapter = T2IAdapter(unet, scale=scale).inject()
    adapter.set_condition_features(features)
    added = [(scale * feature).expand(2, -1, -1, -1) for feature in features]
    arguments = their_arguments(conditions)
    expected = theirs(latents, timestep, down_intrablock_additional_residuals=[*added], **arguments).sample
    assert relative_error(predict(unet, *call), expected) < 1e-5
    assert relative_error(theirs(latents, timestep, **arguments).sample, expected) > 0.05


@torch.no_grad()
def test_several_add_up_with_loras_and_eject_in_any_order_bit_by_bit() -> None:
    unet, call = small_unet(), call_of()
    before, keys = predict(unet, *call), list(unet.state_dict())
    first, second = small_adapter(unet, "first"), small_adapter(unet, "second", scale=0.5)
    features = random_features(SD1), random_features(SD1)
    for adapter, own in zip((first, second), features, strict=True):
        adapter.inject()
        adapter.set_condition_features(own)
    layer = unet.ensure_find(fl.Linear)
    lora = LoraAdapter(layer, rank=2).inject()
    assert set(keys) <= set(unet.state_dict()) and not any("T2I" in key for key in unet.state_dict())
    both = predict(unet, *call)
    first.eject()
    second.set_condition_features([one + 0.5 * two for one, two in zip(*features, strict=True)])
    second.scale = 1.0
    assert torch.allclose(predict(unet, *call), both, atol=1e-5)
    lora.eject()
    second.eject()
    assert torch.equal(predict(unet, *call), before) and list(unet.state_dict()) == keys
    assert unet.find(AddedFeatures) is None


@torch.no_grad()
def test_each_picture_of_a_batch_has_its_features_and_scale() -> None:
    unet = small_unet()
    latents, timestep, conditions, _ = call = call_of()
    adapter, features = T2IAdapter(unet, scale=[0.5, 1.0]).inject(), random_features(SD1, batch=2)
    adapter.set_condition_features(features)
    whole = predict(unet, *call)
    for index, scale in enumerate([0.5, 1.0]):
        adapter.scale = scale
        adapter.set_condition_features([feature[index : index + 1] for feature in features])
        row = slice(index, index + 1)
        alone = predict(unet, latents[row], timestep[row], {name: value[row] for name, value in conditions.items()})
        assert torch.allclose(alone, whole[index : index + 1], atol=1e-5)


def test_gradients_reach_the_condition_encoder_alone() -> None:
    unet = small_unet().requires_grad_(False)
    adapter = small_adapter(unet).inject()
    adapter.set_condition_features(adapter.compute_condition_features(torch.rand(2, 3, 64, 64)))
    predict(unet, *call_of()).square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.condition_encoder.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in unet.parameters())


@torch.no_grad()
def test_a_structural_copy_has_an_adapter_of_its_own() -> None:
    unet, call = small_unet(), call_of()
    plain = predict(unet, *call)
    adapter = small_adapter(unet).inject()
    adapter.set_condition_features(random_features(SD1))
    led = predict(unet, *call)
    copy = unet.structural_copy()
    copied = copy.ensure_find(T2IAdapter)
    copied.scale = 0.0
    assert torch.equal(predict(copy, *call), plain) and torch.equal(predict(unet, *call), led)
    copied.eject()
    assert torch.equal(predict(copy, *call), plain) and torch.equal(predict(unet, *call), led)


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_to_one_graph_and_a_new_scale_or_picture_does_not_compile_again() -> None:
    unet = small_unet()
    latents, timestep, conditions, _ = call = call_of()
    adapter = small_adapter(unet).inject()
    adapter.set_condition_features(random_features(SD1))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for scale in (1.0, 0.5, 0.0):
        with torch._dynamo.config.patch(error_on_recompile=scale != 1.0):
            adapter.scale = scale
            adapter.set_condition_features(random_features(SD1))
            unet.set_timestep(timestep)
            unet.set_conditions(conditions)
            found = compiled(latents)
        assert torch.allclose(found, predict(unet, *call), atol=1e-5)


def pipeline_pair(cls: type[Any], theirs: type[Any], folder: Path, end: float) -> tuple[Any, Any, T2IAdapter]:
    """Our model and their pipeline, with the same weights and the same T2I-Adapter."""
    ours = cls.from_pretrained(small_folder(folder, cls))
    adapter = small_adapter(ours.unet, scale=0.8, end=end)
    spec = adapter.condition_encoder.spec
    kind = "full_adapter_xl" if cls is StableDiffusion_XL else "full_adapter"
    their_adapter: Any = TheirAdapter(3, list(spec.channels), spec.blocks_per_level, spec.unshuffle_factor, kind)
    for block, halving in zip(their_adapter.adapter.body, spec.halvings, strict=True):
        block.downsample = block.downsample if halving > 1 else None  # a UNet of two levels has one halving less
    names, weights = adapter_names(spec), adapter.condition_encoder.state_dict()
    their_adapter.load_state_dict({str(names.to_theirs(key)): tensor for key, tensor in weights.items()})
    pipeline = theirs.from_pretrained(folder, adapter=their_adapter)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline, adapter


@pytest.mark.parametrize(
    ("cls", "theirs", "end", "options"),
    [
        (StableDiffusion_1, StableDiffusionAdapterPipeline, 1.0, {}),
        (StableDiffusion_XL, StableDiffusionXLAdapterPipeline, 0.5, {"adapter_conditioning_factor": 0.5}),
    ],
    ids=["SD1", "XL"],
)
@torch.no_grad()
def test_a_short_pipeline_equals_diffusers(
    cls: type[Any], theirs: type[Any], end: float, options: dict[str, float], tmp_path: Path
) -> None:
    ours, pipeline, adapter = pipeline_pair(cls, theirs, tmp_path, end)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    control, noise = Image.fromarray(pixels), torch.randn(1, 4, 8, 8)
    expected = pipeline(
        "a cat", image=control, height=64, width=64, num_inference_steps=5, guidance_scale=5.0, latents=noise,
        negative_prompt="bad", adapter_conditioning_scale=0.8, output_type="latent", **options,
    ).images  # fmt: skip
    ours.solver = DDIM(5, params=ours.spec.solver_params)
    adapter.inject().set_condition_features(adapter.compute_condition_features(control))
    x, conditions = noise, ours.compute_conditions("a cat", "bad", (64, 64))
    for step in ours.steps:
        x = ours(x, step, **conditions, condition_scale=5.0)
    assert relative_error(x, expected) < 1e-4


@torch.no_grad()
def test_it_is_off_after_its_share_of_the_steps() -> None:
    unet, call = small_unet(), call_of()
    plain = predict(unet, *call)
    adapter = T2IAdapter(unet, end=0.5).inject()
    adapter.set_condition_features(random_features(SD1))
    assert unet.participants == (adapter,)
    is_led: list[bool] = []
    for index in range(5):
        adapter.before_step(index, 5)
        is_led.append(not torch.equal(predict(unet, *call), plain))
    assert is_led == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_it_follows_the_unet_into_another_format_and_its_scale_stays_exact(dtype: torch.dtype) -> None:
    unet = small_unet()
    latents, timestep, conditions, _ = call = call_of()
    adapter = T2IAdapter(unet, scale=0.1).inject()
    adapter.set_condition_features(random_features(SD1))
    expected = predict(unet, *call)
    unet.to(dtype)
    factor = unet.ensure_find(Scaling).factor
    assert factor.dtype == torch.float32 and factor == torch.tensor(adapter.scale)
    halves = {name: value.to(dtype) for name, value in conditions.items()}
    found = predict(unet, latents.to(dtype), timestep, halves)
    assert found.dtype == dtype and relative_error(found.float(), expected) < 0.05


def test_one_for_any_unet_is_saved_for_diffusers_and_loads_by_the_unet_alone(tmp_path: Path) -> None:
    unet = small_unet()
    encoder = small_adapter(unet).condition_encoder
    save_condition_encoder(tmp_path / "adapter.safetensors", encoder)
    loaded = T2IAdapter(unet, weights=tmp_path / "adapter.safetensors").condition_encoder
    assert loaded.spec == encoder.spec
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(name.startswith("adapter.") for name in load_from_safetensors(tmp_path / "adapter.safetensors"))


def test_pictures_are_turned_into_what_the_encoder_sees() -> None:
    grey = ConditionEncoder(replace(T2ISpec.for_unet(SD1), in_channels=1))
    adapter = T2IAdapter(small_unet(), condition_encoder=grey)
    picture = Image.linear_gradient("L").convert("RGBA")
    several = adapter.compute_condition_features([picture, picture.rotate(90)], size=(64, 128))
    alone = adapter.compute_condition_features(
        picture.rotate(90).convert("L").resize((128, 64), Image.Resampling.LANCZOS)
    )
    assert several[0].shape == (2, SD1.channels[0], 8, 16) and torch.allclose(several[0][1:], alone[0], atol=1e-6)


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    unet = small_unet()
    adapter = small_adapter(unet, "depth")
    with pytest.raises(ValueError, match="it is for another model"):
        T2IAdapter(small_unet(SDXL), "depth", adapter.condition_encoder)
    with pytest.raises(ValueError, match=r"3 channels with sides that are multiples of 8, not \(1, 3, 64, 60\)"):
        adapter.compute_condition_features(Image.new("L", (60, 64)))
    with pytest.raises(ValueError, match=r"from 0 to 1, but these go from 0 to 255"):
        adapter.compute_condition_features(255 * torch.eye(64).expand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="has no condition encoder"):
        T2IAdapter(unet).compute_condition_features(Image.new("L", (64, 64)))
    adapter.inject()
    with pytest.raises(ValueError, match="was given no features: call set_condition_features first"):
        predict(unet, *call_of())
    wanted = ", ".join(map(str, SD1.channels))
    with pytest.raises(ValueError, match=rf"are \(1, 5, 8, 8\), \(1, 5, 4, 4\), but .* C of \[{wanted}\]"):
        adapter.set_condition_features([torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 4, 4)])
    with pytest.raises(ValueError, match="another name"):
        small_adapter(unet, "depth").inject()
    adapter.set_condition_features(random_features(SD1, side=16))
    with pytest.raises(ValueError, match=r"\(16, 16\) where the UNet's are \(8, 8\)"):
        predict(unet, *call_of())
    with pytest.raises(ValueError, match="end is 2"):
        T2IAdapter(unet, end=2)
