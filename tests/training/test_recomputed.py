"""Blocks that compute their activations twice give the same outputs and gradients, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_specimens import SMALL, randomize

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.fluxion.layers.recomputed import Recomputed
from refiners.foundationals.latent_diffusion import UNet
from refiners.foundationals.latent_diffusion.unet import (
    DownBlocks,
    MiddleBlock,
    ResidualBlock,
    TransformerLayer,
    UpBlocks,
)
from refiners.training import recompute

BLOCKS: dict[str, tuple[type[fl.Chain], ...]] = {
    "inner blocks": (ResidualBlock, TransformerLayer),
    "blocks that push to and pop from contexts": (DownBlocks, MiddleBlock, UpBlocks),
    "the whole": (UNet,),
}


def gradients(unet: fl.Chain, text: Tensor, times: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    latents = torch.randn(2, 4, 8, 8)
    for _ in range(times):
        unet.set_context("diffusion", {"timestep": torch.tensor([3, 700])})
        unet.set_context("cross_attention", {"text_embedding": text})
        unet(latents).square().mean().backward()
    found = {name: parameter.grad for name, parameter in unet.named_parameters()}
    unet.zero_grad()
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def unet_with_loras() -> UNet:
    torch.manual_seed(0)
    unet = UNet(SMALL.unet)
    for layer, parent in list(unet.walk(fl.Linear)):
        LoraAdapter(layer, rank=2).inject(parent)
    randomize(unet)
    return unet


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_gradients_and_names_are_the_same(blocks: tuple[type[fl.Chain], ...]) -> None:
    unet = unet_with_loras()
    root = fl.Chain(unet)
    text = torch.randn(2, 5, 16, requires_grad=True)
    expected, expected_text = gradients(root, text), text.grad
    keys = list(root.state_dict())
    text.grad = None
    adapters = recompute(root, blocks)
    assert list(root.state_dict()) == keys
    found = gradients(root, text)
    assert list(found) == list(expected) and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)
    assert text.grad is not None and expected_text is not None and torch.equal(text.grad, expected_text)
    for adapter in adapters:
        adapter.eject()
    assert list(root.state_dict()) == keys and not list(root.layers(Recomputed))
    assert all(map(torch.equal, gradients(root, text).values(), expected.values()))


def test_two_calls_before_a_backward_pass_keep_their_contexts_apart() -> None:
    chain = fl.Chain(
        Recomputed(
            fl.Linear(4, 4), fl.Sum(fl.Identity(), fl.Chain(fl.UseContext("a", "b"), fl.Linear(4, 4))), fl.SiLU()
        )
    )
    x, contexts = torch.randn(2, 4), [torch.randn(2, 4, requires_grad=True) for _ in range(2)]

    def run(chain: fl.Chain) -> list[Tensor]:
        total = torch.zeros(())
        for context in contexts:
            chain.set_context("a", {"b": context})
            total = total + chain(x).square().sum()
        found = torch.autograd.grad(total, [*contexts, *chain.parameters()])
        return list(found)

    plain = fl.Chain(chain.Recomputed[:])
    assert all(map(torch.equal, run(chain), run(plain)))
    assert chain._contexts is None


def test_dropout_is_the_same_in_both_passes() -> None:
    chain = fl.Chain(Recomputed(fl.Linear(64, 64, bias=False), nn.Dropout(0.5)))
    x = torch.eye(64)
    y = chain(x)
    y.sum().backward()
    kept = (y.detach() != 0).float()
    torch.testing.assert_close(chain.Recomputed.Linear.weight.grad, 2 * kept.T)


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes that the graph of a forward pass keeps, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call()
    del loss
    return sum(kept.values())


def test_activations_are_not_kept() -> None:
    unet, text = unet_with_loras(), torch.randn(2, 5, 16)

    def call() -> Tensor:
        unet.set_timestep(torch.tensor([3, 700]))
        unet.set_clip_text_embedding(text)
        return unet(torch.randn(2, 4, 16, 16)).square().mean()

    before = kept_bytes(call)
    recompute(unet, BLOCKS["inner blocks"])
    assert kept_bytes(call) < before / 2


def test_without_gradients_nothing_is_computed_twice() -> None:
    calls: list[Tensor] = []
    chain = fl.Chain(Recomputed(fl.Lambda(lambda x: calls.append(x) or x), fl.Linear(4, 4)))
    with torch.no_grad():
        chain(torch.randn(2, 4))
    assert len(calls) == 1


def test_a_tree_without_such_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no ResidualBlock, TransformerLayer in this Chain"):
        recompute(fl.Chain(fl.Linear(2, 2)), BLOCKS["inner blocks"])
