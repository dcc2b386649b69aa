"""ControlNets on a UNet: against diffusers, several at once, with other adapters, in copies, compiled, and misused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from control_specimens import (
    CHANNELS,
    SDXL,
    SPECS,
    TINY,
    control_pair,
    inputs,
    predict,
    predict_theirs,
    randomize,
    relative_error,
    their_arguments,
    unet_pair,
)
from diffusion_specimens import small_model
from PIL import Image
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.fluxion.utils import tensor_to_image
from refiners.foundationals.latent_diffusion import StableDiffusion_1, UNet, UNetSpec
from refiners.foundationals.latent_diffusion.control import (
    ConditionEncoder,
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    T2IAdapter,
    T2ISpec,
)
from refiners.foundationals.latent_diffusion.image_prompt import IPAdapter
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def led(spec: UNetSpec, seed: int = 1, **options: Any) -> tuple[UNet, ControlNetAdapter, Any, Any]:
    """A UNet with a ControlNet that is injected and has a condition, and both of diffusers."""
    (unet, their_unet), (control_net, theirs) = unet_pair(spec), control_pair(spec, seed)
    adapter = ControlNetAdapter(unet, control_net, **options).inject()
    adapter.set_controlnet_condition(inputs(spec)[-1])
    return unet, adapter, their_unet, theirs


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("has_kept_features", [False, True], ids=["", "kept features"])
def test_a_step_equals_diffusers(spec: UNetSpec, has_kept_features: bool) -> None:
    unet, adapter, their_unet, theirs = led(spec, scale=0.7)
    if has_kept_features:
        adapter.before_step(0, 1)
        assert adapter.features is not None
    arguments = inputs(spec)
    expected = predict_theirs(their_unet, [(theirs, 0.7)], *arguments)
    assert relative_error(predict(unet, *arguments), expected) < 1e-5
    adapter.eject()
    assert relative_error(predict(unet, *arguments), expected) > 1e-2


def test_two_add_up_as_in_diffusers() -> None:
    unet, _, their_unet, theirs = led(TINY, scale=0.7)
    other, their_other = control_pair(TINY, seed=2)
    arguments = inputs(TINY)
    ControlNetAdapter(unet, other, scale=0.4).inject().set_controlnet_condition(arguments[-1])
    expected = predict_theirs(their_unet, [(theirs, 0.7), (their_other, 0.4)], *arguments)
    assert relative_error(predict(unet, *arguments), expected) < 1e-5


def test_a_decay_lets_each_output_count_less_the_earlier_it_comes() -> None:
    unet, _, their_unet, theirs = led(TINY, scale=0.7, scale_decay=0.825)
    latents, timestep, conditions, picture = inputs(TINY)
    arguments = their_arguments(conditions)
    down, middle = theirs(latents, timestep, controlnet_cond=picture, return_dict=False, **arguments)
    outputs = [0.7 * 0.825 ** (len(down) - index) * output for index, output in enumerate((*down, middle))]
    expected = their_unet(
        latents,
        timestep,
        down_block_additional_residuals=outputs[:-1],
        mid_block_additional_residual=outputs[-1],
        **arguments,
    ).sample
    assert relative_error(predict(unet, latents, timestep, conditions), expected) < 1e-5


@pytest.mark.parametrize("has_kept_features", [False, True], ids=["", "kept features"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_condition_for_each_picture_or_for_all_serves_both_halves_of_guidance(
    pictures: int, has_kept_features: bool
) -> None:
    unet, adapter, their_unet, theirs = led(TINY)
    latents, timestep, conditions, picture = inputs(TINY, batch=4)
    adapter.set_controlnet_condition(picture[:pictures])
    if has_kept_features:
        adapter.before_step(0, 1)
    repeated = picture[:pictures].repeat(4 // pictures, 1, 1, 1)
    expected = predict_theirs(their_unet, [(theirs, 1.0)], latents, timestep, conditions, repeated)
    assert relative_error(predict(unet, latents, timestep, conditions), expected) < 1e-5


def test_a_scale_for_each_picture_serves_both_halves_of_guidance() -> None:
    unet, adapter, _, _ = led(TINY)
    latents, timestep, conditions, picture = inputs(TINY, batch=4)
    adapter.set_controlnet_condition(picture[:1])
    alone: list[Tensor] = []
    for scale in (0.3, 0.9):
        adapter.scale = scale
        alone.append(predict(unet, latents, timestep, conditions))
    adapter.scale = (0.3, 0.9)
    together = predict(unet, latents, timestep, conditions)
    assert torch.allclose(together, torch.stack([alone[0][0], alone[1][1], alone[0][2], alone[1][3]]), atol=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 1.0), (0.0, 0.5), (0.3, 0.7)])
def test_it_is_on_in_the_steps_in_which_it_is_on_in_diffusers_and_does_not_run_in_others(
    start: float, end: float
) -> None:
    unet, adapter, _, _ = led(TINY, start=start, end=end)
    runs: list[int] = []
    adapter.control_net.register_forward_hook(lambda *_: runs.append(index))
    for index in range(10):
        for participant in unet.participants:
            participant.before_step(index, 10)
        predict(unet, *inputs(TINY))
    assert runs == [index for index in range(10) if not (index / 10 < start or (index + 1) / 10 > end)]


def test_adapters_of_several_kinds_come_and_go_in_any_order() -> None:
    arguments = inputs(TINY)
    unet, _ = unet_pair(TINY)
    before, keys = predict(unet, *arguments), list(unet.state_dict())
    first, second = (ControlNetAdapter(unet, control_pair(TINY, seed)[0]) for seed in (1, 2))
    for control in (first, second):
        control.set_controlnet_condition(arguments[-1])
    lora = LoraAdapter(unet.MiddleBlock.ensure_find(nn.Conv2d), rank=2)
    t2i_adapter = T2IAdapter(unet, condition_encoder=ConditionEncoder(T2ISpec.for_unet(TINY, downsampling_factor=4)))
    t2i_adapter.set_condition_features(t2i_adapter.compute_condition_features(arguments[-1]))
    image_prompt = IPAdapter(unet)
    image_prompt.set_clip_image_embedding(torch.randn(2, 4, TINY.text_dim))
    for module in (lora.loras["lora"], *image_prompt.attentions):
        randomize(module)
    adapters: list[Any] = [first, lora, t2i_adapter, second, image_prompt]
    outputs: list[Tensor] = []
    for start in range(len(adapters)):
        for adapter in adapters[start:] + adapters[:start]:
            adapter.inject()
        outputs.append(predict(unet, *arguments))
        left = unet.state_dict().keys()
        assert [key for key in keys if key not in left] == []
        for adapter in adapters[start // 2 :] + adapters[: start // 2]:
            adapter.eject()
        assert torch.equal(predict(unet, *arguments), before) and list(unet.state_dict()) == keys
    assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)
    assert not torch.allclose(outputs[0], before, atol=1e-2)


def test_what_walks_the_unet_finds_no_layer_of_the_controlnet() -> None:
    unet, adapter, _, _ = led(TINY)
    found = set(unet.layers(nn.Conv2d))
    assert not found & set(adapter.control_net.layers(nn.Conv2d))
    assert len(found) == len(list(unet_pair(TINY)[0].layers(nn.Conv2d)))


def test_a_structural_copy_has_a_scale_and_a_condition_of_its_own() -> None:
    unet, adapter, _, _ = led(TINY)
    arguments = inputs(TINY)
    expected = predict(unet, *arguments)
    clone = unet.structural_copy()
    copied = clone.ensure_find(ControlNetAdapter)
    assert torch.equal(predict(clone, *arguments), expected)
    copied.scale = 0.1
    copied.set_controlnet_condition(torch.zeros_like(arguments[-1]))
    assert torch.equal(predict(unet, *arguments), expected) and adapter.scale == 1
    assert not torch.allclose(predict(clone, *arguments), expected)
    copied.eject()
    assert torch.equal(predict(unet, *arguments), expected)
    copied.inject()
    assert copied.parent is clone


def test_a_deep_copy_is_on_its_own() -> None:
    unet, _, _, _ = led(TINY)
    clone = copy.deepcopy(unet)
    arguments = inputs(TINY)
    expected = predict(clone, *arguments)
    unet.ensure_find(ControlNetAdapter).control_net.MiddleBlock.ensure_find(nn.Conv2d).weight.add_(1)
    assert torch.equal(predict(clone, *arguments), expected)
    assert not torch.equal(predict(unet, *arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_moves_with_the_unet(dtype: torch.dtype) -> None:
    unet, adapter, _, _ = led(TINY, scale=0.7)
    latents, timestep, conditions, _ = inputs(TINY)
    adapter.before_step(0, 1)
    expected = predict(unet, latents, timestep, conditions)
    unet.to(dtype)
    halves = {name: condition.to(dtype) for name, condition in conditions.items()}
    found = predict(unet, latents.to(dtype), timestep, halves)
    assert found.dtype == dtype and adapter.control_net.dtype == dtype
    assert relative_error(found.float(), expected) < 0.05
    unet.to(torch.float32)
    assert torch.equal(adapter.scaling.factor, torch.tensor(0.7))


def test_the_condition_is_encoded_once_for_all_steps_and_again_only_for_another() -> None:
    sd15 = StableDiffusion_1.from_pretrained("builtin")
    control_net = ControlNet.from_unet(sd15.unet, condition_channels=(16, 32, 96))
    adapter = ControlNetAdapter(sd15, control_net).inject()
    calls: list[int] = []
    control_net.condition_encoder.register_forward_hook(lambda *_: calls.append(1))
    for count in (1, 2):
        adapter.set_controlnet_condition(torch.rand(1, 3, 32, 32))
        for seed in (1, 2):
            sd15.generate("a red circle", seed=seed, num_inference_steps=3, show_progress=False)
        assert len(calls) == count


@pytest.mark.slow
def test_a_step_compiles_into_one_graph_for_all_scales_and_conditions() -> None:
    unet, adapter, _, _ = led(TINY)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index, scale in enumerate((0.7, 0.3, 0.0)):
            latents, timestep, conditions, picture = inputs(TINY)
            adapter.set_controlnet_condition(picture * index / 2)
            adapter.before_step(index, 3)
            adapter.scale = scale
            unet.set_timestep(timestep)
            unet.set_conditions(conditions)
            found = compiled(latents)
            assert torch.allclose(found, predict(unet, latents, timestep, conditions), atol=1e-5)


def test_pictures_of_any_mode_and_size_become_conditions() -> None:
    _, adapter, _, _ = led(TINY)
    picture = inputs(TINY)[-1][:1]
    image = tensor_to_image(picture)
    adapter.set_controlnet_condition(image)
    assert adapter.condition is not None and torch.allclose(adapter.condition, picture, atol=1 / 255)
    for mode in ("L", "RGBA", "P", "1", "LA"):
        adapter.set_controlnet_condition([image.convert(mode)] * 2)
        assert adapter.condition.shape == (2, 3, 32, 48)
    depths = Image.fromarray(np.linspace(0, 65535, 32 * 48, dtype=np.uint16).reshape(32, 48))
    adapter.set_controlnet_condition(depths)
    assert torch.allclose(adapter.condition[0, 2].flatten(), torch.linspace(0, 1, 32 * 48), atol=1 / 255)
    with pytest.raises(ValueError, match="the picture has floats"):
        adapter.set_controlnet_condition(depths.convert("F"))
    adapter.set_controlnet_condition(Image.new("RGB", (50, 31), (255, 0, 0)), size=(32, 48))
    assert torch.equal(adapter.condition, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 32, 48))


WRONG: dict[str, tuple[Callable[[ControlNetAdapter], object], str]] = {
    "no condition": (lambda adapter: setattr(adapter, "condition", None), "no condition"),
    "another size": (lambda adapter: adapter.set_controlnet_condition(torch.rand(1, 3, 32, 32)), r"\(32, 48\)"),
    "more than rows": (lambda adapter: adapter.set_controlnet_condition(torch.rand(3, 3, 32, 48)), "3"),
    "grey": (lambda adapter: adapter.set_controlnet_condition(torch.rand(1, 1, 32, 48)), "3, H, W"),
    "-1 to 1": (lambda adapter: adapter.set_controlnet_condition(torch.rand(1, 3, 32, 48) - 0.5), "0 to 1"),
    "NaN": (lambda adapter: adapter.set_controlnet_condition(torch.full((1, 3, 32, 48), torch.nan)), "0 to 1"),
    "scale": (lambda adapter: setattr(adapter, "scale", float("inf")), "finite"),
    "injected": (lambda adapter: adapter.inject(), "injected already"),
    "ejected": (lambda adapter: [adapter.eject() for _ in range(2)], "not injected"),
    "decay": (lambda adapter: ControlNetAdapter(adapter.parent, adapter.control_net, scale_decay=0), "scale_decay"),  # type: ignore
    "steps": (lambda adapter: ControlNetAdapter(adapter.parent, adapter.control_net, start=1), "shares"),  # type: ignore
    "family": (lambda adapter: ControlNetAdapter(UNet(SDXL), adapter.control_net), "another model"),
}


@pytest.mark.parametrize(("misuse", "message"), WRONG.values(), ids=WRONG)
def test_misuse_is_an_error_that_says_what_to_do(misuse: Callable[[ControlNetAdapter], object], message: str) -> None:
    unet, adapter, _, _ = led(TINY)
    with pytest.raises((ValueError, RuntimeError), match=message):
        misuse(adapter)
        predict(unet, *inputs(TINY))


def test_an_inpainting_unet_is_led_by_a_controlnet_that_sees_the_latents_alone() -> None:
    unet, _ = unet_pair(replace(TINY, in_channels=9))
    control_net = ControlNet(ControlNetSpec(TINY, CHANNELS))
    adapter = ControlNetAdapter(unet, control_net).inject()
    seen: list[Tensor] = []
    control_net.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    latents, timestep, conditions, picture = inputs(replace(TINY, in_channels=9))
    adapter.set_controlnet_condition(picture)
    predict(unet, latents, timestep, conditions)
    assert torch.equal(seen[0], latents[:, :4])


@pytest.mark.parametrize(("conditions", "pictures"), [(2, 1), (3, 2), (2, 3)])
def test_conditions_for_another_number_of_pictures_are_refused(conditions: int, pictures: int) -> None:
    model = small_model()
    text, x = torch.randn(2, 77, 32), torch.randn(pictures, 4, 8, 8)
    edges = ControlNetAdapter(model, ControlNet(ControlNetSpec(model.unet.spec))).inject()
    edges.set_controlnet_condition(torch.rand(conditions, 3, 64, 64))
    for scale in (1.0, 5.0):
        with pytest.raises(ValueError, match=f"ControlNet for {conditions} pictures, but {pictures} are made"):
            model.predict_noise(x, model.steps[0], text, scale)
    edges.eject()
    features = T2IAdapter(model).inject()
    places = enumerate(features.places)
    features.set_condition_features([torch.randn(conditions, place.width, 8 >> i, 8 >> i) for i, place in places])
    with pytest.raises(ValueError, match=f"T2I-Adapter for {conditions} pictures, but {pictures} are made"):
        model.predict_noise(x, model.steps[0], text, 5.0)
    wide = torch.randn(pictures, 4, 8, 20)
    MultiDiffusion(model, window_size=64, window_batch_size=3).inject()
    with pytest.raises(ValueError, match=f"for {conditions} pictures, but {pictures} are made"):
        model.predict_noise(wide, model.steps[0], text, 5.0)
