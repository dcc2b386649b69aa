"""ControlNets against diffusers' `ControlNetModel` at random, non-trivial weights."""

import pytest
import torch
from control_specimens import (
    CHANNELS,
    SD1,
    SPECS,
    control_pair,
    inputs,
    predict,
    predict_theirs,
    relative_error,
    their_arguments,
    unet_pair,
)
from torch import Tensor, nn

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import UNetSpec
from refiners.foundationals.latent_diffusion.control import ControlNet, ControlNetAdapter
from refiners.foundationals.latent_diffusion.control.control_net_names import diffusers_names
from refiners.foundationals.latent_diffusion.unet import CONDITIONS


@pytest.mark.parametrize("averages", [False, True], ids=["", "averages"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_output_equals_diffusers(spec: UNetSpec, averages: bool) -> None:
    ours, theirs = control_pair(spec, global_pool_conditions=averages)
    latents, timestep, conditions, picture = inputs(spec)
    for name, value in conditions.items():
        context, key = CONDITIONS[name]
        ours.set_context(context, {key: value})
    ours.set_context("diffusion", {"timestep": timestep})
    ours.set_context("control_net", {"condition": picture})
    with torch.no_grad():
        found = ours(latents)
        down, middle = theirs(
            latents, timestep, controlnet_cond=picture, return_dict=False, **their_arguments(conditions)
        )
    assert len(found) == len(down) + 1 == ours.spec.num_outputs
    for mine, expected in zip(found, (*down, middle), strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 1e-5


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_of_every_weight_equal_diffusers_and_none_reach_a_frozen_unet(spec: UNetSpec) -> None:
    (unet, their_unet), (ours, theirs) = unet_pair(spec), control_pair(spec)
    unet.requires_grad_(False)
    arguments = inputs(spec)
    adapter = ControlNetAdapter(unet, ours, scale=0.7).inject()
    adapter.set_controlnet_condition(arguments[-1])
    adapter.before_step(0, 1)
    predict(unet, *arguments).square().mean().backward()
    predict_theirs(their_unet, [(theirs, 0.7)], *arguments).square().mean().backward()
    names, gradients = diffusers_names(ours.spec), dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        found = gradients[str(names.to_ours(key))].grad
        assert found is not None and parameter.grad is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=2e-5 * parameter.grad.abs().max().item()), key
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_new_one_from_a_unet_has_copies_of_its_weights_and_changes_nothing() -> None:
    unet, _ = unet_pair(SD1)
    arguments = inputs(SD1)
    with torch.no_grad():
        before = predict(unet, *arguments)
        LoraAdapter(unet.ensure_find(nn.Linear), rank=2).inject()
        control_net = ControlNet.from_unet(unet, CHANNELS)
        adapter = ControlNetAdapter(unet, control_net).inject()
        adapter.set_controlnet_condition(arguments[-1])
        assert torch.equal(predict(unet, *arguments), before)
    copied, base = control_net.state_dict(), unet.state_dict()
    shared = copied.keys() & base.keys()
    assert len(shared) == len(copied) - len([key for key in copied if "Encoder.Conv2d" in key or "Zero" in key])
    assert all(torch.equal(copied[key], base[key]) and copied[key] is not base[key] for key in shared)
    assert not {tensor.data_ptr() for tensor in copied.values()} & {tensor.data_ptr() for tensor in base.values()}


def test_a_new_one_learns_from_the_first_step_on() -> None:
    unet, _ = unet_pair(SD1)
    control_net = ControlNet.from_unet(unet.requires_grad_(False), CHANNELS)
    control_net.requires_grad_()
    adapter = ControlNetAdapter(unet, control_net).inject()
    optimizer = torch.optim.Adam(control_net.parameters(), lr=3e-2)
    arguments = inputs(SD1)
    target = torch.randn_like(arguments[0])
    losses: list[Tensor] = []
    for _ in range(4):
        adapter.set_controlnet_condition(arguments[-1])
        loss = (predict(unet, *arguments) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]


def test_the_tree_without_a_condition_says_what_is_missing() -> None:
    ours, _ = control_pair(SD1)
    ours.set_context("diffusion", {"timestep": torch.tensor([3])})
    with pytest.raises(KeyError, match="'control_net'"):
        ours(torch.randn(1, 4, 8, 8))


def test_two_calls_with_other_conditions_do_not_share_features() -> None:
    ours, _ = control_pair(SD1)
    unet, _ = unet_pair(SD1)
    latents, timestep, conditions, picture = inputs(SD1)
    adapter = ControlNetAdapter(unet, ours).inject()
    with torch.no_grad():
        adapter.set_controlnet_condition(picture)
        first = predict(unet, latents, timestep, conditions)
        adapter.set_controlnet_condition(1 - picture)
        assert not torch.allclose(predict(unet, latents, timestep, conditions), first)
        adapter.set_controlnet_condition(picture)
        assert torch.equal(predict(unet, latents, timestep, conditions), first)
