"""Reference-only control against diffusers' UNet, run on the reference first, with attention written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusion_specimens import randomize, small_model
from steering_specimens import STEPS, TIMESTEP, our_latents, pair, predict, relative_error
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.latent_diffusion import StableDiffusion_1_Inpainting, UNet, UNetSpec
from refiners.foundationals.latent_diffusion.control import ControlNet, ControlNetAdapter, ControlNetSpec, T2IAdapter
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.steering import ReferenceOnlyControlAdapter
from refiners.solvers import Euler

SPECS = {
    "as SD1": UNetSpec((16, 32), (1, 0), (2, 4), text_dim=16, norm_groups=8),
    "as SDXL": UNetSpec((16, 24, 32), (0, 1, 2), (2, 3, 4), 1, text_dim=16, norm_groups=8, has_linear_projection=True),
}


class TheirReferenceOnly:
    """Keeps the inputs of self-attention in a first run; joins them to the keys and values in a second one."""

    def __init__(self, style_cfg: float, negatives: int) -> None:
        self.seen: dict[Any, Tensor] = {}
        self.style_cfg = style_cfg
        self.negatives = negatives

    def __call__(self, attention: Any, h: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        if encoder_hidden_states is not None:
            return attend(attention, h, encoder_hidden_states)
        if attention not in self.seen:
            self.seen[attention] = h
            return attend(attention, h, h)
        led = attend(attention, h, torch.cat([h, self.seen[attention]], dim=1))
        plain = attend(attention, h, h)
        is_negative = (torch.arange(len(h)) < self.negatives)[:, None, None]
        return torch.where(is_negative, self.style_cfg * led + (1 - self.style_cfg) * plain, led)


def attend(attention: Any, h: Tensor, other: Tensor) -> Tensor:
    q, k, v = (
        x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for x in (attention.to_q(h), attention.to_k(other), attention.to_v(other))
    )
    return attention.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("negatives", "size"), [(0, (8, 8)), (2, (8, 8)), (2, (6, 10))])
def test_the_prediction_equals_a_plain_computation(spec: UNetSpec, negatives: int, size: tuple[int, int]) -> None:
    ours, theirs = pair(spec)
    x, text, reference = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16), torch.randn(2, 4, *size)
    without = predict(ours, x, text)
    ReferenceOnlyControlAdapter(ours, style_cfg=0.3).inject().set_controlnet_condition(reference)
    theirs.set_attn_processor(TheirReferenceOnly(0.3, negatives))
    theirs(torch.cat([reference, reference]), TIMESTEP, text)
    expected = theirs(x, TIMESTEP, text).sample
    assert relative_error(predict(ours, x, text, negatives), expected) < 1e-5 < relative_error(without, expected) / 100


class TheirAdain:
    """Keeps means and deviations of features in a first run, and gives them to the features of a second one."""

    def __init__(self, unet: Any, style_cfg: float, negatives: int) -> None:
        self.seen: dict[Any, tuple[Tensor, Tensor]] = {}
        self.style_cfg = style_cfg
        self.negatives = negatives
        count = len(unet.down_blocks)
        lower = [block for index, block in enumerate(unet.down_blocks) if 2 * (1 - index / count) <= 1]
        lower += [block for index, block in enumerate(unet.up_blocks) if 2 * index / count <= 1]
        layers = [layer for block in lower for layer in getattr(block, "attentions", block.resnets)]
        for layer in (*layers, unet.mid_block):
            layer.register_forward_hook(self.hook)

    def hook(self, layer: Any, _: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        flat = x.flatten(2)
        mean, deviation = flat.mean(2)[..., None, None], flat.std(2, correction=0)[..., None, None]
        if layer not in self.seen:
            self.seen[layer] = mean, deviation
            return None
        seen_mean, seen_deviation = self.seen[layer]
        led = (x - mean) / deviation * seen_deviation + seen_mean
        is_negative = (torch.arange(len(x)) < self.negatives)[:, None, None, None]
        led = torch.where(is_negative, self.style_cfg * led + (1 - self.style_cfg) * x, led)
        return (led,) if isinstance(output, tuple) else led


ADAIN_SPECS = {
    **SPECS,
    "four levels": UNetSpec((16, 16, 24, 24), (1, 1, 1, 0), (2, 2, 3, 3), 1, text_dim=16, norm_groups=8),
}


@torch.no_grad()
@pytest.mark.parametrize("spec", ADAIN_SPECS.values(), ids=ADAIN_SPECS)
@pytest.mark.parametrize(
    ("has_attention", "negatives", "size"), [(False, 0, (8, 8)), (False, 2, (6, 10)), (True, 2, (8, 8))]
)
def test_adain_equals_a_plain_computation(
    spec: UNetSpec, has_attention: bool, negatives: int, size: tuple[int, int]
) -> None:
    ours, theirs = pair(spec)
    x, text, reference = torch.randn(4, 4, 16, 16), torch.randn(4, 7, 16), torch.randn(2, 4, 2 * size[0], 2 * size[1])
    without = predict(ours, x, text)
    adapter = ReferenceOnlyControlAdapter(ours, style_cfg=0.3, has_attention=has_attention, has_adain=True).inject()
    adapter.set_controlnet_condition(reference)
    if has_attention:
        theirs.set_attn_processor(TheirReferenceOnly(0.3, negatives))
    TheirAdain(theirs, 0.3, negatives)
    theirs(torch.cat([reference, reference]), TIMESTEP, text)
    expected = theirs(x, TIMESTEP, text).sample
    assert relative_error(predict(ours, x, text, negatives), expected) < 1e-5 < relative_error(without, expected) / 100
    adapter.eject()
    assert torch.equal(predict(ours, x, text), without)


def test_a_reference_that_does_nothing_or_a_style_cfg_out_of_range_is_refused() -> None:
    unet, _ = pair(SPECS["as SD1"])
    with pytest.raises(ValueError, match="neither attention nor AdaIN"):
        ReferenceOnlyControlAdapter(unet, has_attention=False)
    with pytest.raises(ValueError, match=r"style_cfg is 1\.5"):
        ReferenceOnlyControlAdapter(unet, style_cfg=1.5)
    adapter = ReferenceOnlyControlAdapter(unet, style_cfg=0.2)
    with pytest.raises(ValueError, match="style_cfg is nan"):
        adapter.style_cfg = float("nan")
    assert adapter.style_cfg == pytest.approx(0.2)


@torch.no_grad()
def test_the_reference_gets_the_noise_of_each_step() -> None:
    model, clean = small_model(solver=Euler(STEPS)), torch.randn(1, 4, 8, 8)
    adapter = ReferenceOnlyControlAdapter(model.unet).inject()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    text, x = torch.randn(2, 77, 32), torch.randn(1, 4, 8, 8)
    for step in model.steps:
        noised = model.solver.scale_model_input(model.solver.add_noise(clean, noise, step), step)
        adapter.set_controlnet_condition(noised)
        expected = model.predict_noise(x, step, text)
        adapter.set_reference(model, clean, torch.Generator().manual_seed(1))
        assert torch.equal(model.predict_noise(x, step, text), expected)


@torch.no_grad()
def test_style_cfg_can_be_changed_and_is_for_negative_prompts() -> None:
    unet, _ = pair(SPECS["as SD1"])
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    adapter = ReferenceOnlyControlAdapter(unet).inject()
    adapter.set_controlnet_condition(torch.randn(1, 4, 8, 8))
    half = predict(unet, x, text, 1)
    adapter.style_cfg = 0.9
    most = predict(unet, x, text, 1)
    assert adapter.style_cfg == 0.9 and relative_error(most[:1], half[:1]) > 1e-3
    assert torch.equal(most[1:], half[1:])


@torch.no_grad()
def test_an_inpainting_model_sees_its_conditions_in_the_reference_too() -> None:
    model = small_model(StableDiffusion_1_Inpainting)
    model._conditions = torch.randn(1, 5, 8, 9)
    without = our_latents(model, 5.0)
    adapter = ReferenceOnlyControlAdapter(model.unet).inject()
    adapter.set_reference(model, torch.randn(1, 4, 8, 9))
    assert relative_error(our_latents(model, 5.0), without) > 1e-2
    adapter.eject()
    assert torch.equal(our_latents(model, 5.0), without)


def edges(unet: UNet) -> None:
    network = ControlNet(ControlNetSpec(unet.spec, (8, 12, 16)))
    randomize(network)
    ControlNetAdapter(unet, network).inject().set_controlnet_condition(torch.rand(1, 3, 32, 32))


def depth(unet: UNet) -> None:
    adapter = T2IAdapter(unet).inject()
    adapter.set_condition_features([torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)])


def image_prompt(unet: UNet) -> None:
    adapter = IPAdapter(unet, image_proj=ImageProjection(20, unet.spec.text_dim)).inject()
    randomize(adapter)
    adapter.set_clip_image_embedding(torch.randn(2, 4, unet.spec.text_dim))


@torch.no_grad()
@pytest.mark.parametrize("led_by", [edges, depth, image_prompt])
@pytest.mark.parametrize("is_first", [True, False])
def test_the_run_on_the_reference_takes_nothing_from_other_adapters(
    led_by: Callable[[UNet], None], is_first: bool
) -> None:
    """With style_cfg 0 the predictions for negative prompts do not see the reference, but all else."""
    model = small_model()
    unet, adapter = model.unet, ReferenceOnlyControlAdapter(model.unet, style_cfg=0.0)
    adapter.set_controlnet_condition(torch.randn(1, 4, 8, 8))
    x, text, kept = torch.randn(1, 4, 8, 8), torch.randn(2, 7, 32), list[Tensor]()
    model.guidances.append(lambda prediction: kept.append(prediction.negative) or torch.zeros_like(x))
    model.predict_noise(x, 9, text)
    if is_first:
        adapter.inject()
    led_by(unet)
    if not is_first:
        adapter.inject()
    model.predict_noise(x, 9, text)
    adapter.eject()
    model.predict_noise(x, 9, text)
    alone, with_reference, led = kept
    assert relative_error(with_reference, led) < 1e-5 < relative_error(alone, led) / 100


def test_a_reference_that_does_not_fit_is_refused() -> None:
    unet, _ = pair(SPECS["as SD1"])
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    adapter = ReferenceOnlyControlAdapter(unet).inject()
    with pytest.raises(ValueError, match="has no reference: call set_controlnet_condition"):
        predict(unet, x, text)
    adapter.set_controlnet_condition(torch.randn(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"the reference is \(3, 4, 8, 8\), but the latents are \(2, 4, 8, 8\)"):
        predict(unet, x, text)
    with pytest.raises(RuntimeError, match="reference-only control on this UNet already"):
        ReferenceOnlyControlAdapter(unet).inject()
